"""The form of what a worker says of itself: sizes, versions, reports of training. What has another form is forged.

Candidate code shares a process with the operations that give these answers, so any of them may hold anything JSON can.
Covers types, ranges and order; that a number is true is not checked here, and no score depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from training.scorer.heldout import ForgedError

__all__ = [
    "changed_parameter",
    "model_sizes",
    "next_report",
    "peak_memory",
    "prepared_facts",
    "size_refusal",
    "training_report",
]

LARGEST = 1e9
"""A loss beyond it is no number to average; it counts as not finite."""
_MOST_FACTS, _LONGEST = 20, 200
_REPORTED = ("loss", "task_loss", "lr", "grad_norm", "memory_mb")
_SIZES = ("parameters", "mixer_parameters", "ffn_width", "embedding", "head", "mlps", "norms")


def prepared_facts(meta: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """(versions, hardware) of the answer to train.prepare, texts by name.

    Raises:
        ForgedError: it is not made of them.
    """
    return _texts(meta, "versions"), _texts(meta, "hardware")


def model_sizes(meta: Mapping[str, Any]) -> dict[str, int]:
    """{parameters, mixer_parameters, ffn_width} of the answer to train.build, and {embedding, head, mlps, norms}.

    Raises:
        ForgedError: one of them is missing or no positive integer (mixers, and a tied head, may have no parameters).
    """
    sizes = {name: meta.get(name) for name in _SIZES}
    for name, value in sizes.items():
        if not _is_int(value) or not (0 if name in ("mixer_parameters", "head") else 1) <= value < 1 << 53:
            raise ForgedError(f"expected a positive integer as {name}, got {_shown(value)}")
    return {name: int(meta[name]) for name in _SIZES}


def size_refusal(parameters: int, budget: int | None, tolerance: float) -> str | None:
    """Why a model of this size is refused, or None. `budget` None allows any size."""
    if budget is None or abs(parameters - budget) <= tolerance * budget:
        return None
    return (
        f"{'over' if parameters > budget else 'under'} budget: the model has {parameters:,} parameters, the baseline "
        f"{budget:,}; at most {tolerance:.1%} of difference is allowed"
    )


def next_report(done: int, every: int, steps: int) -> int | None:
    """The step after which a worker reports next: after the first, each multiple of `every`, and the last; None when
    all are `done`."""
    if done >= steps:
        return None
    return min(1 if done == 0 else done // every * every + every, steps)


def training_report(meta: Mapping[str, Any], due: int | None) -> dict[str, Any]:
    """{step, loss, task_loss, lr, grad_norm, memory_mb} of one report; what is not finite is None. Whatever else it
    holds is dropped: tokens and time are the scorer's to count.

    Args:
        due: the step whose report comes next, None when there is none.

    Raises:
        ForgedError: it is of another step, or a value is missing or no number.
    """
    step = meta.get("step")
    if not _is_int(step) or step != due:
        raise ForgedError(f"expected {'no report' if due is None else f'the report of step {due}'}, got {_shown(step)}")
    if "loss" not in meta:
        raise ForgedError(f"expected a loss in the report of step {step}, got none")
    return {"step": step, **{name: _finite(meta, name) for name in _REPORTED}}


def peak_memory(meta: Mapping[str, Any]) -> float:
    """peak_memory_mb of the answer to train.run.

    Raises:
        ForgedError: it is no number of 0 or more.
    """
    value = _finite(meta, "peak_memory_mb")
    if value is None or value < 0:
        raise ForgedError(f"expected peak_memory_mb of 0 or more, got {_shown(meta.get('peak_memory_mb'))}")
    return value


def changed_parameter(meta: object) -> str:
    """What a worker says of a parameter that changed while it was trained, {parameter, step}, for a person."""
    said = meta if isinstance(meta, Mapping) else {}
    return (
        f"parameter {_shown(said.get('parameter'))} was changed by something else than the optimiser before its step "
        f"{_shown(said.get('step'))}: a mixer may not train itself, or write into its parameters"
    )


def _finite(meta: Mapping[str, Any], name: str) -> float | None:
    """The number under `name`; None where it is absent, None, not finite or beyond LARGEST for a loss."""
    value = meta.get(name)
    if value is None:
        return None
    if not isinstance(value, float) and not _is_int(value):
        raise ForgedError(f"expected a number as {name}, got {_shown(value)}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return None
    known = math.isfinite(value) and (abs(value) <= LARGEST or "loss" not in name)
    return value if known else None


def _texts(meta: Mapping[str, Any], name: str) -> dict[str, str]:
    found = meta.get(name)
    if not isinstance(found, dict) or len(found) > _MOST_FACTS:
        raise ForgedError(f"expected texts by name as {name}, got {_shown(found)}")
    if not all(isinstance(text, str) and len(key) <= _LONGEST and len(text) <= _LONGEST for key, text in found.items()):
        raise ForgedError(f"expected short texts by name as {name}, got {_shown(found)}")
    return found


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return repr(value)[:200]
