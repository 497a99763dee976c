"""Shapes: output of the input's shape and finite at every length and batch size, and in which precision it runs.

Proves: lengths 1, 2, 17, 63, 64, 65, 127, 200 with batches of 1 to 3 give [batch, length, width], finite, as the
first of three returned values, in eval and train mode. How: runs them; shapes and finiteness are looked at here.
There is no tolerance. A program that fails in float32 but runs under bfloat16 autocast is accepted, and trained so: a
third of published programs hard-code bfloat16. Failing in the other of the two is a warning. Cannot see: other
lengths; values that grow with training.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import EPSILON, Context, failed, not_finite, passed, raised, warned

__all__ = ["NAME", "SHAPES", "run"]

NAME = "shapes"
SHAPES = ((2, 65), (1, 1), (3, 1), (1, 2), (2, 17), (3, 63), (1, 64), (1, 127), (2, 200))
"""(batch, length); the first is tried in every precision."""


def run(context: Context) -> list[CheckOutcome]:
    """Sets the context's precisions and facts.dtype."""
    outcomes: list[CheckOutcome] = []
    problems: dict[str, CheckOutcome | None] = {}
    both: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    for dtype in both:
        problems[dtype] = _problem(context, dtype, SHAPES[:1], train=False)
    working = [dtype for dtype in both if problems[dtype] is None]
    if not working:
        problem = problems["float32"]
        assert problem is not None
        return [problem]
    context.dtype = working[0]
    context.facts["dtype"] = context.dtype
    for dtype in both:
        problem = problems[dtype]
        if problem is not None:
            what = f"does not run in {_NAMES[dtype]}, is trained in {_NAMES[context.dtype]}: {problem.detail}"
            outcomes.append(warned(NAME, what, problem.counterexample))
    for train in (False, True):
        problem = _problem(context, context.dtype, SHAPES if not train else SHAPES[:3], train=train)
        if problem is not None:
            return [problem, *outcomes]
    _precision(context)
    return [passed(NAME, f"{len(SHAPES)} shapes in {_NAMES[context.dtype]}"), *outcomes]


_NAMES = {"float32": "float32", "bfloat16": "bfloat16 autocast"}


def _problem(context: Context, dtype: str, shapes: tuple[tuple[int, int], ...], *, train: bool) -> CheckOutcome | None:
    spec = context.spec(dtype=dtype, train=train)
    inputs = [context.inputs(index, *shape) for index, shape in enumerate(shapes)]
    reply, outputs = context.worker.call("forward", {"spec": spec}, inputs)
    for shape, result, output in zip(shapes, reply["results"], outputs, strict=True):
        place = {"seed": 0, "batch": shape[0], "length": shape[1], "dtype": dtype, "mode": "train" if train else "eval"}
        problem = _judge(result, output, [*shape, context.options.width], place)
        if problem is not None:
            return problem
    return None


def _judge(result: dict[str, Any], output: np.ndarray, wanted: list[int], place: dict[str, Any]) -> CheckOutcome | None:
    where = f"batch {place['batch']}, length {place['length']}, {place['mode']} mode"
    if not result.get("ok"):
        return raised(NAME, f"{where}: forward raises", result.get("error", {}), place)
    if not result["tuple"] or result["returned"] != 3:
        got = f"{result['returned']} values" if result["tuple"] else f"one {result['dtype']}"
        return failed(NAME, f"{where}: expected a tuple of 3 (output, auxiliary, cache), got {got}", place)
    if list(output.shape) != wanted:
        return failed(
            NAME,
            f"{where}: expected output {wanted}, got {list(output.shape)}",
            {**place, "expected": wanted, "output": list(output.shape)},
        )
    if not np.isfinite(output).all():
        return failed(NAME, f"{where}: the output is not finite", {**place, **not_finite(output)})
    return None


def _precision(context: Context) -> None:
    """Finds the highest precision in which it runs, and the lowest that its operations produce there."""
    for dtype in ("float64", context.dtype):
        spec = context.spec(dtype=dtype)
        reply, outputs = context.worker.call("forward", {"spec": spec, "watch": True}, [context.inputs(0, 1, 65)])
        if (
            reply["results"][0].get("ok")
            and outputs[0].shape == (1, 65, context.options.width)
            and np.isfinite(outputs[0]).all()
        ):
            seen = [name for name in reply["seen"] if name in EPSILON]
            context.precise, context.mixing = dtype, "mixing" in reply["seen"]
            context.lowest = max(seen, key=EPSILON.__getitem__) if seen else context.dtype
            return
