"""Decoding with the trained model, token by token, for programs that offer `step(x_t, state)`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.worker.model import LanguageModel
from training.worker.state import Emit, WorkerState

__all__ = ["OPS", "decode"]


def decode(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Greedy continuation of token 0 by meta {tokens} tokens. {absent: true} where the program has no step, else {} and
    int64 [tokens]."""
    model: LanguageModel = state.instances["model"]
    if not all(callable(getattr(block.mixer, "step", None)) for block in model.blocks):
        return {"absent": True}, []
    model.eval()
    token = torch.zeros(1, 1, dtype=torch.int64, device=state.device)
    states: list[Any] = [None] * len(model.blocks)
    said: list[Tensor] = []
    bfloat16 = state.values.get("dtype") == "bfloat16"
    with torch.no_grad(), torch.autocast(state.device, dtype=torch.bfloat16, enabled=bfloat16):
        for _ in range(int(meta["tokens"])):
            x_BTD = model.embedding(token)
            for number, block in enumerate(model.blocks):
                mixed, states[number] = block.mixer.step(block.mixer_norm(x_BTD), states[number])  # type: ignore[operator,union-attr]
                x_BTD = x_BTD + mixed
                x_BTD = x_BTD + block.mlp(block.mlp_norm(x_BTD))  # type: ignore[operator]
            token = model.head(model.norm(x_BTD)).argmax(dim=-1)
            said.append(token[0])
    return {}, [torch.cat(said).cpu().numpy()]


OPS = {"train.decode": decode}
