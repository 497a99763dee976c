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
from training.worker.trial import dense, try_once

__all__ = ["OPS"]

_PART = 1 << 28
"""Bytes of weights in one answer."""
_TRIED = 2, 64
"""Rows and length of the input with which a model is run to make what it makes only then."""


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

    Buffers that the model makes only when it runs are registered; where it has no module for one, it is run once, so
    that it makes that too. Returns {refused: why} where a parameter is missing or has another shape, {unplaced: name}
    where something still has no module.
    """
    model: LanguageModel = state.instances["model"]
    parameters, buffers = named_parameters(model), named_buffers(model)
    written: set[str] = state.values.setdefault("written", set())
    for (name, kind), array in zip(meta["tensors"], arrays, strict=True):
        value = _typed(torch.from_numpy(array.copy()), getattr(torch, kind))
        target = parameters.get(name, buffers.get(name))
        if target is not None and (target.shape, target.dtype) == (value.shape, value.dtype) and dense(target):
            target.detach().copy_(value)
        elif name in parameters:
            return {"refused": f"{name} has another shape or dtype"}, []
        elif not _placed(state, name, value.to(state.device)):
            return {"unplaced": name}, []
        written.add(name)
    if not meta["last"]:
        return {}, []
    if missing := sorted(set(parameters) - written):
        return {"refused": f"{len(missing)} parameters more, {missing[0]} among them"}, []
    state.values["guard"] = Guard(model)
    return {}, []


def _placed(state: WorkerState, name: str, value: Tensor) -> bool:
    """Registers a buffer, in a module that the model makes when it first runs if need be. False: there is none."""
    model: LanguageModel = state.instances["model"]
    if register_buffer(model, name, value):
        return True
    if state.values.setdefault("tried", False):
        return False
    try_once(state, *_TRIED)
    state.values["tried"] = True
    return register_buffer(model, name, value)


def _typed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What `plain` made of a tensor of `dtype`, as it was."""
    return torch.view_as_complex(value) if dtype.is_complex else value.to(dtype)


OPS: dict[str, Op] = {"train.read": read, "train.write": write}
