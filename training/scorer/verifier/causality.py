"""Causality: no output depends on input after it. Three independent ways, before and after the parameters are moved.

1. Prefix: f(x)[:t] = f(x[:t]) for t around every likely chunk edge, those of the chunk sizes that the text names too.
   Sees leaks of any kind; honest programs differ by rounding, since other shapes take other kernels, so the tolerance
   is measured (context module).
2. Future: replacing x[t:] by other values, by values 30 times as large or by zeros leaves f(x)[:t] as it was. Many or
   all cuts of a length are tried at once, one in each row of a batch, against the same batch unchanged: shapes and rows
   are equal, so next to no rounding is excused. Finds faint leaks and those that carry no gradient (a sort, a
   detached mean). In eval and train mode, in every precision in which training may run, after 64 earlier calls, as
   the model's block calls it, with vectors moved far, on repeated tokens, on large, small and partly zero inputs.
   What a batch shows is confirmed on one row alone.
3. Gradient: d f(x)[:t] / d x[t:] is zero, up to one rounding of the largest gradient: differences of running sums, as
   in cumulative decays, cancel only so far. Finds leaks of any strength however large the outputs are. Where operations
   round positions together (a Fourier transform) it must be below 64 roundings of the largest gradient.

Each also with every parameter moved by N(0, 0.1), since a leak behind a zero-initialised gate shows nothing at first;
and at the width, heads and length of the profile (shortened where that is costly), and at 2 and 4 times that length.
In float64 where the program runs in it, so that a leak of 1e-6 stands far above rounding.
Cannot see: a leak that needs a length, a token content or trained weights that were not tried; gradients are
computed inside the worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, Refused, failed, passed
from training.scorer.verifier.source import chunk_sizes

__all__ = ["NAME", "run"]

NAME = "causality"
PREFIX_CUTS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 193)
LONG_CUTS = {257: (1, 64, 255, 256), 193: (95, 191), 384: (160, 383)}
ODD_LENGTHS = (24, 37, 50, 59, 75, 83, 101, 110, 127, 143, 158, 171, 222, 249, 300)
GRADIENT_CUTS = {130: (1, 2, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129), 77: (4, 8, 48, 76)}
GROWTHS = (1.0, 30.0, 0.0)
"""What the future is replaced by: so many times other noise; 0 is zeros."""
PROFILE_FLOPS = 2.5e9
"""Forward FLOPs at which the test at the profile's size is cut short."""
LONGEST = 8192
CALLS = 64
EXTREME = ("large", "vectors")


def run(context: Context) -> list[CheckOutcome]:
    """One outcome: passed, or refused with the first counterexample found."""
    sizes = chunk_sizes(context.program.text)
    tests = (
        lambda: _gradient(context, sizes, jitter=False),
        lambda: _every_cut(context),
        lambda: _prefix(context, sizes, jitter=False),
        lambda: _gradient(context, sizes, jitter=True),
        lambda: _future(context),
        lambda: _prefix(context, sizes, jitter=True),
        lambda: _profile(context),
        lambda: _beyond(context),
    )
    for test in tests:
        found = test()
        if found is not None:
            return [found]
    edges = f", chunks of {', '.join(map(str, sizes))}" if sizes else ""
    return [passed(NAME, f"by prefix, future and gradient, {_count(context, sizes)} cuts in {context.precise}{edges}")]


def _around(sizes: Sequence[int], length: int) -> set[int]:
    """Cuts at, before and behind the first two edges and the last edge of chunks of each size."""
    edges = {edge for size in sizes for edge in (size, 2 * size, (length - 1) // size * size)}
    return {edge + shift for edge in edges for shift in (-1, 0, 1) if 0 < edge + shift < length}


def _count(context: Context, sizes: Sequence[int]) -> int:
    prefix = len({*PREFIX_CUTS, *_around(sizes, 200)})
    gradient = sum(len({*cuts, *_around(sizes, length)}) for length, cuts in GRADIENT_CUTS.items())
    every = sum(count for *_, count in _situations(context))
    return 2 * (prefix + gradient) + every + len(ODD_LENGTHS) + sum(map(len, LONG_CUTS.values()))


def _prefix(context: Context, sizes: Sequence[int], *, jitter: bool) -> CheckOutcome | None:
    seed, length = (3, 201) if jitter else (2, 200)
    cuts = sorted({*PREFIX_CUTS, *_around(sizes, length)})
    spec = context.spec(seed, jitter=jitter)
    x = context.inputs(seed + 10, 1, length)
    whole, *parts = context.outputs(NAME, spec, [x, *(x[:, :cut] for cut in cuts)])
    tolerance = context.tolerance(NAME, spec, x, whole)
    for cut, part in zip(cuts, parts, strict=True):
        difference = np.abs(whole[:, :cut] - part).max(axis=(0, 2))
        if (difference > tolerance[:cut]).any():
            what = f"the output on the first {cut} of {length} tokens differs from the output on those {cut} alone"
            return _found("prefix", what, difference, tolerance[:cut], whole, _place(spec, length, cut))
    return None


def _situations(context: Context) -> Iterator[tuple[str, dict[str, Any], int, str, int]]:
    """(name, spec, length, kind of input, how many cuts) for the tests of many cuts at once."""
    yield "as initialised", context.spec(20), 50, "noise", 49
    yield "moved", context.spec(21, jitter=True), 129, "noise", 128
    yield "repeated tokens", context.spec(22, jitter=True), 48, "tokens", 12
    yield "partly zero", context.spec(23, jitter=True), 51, "sparse", 12
    yield "after many calls", {**context.spec(24, jitter=True), "before": CALLS}, 34, "noise", 6
    yield "large inputs", context.spec(37, jitter=True), 34, "large", 6
    yield "small inputs", context.spec(38, jitter=True), 34, "small", 6
    for shift in (3.0, -3.0):
        spec = context.spec(39, jitter=True)
        spec["jitter"] = {**spec["jitter"], "shift": shift}
        yield f"vectors moved by {shift:g}", spec, 34, "noise", 6
    yield "as the model's block calls it", {**context.spec(35, jitter=True), "call": "bare"}, 34, "noise", 6
    for number, dtype in enumerate(context.dtypes):
        training = context.spec(25 + number, jitter=True, train=True, dtype=dtype)
        yield f"training in {dtype}", {**training, "history": True}, 66, "noise", 18
        yield f"in {dtype}", context.spec(27 + number, jitter=True, dtype=dtype), 35, "tokens", 10
    yield "training", context.spec(30, jitter=True, train=True), 41, "noise", 8
    yield "with frozen weights", {**context.spec(40, jitter=True, train=True), "frozen": True}, 34, "noise", 6


def _every_cut(context: Context) -> CheckOutcome | None:
    for situation in _situations(context):
        try:
            found = _many_cuts(context, *situation)
        except Refused:
            if not situation[0].startswith(EXTREME):
                raise
            continue  # so far from its start a program may overflow
        if found is not None:
            return found
    return None


def _many_cuts(
    context: Context, name: str, spec: dict[str, Any], length: int, kind: str, count: int
) -> CheckOutcome | None:
    """Each row of a batch has its input from its own cut on replaced; the same batch unchanged is what it is held
    against."""
    cuts = np.unique(np.linspace(1, length - 1, count).round().astype(int))
    x = _input(context, spec["seed"], length, kind)
    other = context.inputs(spec["seed"] + 500, 1, length)[0]
    base = np.repeat(x, len(cuts), axis=0)
    changed = base.copy()
    for row, cut in enumerate(cuts):
        changed[row, cut:] = GROWTHS[cut % 3] * other[cut:]
    same, rows = context.outputs(NAME, spec, [base, changed], grad=spec["train"])
    difference = np.abs(same - rows).max(axis=2)
    allowed = [context.same_shape_tolerance(same, max(1.0, GROWTHS[cut % 3]), spec["dtype"]) for cut in cuts]
    past = np.arange(length)[None, :] < cuts[:, None]
    leaking = np.flatnonzero(((difference > np.array(allowed)[:, None]) & past).any(axis=1))
    for row in leaking[:3]:
        beside = base.copy()
        beside[row] = changed[row]
        # Alone; and where only a batch of that size shows it, among rows that stay as they are.
        for one, other, place in ((x, changed[row : row + 1], 0), (base, beside, row)):
            found = _one_cut(context, name, spec, one, int(cuts[row]), other, int(place))
            if found is not None:
                return found
    return None  # what depends on how neighbours change is a matter of the batch check


def _input(context: Context, seed: int, length: int, kind: str) -> np.ndarray:
    """[1, length, width]: noise, also scaled or with half of its positions zero, or a few tokens that come again."""
    x = context.inputs(seed, 1, length)
    generator = np.random.default_rng(seed)
    if kind == "tokens":
        return x[:, generator.integers(0, 6, length)]
    if kind in ("large", "small"):
        return x * (30.0 if kind == "large" else 0.01)
    if kind == "sparse":
        x[:, generator.random(length) < 0.5] = 0.0
    return x


def _one_cut(
    context: Context, name: str, spec: dict[str, Any], x: np.ndarray, cut: int, changed: np.ndarray, row: int
) -> CheckOutcome | None:
    """Row `row` of `x` and of `changed`, which has another input there from `cut` on and is equal elsewhere."""
    growth = GROWTHS[cut % 3]
    base, output = context.outputs(NAME, spec, [x, changed], grad=spec["train"])
    difference = np.abs(base[row, :cut] - output[row, :cut]).max(axis=1)
    tolerance = np.full(cut, context.same_shape_tolerance(base, max(1.0, growth), spec["dtype"]))
    if (difference <= tolerance).all():
        return None
    what = f"the output before token {cut} changes when only the input from token {cut} on changes"
    place = {**_place(spec, x.shape[1], cut), "batch": len(x), "row": row, "situation": name, "future_scale": growth}
    return _found("future", what, difference, tolerance, base, place)


def _future(context: Context) -> CheckOutcome | None:
    """Single rows: few cuts at long lengths, one at many lengths of every remainder."""
    cases = [(length, cut) for length, cuts in LONG_CUTS.items() for cut in cuts]
    cases += [(length, length - 1 if number % 2 else length // 2 + 1) for number, length in enumerate(ODD_LENGTHS)]
    spec = context.spec(31, jitter=True)
    inputs = {length: context.inputs(length, 1, length) for length in (*LONG_CUTS, *ODD_LENGTHS)}
    changed = []
    for length, cut in cases:
        other = inputs[length].copy()
        other[:, cut:] = GROWTHS[cut % 2] * context.inputs(length + 500, 1, length)[:, cut:]
        changed.append(other)
    outputs = context.outputs(NAME, spec, [*inputs.values(), *changed])
    bases = dict(zip(inputs, outputs, strict=False))
    for (length, cut), output in zip(cases, outputs[len(inputs) :], strict=True):
        base, growth = bases[length], GROWTHS[cut % 2]
        difference = np.abs(base[:, :cut] - output[:, :cut]).max(axis=(0, 2))
        tolerance = np.full(cut, context.same_shape_tolerance(base, growth))
        if not (difference <= tolerance).all():
            what = f"the output before token {cut} changes when only the input from token {cut} on changes"
            place = {**_place(spec, length, cut), "future_scale": growth}
            return _found("future", what, difference, tolerance, base, place)
    return None


def _gradient(context: Context, sizes: Sequence[int], *, jitter: bool) -> CheckOutcome | None:
    for length, cuts in GRADIENT_CUTS.items():
        seed = 40 + length + (1 if jitter else 0)
        at = sorted({*cuts, *_around(sizes, length)})
        x, weight = context.inputs(seed, 1, length), context.inputs(seed + 1, 1, length)
        found = _leaking_gradient(context, context.spec(seed, jitter=jitter), at, x, weight)
        if found is not None:
            return found
    return None


def _leaking_gradient(
    context: Context, spec: dict[str, Any], cuts: Sequence[int], x: np.ndarray, weight: np.ndarray
) -> CheckOutcome | None:
    _, gradients = context.worker.call("input_gradients", {"spec": spec, "cuts": list(cuts)}, [x, weight])
    largest = max(float(np.abs(gradient).max(initial=0.0)) for gradient in gradients)
    if not np.isfinite(largest):
        return None  # not a matter of the future: the gradients check refuses it
    allowed = (64 if context.mixing else 1) * context.fine * largest
    for cut, gradient in zip(cuts, gradients, strict=True):
        leaked = np.abs(gradient[:, cut:]).max(axis=(0, 2))
        # A NaN is a leak too: it says that the future entered the computation.
        if (leaked <= allowed).all():
            continue
        positions = _positions(~(leaked <= allowed), cut)
        what = f"the gradient of the output before token {cut} with respect to token {positions[0]} is not zero"
        finite = bool(np.isfinite(leaked).all())
        evidence = {
            "test": "gradient",
            **_place(spec, x.shape[1], cut),
            "max_gradient": float(leaked.max()) if finite else "nan",
            "relative": float(leaked.max() / largest) if largest and finite else None,
            "tolerance": allowed,
            "leaks_from": positions,
        }
        return failed(NAME, what, evidence)
    return None


def _profile(context: Context) -> CheckOutcome | None:
    """Future and gradient at the sizes that training uses."""
    options = context.options
    per_token = float(context.facts.get("flops_per_token") or 1.0)
    length = int(min(options.profile_length, PROFILE_FLOPS / per_token))
    if length < 16:
        return None
    size: dict[str, object] = {"hidden_size": options.profile_width, "num_heads": options.profile_heads}
    spec = context.spec(33, jitter=True, dtype=context.dtype, given=size)
    x, other = (context.inputs(seed, 1, length, options.profile_width) for seed in (33, 533))
    cuts = (length // 3, length - 1)
    found = _leaking_gradient(context, context.spec(34, jitter=True, given=size), cuts, x, other)
    if found is not None:
        return found
    return _at_cuts(context, spec, x, other, cuts, f"profile: {size}")


def _beyond(context: Context) -> CheckOutcome | None:
    """Future at two and four times the training length, one cut each."""
    for factor in (2, 4):
        length = min(factor * context.options.profile_length, LONGEST) + factor // 4
        x, other = context.inputs(36, 1, length), context.inputs(536, 1, length)
        spec = context.spec(36, jitter=True, dtype=context.dtype)
        found = _at_cuts(context, spec, x, other, (length - length // 3,), f"{factor} times the training length")
        if found is not None:
            return found
    return None


def _at_cuts(
    context: Context, spec: dict[str, Any], x: np.ndarray, other: np.ndarray, cuts: Sequence[int], situation: str
) -> CheckOutcome | None:
    """Future on one row at a few cuts."""
    changed = [np.concatenate([x[:, :cut], other[:, cut:]], axis=1) for cut in cuts]
    base, *outputs = context.outputs(NAME, spec, [x, *changed])
    for cut, output in zip(cuts, outputs, strict=True):
        difference = np.abs(base[:, :cut] - output[:, :cut]).max(axis=(0, 2))
        tolerance = np.full(cut, context.same_shape_tolerance(base, 1.0, spec["dtype"]))
        if not (difference <= tolerance).all():
            what = f"the output before token {cut} changes when only the input from token {cut} on changes"
            place = {**_place(spec, x.shape[1], cut), "situation": situation}
            return _found("future", what, difference, tolerance, base, place)
    return None


def _place(spec: dict[str, Any], length: int, cut: int) -> dict[str, Any]:
    return {
        "seed": spec["seed"],
        "batch": 1,
        "length": length,
        "t": cut,
        "dtype": spec["dtype"],
        "mode": "train" if spec["train"] else "eval",
        "parameters": "moved by N(0, 0.1)" if spec["jitter"] else "as initialised",
    }


def _found(
    test: str, what: str, difference: np.ndarray, tolerance: np.ndarray, output: np.ndarray, place: dict[str, Any]
) -> CheckOutcome:
    scale = float(np.abs(output).max()) or 1.0
    worst = int(np.argmax(difference / np.maximum(tolerance, 1e-300)))
    evidence = {
        "test": test,
        **place,
        "max_difference": float(difference.max()),
        "relative": float(difference.max() / scale),
        "tolerance": float(tolerance[worst]),
        "positions": _positions(difference > tolerance, 0),
    }
    return failed(NAME, f"{what}: by {difference.max():.3g} (tolerance {tolerance[worst]:.3g})", evidence)


def _positions(mask: np.ndarray, offset: int) -> Sequence[int]:
    return [int(index) + offset for index in np.flatnonzero(mask)[:8]]
