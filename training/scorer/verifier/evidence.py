"""What a counterexample says of two outputs that differ: where, by how much, and how much was allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import failed

__all__ = ["differs", "place_of", "positions"]


def differs(
    check: str,
    what: str,
    difference: np.ndarray,
    allowed: np.ndarray | float,
    output: np.ndarray,
    place: Mapping[str, Any],
) -> CheckOutcome:
    """A failed `check` for a difference that is too large at some position.

    Args:
        difference, allowed: at each position, [length]; a NaN is too large as well.
        output: what it is a difference of, for the relative size.
    """
    allowed = np.broadcast_to(np.asarray(allowed, dtype=np.float64), difference.shape)
    wrong = ~(difference <= allowed)
    worst = int(np.argmax(np.where(wrong, difference / np.maximum(allowed, 1e-300), 0.0)))
    scale = float(np.abs(output).max(initial=0.0)) or 1.0
    found = {
        **place,
        "max_difference": float(difference.max()),
        "relative": float(difference.max() / scale),
        "tolerance": float(allowed[worst]),
        "positions": positions(wrong),
    }
    return failed(check, f"{what}: by {difference.max():.3g} (tolerance {allowed[worst]:.3g})", found)


def place_of(spec: Mapping[str, Any], length: int, cut: int | None = None, batch: int = 1) -> dict[str, Any]:
    """Under which conditions a mixer of `spec` was run; `cut` is the first token that differs."""
    return {
        "seed": spec["seed"],
        "batch": batch,
        "length": length,
        "t": cut,
        "dtype": spec["dtype"],
        "mode": "train" if spec["train"] else "eval",
        "parameters": "moved by N(0, 0.1)" if spec["jitter"] else "as initialised",
    }


def positions(mask: np.ndarray, offset: int = 0) -> list[int]:
    """The first eight positions where `mask` is true."""
    return [int(index) + offset for index in np.flatnonzero(mask)[:8]]
