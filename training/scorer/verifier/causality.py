"""Causality: no output depends on input after it. Three independent ways, before and after the parameters are moved.

1. Prefix: f(x)[:t] = f(x[:t]) for t around every likely chunk edge. Sees leaks of any kind; honest programs differ by
   rounding, since other shapes take other kernels, so the tolerance is measured (context module).
2. Future: replacing x[t:] by other values, also by values 30 times as large, leaves f(x)[:t] as it was, in eval and
   in train mode. The shapes are equal, so next to no rounding is excused: this finds faint leaks, and those that
   carry no gradient (a sort, a detached mean).
3. Gradient: d f(x)[:t] / d x[t:] is zero, up to one rounding of the largest gradient: differences of running sums, as
   in cumulative decays, cancel only so far. Finds leaks of any strength however large the outputs are. Where operations
   round positions together (a Fourier transform) it must be below 64 roundings of the largest gradient.

Each also with every parameter moved by N(0, 0.1), since a leak behind a zero-initialised gate shows nothing at first.
In float64 where the program runs in it, so that a leak of 1e-6 stands far above rounding.
Cannot see: a leak that needs lengths above 257, certain token content, or trained weights; gradients are computed
inside the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, failed, passed

__all__ = ["NAME", "run"]

NAME = "causality"
PREFIX_CUTS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 193)
FUTURE_CUTS = {
    257: (1, 32, 64, 100, 128, 192, 255, 256),
    96: (31, 33, 65, 95),
    65: (16, 17, 32, 63, 64),
    50: (1, 8, 47, 49),
}
GRADIENT_CUTS = {130: (1, 2, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129), 77: (4, 8, 48, 76)}


def run(context: Context) -> list[CheckOutcome]:
    """One outcome: passed, or refused with the first counterexample found."""
    for jitter in (False, True):
        for test in (_gradient, _future, _prefix):
            found = test(context, jitter)
            if found is not None:
                return [found]
    cases = 2 * (len(PREFIX_CUTS) + sum(map(len, FUTURE_CUTS.values())) + sum(map(len, GRADIENT_CUTS.values())))
    return [passed(NAME, f"{cases} cuts by prefix, future and gradient, in {context.precise}")]


def _prefix(context: Context, jitter: bool) -> CheckOutcome | None:
    seed, length = (3, 201) if jitter else (2, 200)
    spec = context.spec(seed, jitter=jitter)
    x = context.inputs(seed + 10, 1, length)
    whole, *parts = context.outputs(NAME, spec, [x, *(x[:, :cut] for cut in PREFIX_CUTS)])
    tolerance = context.tolerance(NAME, spec, x, whole)
    for cut, part in zip(PREFIX_CUTS, parts, strict=True):
        difference = np.abs(whole[:, :cut] - part).max(axis=(0, 2))
        if (difference > tolerance[:cut]).any():
            what = f"the output on the first {cut} of {length} tokens differs from the output on those {cut} alone"
            return _found("prefix", what, difference, tolerance[:cut], whole, _place(context, spec, 1, length, cut))
    return None


def _future(context: Context, jitter: bool) -> CheckOutcome | None:
    for number, (length, cuts) in enumerate(FUTURE_CUTS.items()):
        seed = 20 + number + (10 if jitter else 0)
        for train in (False, True) if number in (1, 2) else (False,):
            spec = context.spec(seed, jitter=jitter, train=train)
            x = context.inputs(seed, 1, length)
            growths = [30.0 if index % 2 else 1.0 for index in range(len(cuts))]
            changed = []
            for cut, growth in zip(cuts, growths, strict=True):
                other = x.copy()
                other[:, cut:] = growth * context.inputs(seed + 500, 1, length)[:, cut:]
                changed.append(other)
            base, *outputs = context.outputs(NAME, spec, [x, *changed])
            for cut, growth, output in zip(cuts, growths, outputs, strict=True):
                difference = np.abs(base[:, :cut] - output[:, :cut]).max(axis=(0, 2))
                tolerance = np.full(cut, context.same_shape_tolerance(base, growth))
                if (difference > tolerance).any():
                    what = f"the output before token {cut} changes when only the input from token {cut} on changes"
                    place = {**_place(context, spec, 1, length, cut), "future_scale": growth}
                    return _found("future", what, difference, tolerance, base, place)
    return None


def _gradient(context: Context, jitter: bool) -> CheckOutcome | None:
    for length, cuts in GRADIENT_CUTS.items():
        seed = 40 + length + (1 if jitter else 0)
        spec = context.spec(seed, jitter=jitter)
        x, weight = context.inputs(seed, 1, length), context.inputs(seed + 1, 1, length)
        _, gradients = context.worker.call("input_gradients", {"spec": spec, "cuts": list(cuts)}, [x, weight])
        largest = max(float(np.abs(gradient).max(initial=0.0)) for gradient in gradients)
        if not np.isfinite(largest):
            return None  # not a matter of the future: the gradients check refuses it
        allowed = (64 if context.mixing else 1) * context.fine * largest
        for cut, gradient in zip(cuts, gradients, strict=True):
            leaked = np.abs(gradient[:, cut:]).max(axis=(0, 2))
            # A NaN is a leak too: it says that the future entered the computation.
            if not (leaked <= allowed).all():
                positions = _positions(~(leaked <= allowed), cut)
                what = f"the gradient of the output before token {cut} with respect to token {positions[0]} is not zero"
                return failed(
                    NAME,
                    what,
                    {
                        "test": "gradient",
                        **_place(context, spec, 1, length, cut),
                        "max_gradient": float(np.nanmax(leaked)) if np.isfinite(leaked).any() else "nan",
                        "relative": float(leaked.max() / largest) if largest and np.isfinite(leaked).all() else None,
                        "tolerance": allowed,
                        "leaks_from": positions,
                    },
                )
    return None


def _place(context: Context, spec: dict[str, Any], batch: int, length: int, cut: int) -> dict[str, Any]:
    return {
        "seed": spec["seed"],
        "batch": batch,
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
    return failed(
        NAME,
        f"{what}: by {difference.max():.3g} (tolerance {tolerance[worst]:.3g})",
        {
            "test": test,
            **place,
            "max_difference": float(difference.max()),
            "relative": float(difference.max() / scale),
            "tolerance": float(tolerance[worst]),
            "positions": _positions(difference > tolerance, 0),
        },
    )


def _positions(mask: np.ndarray, offset: int) -> Sequence[int]:
    return [int(index) + offset for index in np.flatnonzero(mask)[:8]]
