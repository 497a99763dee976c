"""Shapes: output of the input's shape and finite at every length and batch size, and in which precision it runs.

Proves: lengths 1, 2, 17, 63, 64, 65, 127, 200 and 256, each with batches of 1, 2 and 3, give [batch, length, width],
finite, as the first of three returned values, in float32 and under bfloat16 autocast, in eval and train mode. How:
runs all 108 combinations; shapes and finiteness are looked at here. There is no tolerance. A program that fails in
one of the two precisions is accepted with a warning that names it, and trained in the other: a third of published
programs hard-code bfloat16. Cannot see: other lengths; values that grow with training.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import EPSILON, Context, failed, not_finite, passed, raised, warned

__all__ = ["BATCHES", "LENGTHS", "NAME", "run"]

NAME = "shapes"
LENGTHS = (65, 1, 2, 17, 63, 64, 127, 200, 256)
BATCHES = (2, 1, 3)
_OUTPUTS = ("float32", "bfloat16", "float16")
_NAMES = {"float32": "float32", "bfloat16": "bfloat16 autocast"}


def run(context: Context) -> list[CheckOutcome]:
    """Sets the context's precisions and facts.dtype."""
    both: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    problems: dict[str, CheckOutcome | None] = {dtype: _problem(context, dtype) for dtype in both}
    working = [dtype for dtype in both if problems[dtype] is None]
    if not working:
        problem = problems["float32"]
        assert problem is not None
        return [problem]
    context.dtype, context.dtypes = working[0], tuple(working)
    context.facts["dtype"] = context.dtype
    outcomes: list[CheckOutcome] = []
    for dtype, problem in problems.items():
        if problem is not None:
            what = f"does not run in {_NAMES[dtype]}, is trained in {_NAMES[context.dtype]}: {problem.detail}"
            outcomes.append(warned(NAME, what, problem.counterexample))
    _precision(context)
    _shared(context)
    names = " and ".join(_NAMES[dtype] for dtype in working)
    return [passed(NAME, f"{len(LENGTHS) * len(BATCHES)} shapes in {names}, eval and train mode"), *outcomes]


def _problem(context: Context, dtype: str) -> CheckOutcome | None:
    """The first thing wrong in `dtype`. One shape goes first, so that what never runs is seen at once."""
    shapes = [(batch, length) for length in LENGTHS for batch in BATCHES]
    for part, train in ((shapes[:1], False), (shapes[1:], False), (shapes, True)):
        spec = context.spec(dtype=dtype, train=train)
        inputs = [context.inputs(length, batch, length) for batch, length in part]
        reply, outputs = context.worker.call("forward", {"spec": spec, "grad": train}, inputs)
        mode = "train" if train else "eval"
        for shape, result, output in zip(part, reply["results"], outputs, strict=True):
            place = {"seed": 0, "batch": shape[0], "length": shape[1], "dtype": dtype, "mode": mode}
            problem = _judge(result, output, [*shape, context.options.width], place)
            if problem is not None:
                return problem
    return None


def _judge(result: dict[str, Any], output: np.ndarray, wanted: list[int], place: dict[str, Any]) -> CheckOutcome | None:
    where = f"batch {place['batch']}, length {place['length']}, {place['mode']} mode"
    if not result.get("ok"):
        return raised(NAME, f"{where}: forward raises", result.get("error", {}), place)
    if result["container"] != "tuple" or result["returned"] != 3:
        got = f"a {result['container']} of {result['returned']}" if result["container"] else f"one {result['dtype']}"
        return failed(NAME, f"{where}: expected a tuple of 3 (output, auxiliary, cache), got {got}", place)
    if result["auxiliary_shape"] is not None and np.prod(result["auxiliary_shape"]) != 1:
        what = f"{where}: expected None or a scalar as the second value, got a tensor {result['auxiliary_shape']}"
        return failed(NAME, what, {**place, "auxiliary": result["auxiliary_shape"]})
    if list(output.shape) != wanted:
        found = {**place, "expected": wanted, "output": list(output.shape)}
        return failed(NAME, f"{where}: expected output {wanted}, got {list(output.shape)}", found)
    if result["dtype"] not in _OUTPUTS:
        what = f"{where}: expected an output in float32 or below, got {result['dtype']}, which no layer after it takes"
        return failed(NAME, what, {**place, "output_dtype": result["dtype"]})
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


def _shared(context: Context) -> None:
    """Finds out whether a mixer answers otherwise after another instance was called. If so, the other checks let the
    program be executed anew for each mixer, so that only the state check judges it."""
    spec, inputs = context.spec(jitter=True), [context.inputs(index, 1, 33) for index in range(2)]
    _, alone = context.worker.call("history", {"spec": spec, "anew": True}, inputs[:1])
    _, later = context.worker.call("history", {"spec": spec, "anew": True}, [inputs[1], inputs[1], inputs[0]])
    context.shared = not np.array_equal(alone[-1], later[-1], equal_nan=True)
