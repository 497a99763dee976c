"""Batch: a row's output does not depend on its neighbours, on their order or on how many there are.

Proves: the same row gives the same output alone, first, last, beside other rows, and beside rows 1000 times as large
(statistics over the batch show best there), in eval and train mode, in every precision in which training may run,
before and after the parameters are moved; and in the batch, length, width and precision that training has. How: runs
the batches, compares rows here. With equal shapes next to no rounding is excused; across batch sizes the tolerance is
measured (context module). Cannot see: batches over 9 and lengths other than 40, 65 and 96, but for those of training;
randomness drawn per batch is equal on both sides by the seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, passed
from training.scorer.verifier.evidence import differs

__all__ = ["NAME", "run"]

NAME = "batch"
ROWS = 9


def run(context: Context) -> list[CheckOutcome]:
    """One outcome: passed, or refused with the first counterexample found."""
    cases = [
        (context.spec(60), 65),
        (context.spec(61, jitter=True), 96),
        (context.spec(62, jitter=True, train=True), 65),
        *((context.spec(63, jitter=True, train=True, dtype=dtype), 40) for dtype in context.dtypes),
    ]
    for spec, length in cases:
        found = _case(context, spec, length)
        if found is not None:
            return [found]
    found = _as_trained(context)
    if found is not None:
        return [found]
    return [passed(NAME, "rows are independent of neighbours, order and batch size")]


def _case(context: Context, spec: dict[str, Any], length: int) -> CheckOutcome | None:
    row, other, third, fourth = (context.inputs(spec["seed"] + index, 1, length) for index in range(4))
    pairs = [np.concatenate(rows) for rows in ((row, other), (row, third), (row, 1000 * fourth))]
    base, *same = context.outputs(NAME, spec, pairs, grad=spec["train"])
    for index, output in enumerate(same):
        what = "the same row, beside another neighbour" + (" that is 1000 times as large" if index else "")
        allowed = np.full(length, context.same_shape_tolerance(base[:1], dtype=spec["dtype"]))
        found = _compare(context, spec, what, base[0], output[0], allowed, 2)
        if found is not None:
            return found
    found = _many(context, spec, min(length, 40))
    if found is not None:
        return found
    if spec["train"]:  # other batch sizes draw other random numbers for dropout
        return None
    others = [
        row,
        np.concatenate([other, row]),
        np.concatenate([other, third, row]),
        np.concatenate([row, row, other, third]),
    ]
    alone, second, last, first = context.outputs(NAME, spec, others)
    allowed = context.tolerance(NAME, spec, row, alone)
    for what, output, size in (
        ("the same row, alone and as the first of 2", base[0], 2),
        ("the same row, alone and as the second of 2", second[1], 2),
        ("the same row, alone and as the last of 3", last[2], 3),
        ("the same row, alone and as the first of 4", first[0], 4),
    ):
        found = _compare(context, spec, what, alone[0], output, allowed, size)
        if found is not None:
            return found
    return None


def _many(
    context: Context, spec: dict[str, Any], length: int, rows: int = ROWS, width: int | None = None
) -> CheckOutcome | None:
    """So many rows, all but the middle one replaced."""
    one, two = (context.inputs(spec["seed"] + index, rows, length, width) for index in (10, 11))
    two[rows // 2] = one[rows // 2]
    base, other = context.outputs(NAME, spec, [one, two], grad=spec["train"])
    row, changed = base[rows // 2], other[rows // 2]
    allowed = np.full(len(row), context.same_shape_tolerance(row, dtype=spec["dtype"]))
    what = f"the same row, among {rows - 1} others that are replaced"
    return _compare(context, spec, what, row, changed, allowed, rows)


def _as_trained(context: Context) -> CheckOutcome | None:
    """A batch as training has it; fewer rows where all would cost too much."""
    options = context.options
    length = options.profile_length
    rows = int(min(options.profile_batch, context.affordable_rows(length)))
    if rows < 2:
        return None
    for layer in range(min(2, options.profile_layers)):
        found = _many(context, context.trained_spec(66 + layer, layer), length, rows, options.profile_width)
        if found is not None:
            return found
    return None


def _compare(
    context: Context, spec: dict[str, Any], what: str, one: np.ndarray, two: np.ndarray, allowed: np.ndarray, size: int
) -> CheckOutcome | None:
    difference = np.abs(one - two).max(axis=1)
    if (difference <= allowed).all():
        return None
    place = {
        "seed": spec["seed"],
        "batch": size,
        "length": len(one),
        "dtype": spec["dtype"],
        "mode": "train" if spec["train"] else "eval",
    }
    return differs(NAME, f"{what}, gives another output", difference, allowed, one, place)
