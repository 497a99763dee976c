"""fla's own DeltaNet model in a plain training loop, as anybody writes it with transformers: what the part `fla` of
benchmarks/gpu_check.py measures our worker against.

`python benchmarks/fla_loop.py < job.json` on a GPU; the job is {model, stream, type, train, device} as of gpu_parts.py.
Answers {parameters, losses, tokens_per_second, peak_memory_mb}, the speed from a quarter of the steps on, so that
compiling does not count. The same shapes, tokens, batch, schedule and precision (bfloat16 autocast, float32 weights),
with fla's fused norm, SwiGLU and cross entropy, and torch's fused AdamW.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import math
import time
from typing import Any

import numpy as np
import torch

from common.process import exit_with_parent
from training.worker.optimizer import learning_rate

__all__ = ["main", "train"]


def train(job: dict[str, Any], mode: str = "chunk", **changes: Any) -> dict[str, Any]:
    """Trains on the whole stream.

    Args:
        mode: of fla's layer.
        changes: of its configuration.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM

    spec, shape, device = job["train"], job["model"], job["device"]
    torch.manual_seed(0)
    config = DeltaNetConfig(
        attn_mode=mode,
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["layers"],
        num_heads=shape["heads"],
        intermediate_size=shape["ffn"],
        vocab_size=shape["vocab"],
        tie_word_embeddings=shape["tied"],
        expand_k=shape["expand_k"],
        expand_v=shape["expand_v"],
        use_gate=shape["use_gate"],
        use_short_conv=shape["use_short_conv"],
        conv_size=shape["conv_size"],
        qk_norm=shape["qk_norm"],
        qk_activation=shape["qk_activation"],
        norm_eps=shape["norm_eps"],
        use_cache=False,
        **changes,
    )
    model = DeltaNetForCausalLM(config).to(device)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec["lr"], betas=tuple(spec["betas"]), weight_decay=spec["weight_decay"], fused=True
    )
    batch, length, steps = int(spec["batch"]), int(spec["seq_len"]), int(spec["steps"])
    micro = min(batch, int(spec["micro_batch"] or batch))
    rows = np.memmap(job["stream"], dtype=job["type"], mode="r", shape=(steps * batch, length + 1))
    warm, begun, losses = max(1, steps // 4), 0.0, []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, spec)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for at in range((step - 1) * batch, step * batch, micro):
            part = torch.from_numpy(rows[at : min(at + micro, step * batch), :-1].astype(np.int64)).to(device)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                loss = model(input_ids=part, labels=part).loss * (len(part) / batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        optimizer.step()
        if step in (1, warm, steps):
            losses.append(total.item())  # waits for the device
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss of fla's model is {losses[-1]} at step {step}")
        if step == warm:
            begun = time.perf_counter()
    seconds = time.perf_counter() - begun
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": losses,
        "tokens_per_second": (steps - warm) * batch * length / seconds,
        "peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None,
    }


def main() -> int:
    exit_with_parent()
    torch.backends.cuda.matmul.allow_tf32 = True
    print(json.dumps(train(json.load(sys.stdin))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
