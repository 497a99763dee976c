"""The weights of a trained model, read out of its process and given to a fresh one.

Both run beside candidate code: the scorer bounds what is read, and no score depends on its being true.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.worker.guard import Guard
from training.worker.model import LanguageModel
from training.worker.registers import named_buffers, named_parameters, register_buffer
from training.worker.snapshot import plain
from training.worker.state import Emit, Op, WorkerState

__all__ = ["OPS"]

_PART = 1 << 28
"""Bytes of weights in one answer."""


def read(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Weights and buffers of the trained model from number `from` on, as many as fit into one answer.

    Returns {total, tensors: [name, dtype] of each}. Types that numpy lacks go as float32; complex ones as pairs.
    """
    model, guard = state.instances["model"], state.values["guard"]
    tensors = {**named_buffers(model), **guard.values()}
    names = list(tensors)[int(meta["from"]) :]
    parts: list[np.ndarray] = []
    size = 0
    for name in names:
        array = plain(tensors[name].detach()).cpu().numpy()
        if parts and size + array.nbytes > _PART:
            break
        parts.append(array)
        size += array.nbytes
    told = [[name, str(tensors[name].dtype).removeprefix("torch.")] for name in names[: len(parts)]]
    return {"total": len(tensors), "tensors": told}, parts


def write(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Gives a built model what `read` gave. meta: {tensors, last: whether these are the last}.

    Buffers that the model makes only when it runs are registered. Returns {refused: why} where a parameter is missing,
    is none of the model's or has another shape.
    """
    model: LanguageModel = state.instances["model"]
    parameters, buffers = named_parameters(model), named_buffers(model)
    written: set[str] = state.values.setdefault("written", set())
    for (name, kind), array in zip(meta["tensors"], arrays, strict=True):
        value = _typed(torch.from_numpy(array.copy()), getattr(torch, kind))
        target = parameters.get(name, buffers.get(name))
        if target is not None and (target.shape, target.dtype) == (value.shape, value.dtype) and _whole(target):
            target.detach().copy_(value)
        elif name in parameters or not register_buffer(model, name, value.to(state.device)):
            return {"refused": f"{name} has another shape or dtype, or no place"}, []
        written.add(name)
    if not meta["last"]:
        return {}, []
    if missing := sorted(set(parameters) - written):
        return {"refused": f"{len(missing)} parameters more, {missing[0]} among them"}, []
    state.values["guard"] = Guard(model)
    return {}, []


def _typed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What `plain` made of a tensor of `dtype`, as it was."""
    return torch.view_as_complex(value) if dtype.is_complex else value.to(dtype)


def _whole(tensor: Tensor) -> bool:
    """Whether each of its elements has a place of its own in memory."""
    return all(step > 0 or size < 2 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


OPS: dict[str, Op] = {"train.read": read, "train.write": write}
