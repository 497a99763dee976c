"""State: what a mixer keeps from one call to the next does not change what it answers.

Refuses: a mixer that saw other data of the same shape before answers the same input otherwise (a cache, running
statistics), in eval mode. Warns: a second identical call of one mixer gives another output (a step counter, which one
published program in seven keeps), since then a result depends on how many calls went before. How: fresh mixers under
one seed, warmed on different data; outputs compared here, at equal shapes, so with next to no tolerance. Cannot see:
state shared by all instances of the process that the first call alone sets.
"""

from __future__ import annotations

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, failed, passed, warned

__all__ = ["NAME", "run"]

NAME = "state"
LENGTH = 65


def run(context: Context) -> list[CheckOutcome]:
    """A refusal for dependence on content, a warning for dependence on the count of calls, or passed."""
    spec = context.spec(70, jitter=True)
    x, one, two = (context.inputs(70 + index, 2, LENGTH) for index in range(3))
    outputs = context.outputs(NAME, spec, [one, x, two, x], warm=True)
    place = {"seed": 70, "batch": 2, "length": LENGTH, "dtype": spec["dtype"], "mode": "eval"}
    found = _difference(context, outputs[1], outputs[3])
    if found:
        what = "after a call with other data of the same shape, the same input gives another output"
        return [failed(NAME, f"{what}: by {found['max_difference']:.3g}", {**place, **found})]
    first, second = context.outputs(NAME, spec, [x], calls=2)
    found = _difference(context, first, second)
    if found:
        what = f"a second identical call gives another output: by {found['max_difference']:.3g}"
        return [passed(NAME, "does not depend on earlier data"), warned(NAME, what, {**place, **found})]
    return [passed(NAME, "two calls give one output; earlier data leaves no trace")]


def _difference(context: Context, one: np.ndarray, two: np.ndarray) -> dict[str, object]:
    difference = np.abs(one - two).max(axis=(0, 2))
    allowed = context.same_shape_tolerance(one)
    if (difference <= allowed).all():
        return {}
    positions = [int(index) for index in np.flatnonzero(difference > allowed)[:8]]
    return {"max_difference": float(difference.max()), "tolerance": allowed, "positions": positions}
