"""The process around a candidate: settings of torch, and the functions that names mean, before its import and now.

Noted before the candidate's file is executed and compared afterwards, inside its process, so a program that reaches
far enough can forge the answer; what it could gain by a replaced function, it gains in front of the audit as well.
Covers functions and classes of torch, its modules and tensors (also a method that hides one of a base class, and a
function whose code was exchanged), numpy, builtins, json, random and time. Not covered: values inside closures and
C code, einops, and our own modules, which `reach` and `static` keep a program from.
"""

from __future__ import annotations

import builtins
import json
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from training.worker.state import WorkerState

__all__ = ["before_import", "changed"]

_autocast_enabled = torch.is_autocast_enabled
_function_modes, _dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_hooks = tuple(value for name, value in sorted(vars(torch.nn.modules.module).items()) if name.endswith("_hooks"))

_SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "gradient mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "autocast": lambda: _autocast_enabled("cpu"),
    "anomaly mode": torch.is_anomaly_enabled,
    "threads": torch.get_num_threads,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "matmul precision": torch.get_float32_matmul_precision,
    "modes left open": lambda: _function_modes() + _dispatch_modes(),
    "hooks on all modules": lambda: sum(len(hooks) for hooks in _hooks if isinstance(hooks, dict)),
}
_NAMESPACES: dict[str, Any] = {
    "torch": torch,
    "torch.Tensor": torch.Tensor,
    "torch.autograd": torch.autograd,
    "torch.linalg": torch.linalg,
    "torch.nn": torch.nn,
    **{f"torch.nn.{name}": value for name, value in vars(torch.nn).items() if isinstance(value, type)},
    "torch.nn.functional": torch.nn.functional,
    "torch.nn.init": torch.nn.init,
    "torch.random": torch.random,
    "numpy": np,
    "builtins": builtins,
    "json": json,
    "random": random,
    "time": time,
}
_OURS = {"torch.compile"}
"""What our own loading of a program replaces."""


def before_import(state: WorkerState) -> None:
    """Notes the process as it is before the candidate's file is executed."""
    state.values["settings"] = _settings()
    state.values["names"] = {space: _meanings(owner) for space, owner in _NAMESPACES.items()}


def changed(state: WorkerState) -> tuple[dict[str, list[str]], list[str]]:
    """Settings that differ from before the import, as [before, now], and the names that now mean something else."""
    before, now = state.values["settings"], _settings()
    settings = {name: [before[name], now[name]] for name in now if now[name] != before[name]}
    names = []
    for space, held in state.values["names"].items():
        owner = _NAMESPACES[space]
        meanings = _meanings(owner)
        hiding = {name for name in meanings if name not in held and _inherited(owner, name)}
        other = {name for name, meaning in held.items() if not _same(meaning, meanings.get(name))}
        names += [f"{space}.{name}" for name in other | hiding if not _by_torch(vars(owner).get(name))]
    return settings, sorted(set(names) - _OURS)


def _settings() -> dict[str, str]:
    return {name: str(read()) for name, read in _SETTINGS.items()}


def _meanings(owner: Any) -> dict[str, tuple[Any, Any]]:
    """Name -> each function or class of `owner`'s own, and its code."""
    return {
        name: (value, getattr(value, "__code__", None))
        for name, value in list(vars(owner).items())
        if callable(value) or isinstance(value, staticmethod | classmethod | property)
    }


def _same(one: tuple[Any, Any], two: tuple[Any, Any] | None) -> bool:
    """By identity: the candidate's objects may compare as they like."""
    return two is not None and one[0] is two[0] and one[1] is two[1]


def _inherited(owner: Any, name: str) -> bool:
    return isinstance(owner, type) and any(name in vars(base) for base in owner.__mro__[1:])


def _by_torch(value: Any) -> bool:
    """torch's compiler, once something imports it, wraps torch.manual_seed."""
    return str(getattr(getattr(value, "__code__", None), "co_filename", "")).endswith("torch/_compile.py")
