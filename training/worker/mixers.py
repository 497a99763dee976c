"""Builds and calls the candidate for the verifier, with functions of torch that were taken before it was imported.

A candidate may replace `torch.Tensor.detach` or `torch.autograd.grad`; what is bound here keeps its meaning. Tensor
subclasses and modes, which could still intercept these functions, are refused (see `output` and probes.environment).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from training.worker.program import load_class
from training.worker.registers import all_parameters
from training.worker.state import WorkerState

__all__ = [
    "autocast",
    "build",
    "call",
    "class_of",
    "describe_value",
    "gradients",
    "move",
    "normed",
    "output",
    "to_numpy",
    "to_tensor",
    "weighted_sum",
]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}

_tensor, _parameter, _module = torch.Tensor, torch.nn.Parameter, torch.nn.Module
_detach, _to, _numpy, _sum, _mul = (_tensor.detach, _tensor.to, _tensor.numpy, _tensor.sum, _tensor.mul)
_getitem, _add_, _is_floating_point = _tensor.__getitem__, _tensor.add_, _tensor.is_floating_point
_set_requires_grad, _copy_ = _tensor.requires_grad_, _tensor.copy_
_manual_seed, _generator, _randn = torch.manual_seed, torch.Generator, torch.randn
_from_numpy, _no_grad, _autocast = torch.from_numpy, torch.no_grad, torch.autocast
_enable_grad = torch.enable_grad
_ones_like, _rms_norm = torch.ones_like, torch.nn.functional.rms_norm
_float32, _float64, _bfloat16 = torch.float32, torch.float64, torch.bfloat16
# Below torch.autograd.grad, which looks its own helpers up in a module that a candidate can change.
_run_backward = torch.autograd.Variable._execution_engine.run_backward


def build(state: WorkerState, spec: dict[str, Any], cls: Any = None) -> Any:
    """A fresh mixer, of class `cls` where one is given.

    Args:
        spec: {kwargs, seed, dtype, train, jitter: {seed, scale, shift} or None, fill, frozen, rng, anew}. dtype
            "bfloat16" means float32 parameters under bfloat16 autocast. jitter: see `move`. fill: {seed, period},
            values that depend on a parameter's shape only. frozen: no parameter asks for a gradient. rng: the global
            seed that its forward pass begins with, seed + 1 unless told. anew: the program's file is executed first,
            so that nothing of its module is shared with earlier mixers.
    """
    cls = class_of(state, spec) if cls is None else cls
    _manual_seed(int(spec.get("seed", 0)))
    mixer = cls(**spec["kwargs"])
    if not isinstance(mixer, _module):
        raise TypeError(f"expected class DeltaNet to be a torch.nn.Module, got {type(mixer).__name__}")
    mixer = mixer.to(device=state.device, dtype=DTYPES[spec.get("dtype", "float32")])
    if spec.get("jitter"):
        move(mixer, spec["jitter"])
    if spec.get("fill"):
        _fill(mixer, int(spec["fill"]["seed"]), int(spec["fill"]["period"]))
    if spec.get("frozen"):
        for parameter in all_parameters(mixer):
            _set_requires_grad(parameter, False)
    mixer.train(bool(spec.get("train", False)))
    _manual_seed(int(spec.get("rng", int(spec.get("seed", 0)) + 1)))
    return mixer


def class_of(state: WorkerState, spec: dict[str, Any]) -> Any:
    """The program's class; with spec["anew"] as after an import of its own."""
    if state.cls is None:
        raise LookupError("no program is loaded")
    return load_class(str(state.text), state.device) if spec.get("anew") else state.cls


def move(mixer: Any, jitter: dict[str, Any]) -> None:
    """{seed, scale, shift}: adds N(0, scale) to every floating parameter, so that what is zero at first is not, and
    `shift` to vectors and scalars, for what opens late."""
    generator = _generator().manual_seed(int(jitter["seed"]))
    with _no_grad():
        for parameter in all_parameters(mixer):
            if _is_floating_point(parameter):
                noise = _randn(parameter.shape, generator=generator, dtype=_float64)
                _add_(parameter, _to(_mul(noise, float(jitter["scale"])), parameter))
                if jitter.get("shift") and len(parameter.shape) < 2:
                    _add_(parameter, float(jitter["shift"]))


def _fill(mixer: Any, seed: int, period: int) -> None:
    """Row i of a parameter becomes row i modulo `period` of a stream that its trailing shape alone selects: names,
    order, and whether rows are one fused matrix or several make no difference."""
    with _no_grad():
        for parameter in all_parameters(mixer):
            if not _is_floating_point(parameter):
                continue
            rows, *trailing = list(parameter.shape) or [1]
            trailing = [size for size in trailing if size > 1]
            stream = np.random.default_rng([seed, *trailing]).standard_normal((period, *trailing))
            values = stream[np.arange(rows) % period] / math.sqrt(math.prod(trailing))
            _copy_(parameter, _from_numpy(values.reshape(tuple(parameter.shape))))


def call(mixer: Any, x: torch.Tensor, spec: dict[str, Any] | None = None) -> Any:
    """One forward call in a form of the contract.

    spec["call"]: None for all arguments by keyword, "bare" for the call that the model's block makes (only the
    input, by position), or a dict of keywords that replace the defaults.
    """
    form = (spec or {}).get("call")
    if form == "bare":
        return mixer(x)
    keywords = {"attention_mask": None, "past_key_values": None, "use_cache": False, "output_attentions": False}
    return mixer(hidden_states=x, **{**keywords, **(form or {})})


def autocast(spec: dict[str, Any], device: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast where the spec says so."""
    return _autocast(device, dtype=_bfloat16) if spec.get("dtype") == "bfloat16" else nullcontext()


def to_tensor(array: np.ndarray, spec: dict[str, Any], device: str, *, grad: bool = False) -> Any:
    """A fresh tensor of an array, in the precision of the spec. spec["history"]: as inside a model, the result of an
    operation that autograd records; spec["normed"]: behind the norm that stands before every mixer."""
    value = _to(_from_numpy(array.copy()), device=device, dtype=DTYPES[spec.get("dtype", "float32")])
    if spec.get("history"):
        with _enable_grad():
            value = _mul(_set_requires_grad(value), 1.0)
            return normed(value) if spec.get("normed") else value
    if spec.get("normed"):
        value = normed(value)
    return _set_requires_grad(value) if grad else value


def normed(value: Any) -> Any:
    """`value` behind the norm of a block whose weights are ones: every token has root mean square 1."""
    return _rms_norm(value, value.shape[-1:], None, 1e-6)


def output(value: Any) -> Any:
    """The first returned value.

    Raises:
        TypeError: it is no plain tensor.
    """
    first = value[0] if isinstance(value, tuple | list) else value
    if type(first) not in (_tensor, _parameter):
        raise TypeError(f"expected the first returned value to be a tensor, got {type(first).__name__}")
    return first


def to_numpy(value: Any) -> np.ndarray:
    """float64 for float64, else float32."""
    value = _to(_detach(value), "cpu")
    return _numpy(_to(value, _float64 if value.dtype == _float64 else _float32))


def weighted_sum(value: Any, weight: np.ndarray, cut: int | None = None) -> Any:
    """sum(value * weight) over the positions before `cut`; in float32 at least."""
    wide = _to(value, _float64 if value.dtype == _float64 else _float32)
    weights = _to(_from_numpy(weight.copy()), wide)
    before = (slice(None), slice(None, cut))
    return _sum(_mul(_getitem(wide, before), _getitem(weights, before)))


def gradients(target: Any, inputs: Sequence[Any], *, keep: bool = False) -> list[Any]:
    """d target / d input for each input, None where the target does not depend on it."""
    if target.grad_fn is None:
        return [None] * len(inputs)
    ones = (_ones_like(target),)
    return list(_run_backward((target,), ones, keep, False, tuple(inputs), True, accumulate_grad=False))


def describe_value(value: Any) -> dict[str, Any]:
    """What was returned: in which container, how many values, shape and dtype of the first."""
    container = next((kind.__name__ for kind in (tuple, list) if isinstance(value, kind)), None)
    items = list(value) if container else []
    first = items[0] if items else value
    return {
        "ok": True,
        "container": container,
        "returned": len(items) if container else 1,
        "shape": list(first.shape) if isinstance(first, _tensor) else None,
        "dtype": str(first.dtype).removeprefix("torch.") if isinstance(first, _tensor) else type(first).__name__,
        "auxiliary": type(items[1]).__name__ if len(items) > 1 else None,
        "auxiliary_shape": list(items[1].shape) if len(items) > 1 and isinstance(items[1], _tensor) else None,
    }
