"""Causality: no output depends on input after it. Three independent ways, before and after the parameters are moved.

1. Prefix: f(x)[:t] = f(x[:t]) for t around every likely chunk edge, those of the chunk sizes that the text names too.
   Sees leaks of any kind; honest programs differ by rounding, since other shapes take other kernels, so the tolerance
   is measured (context module).
2. Future: replacing x[t:] by other values, by values 30 times as large or by zeros leaves f(x)[:t] as it was. At length
   256 every t is tried, one in each row of a batch, against the same batch unchanged: shapes and rows are equal, so
   next to no rounding is excused (future module). Finds faint leaks and those that carry no gradient (a sort, a
   detached mean). With and without autograd recording, in eval and train mode, in every precision in which training
   may run, after 64 earlier calls, as the model's block calls it, with vectors moved far, on repeated tokens, on large,
   small and partly zero inputs; also at cuts of lengths 256 and 512 that the program's hash draws.
   And all at once as training has it: its batch, length, width, precision, mode, for the first layers and the last.
   What a batch shows is confirmed on one row alone, or among rows that stay as they are.
3. Gradient: d f(x)[:t] / d x[t:] is zero, up to one rounding of the largest gradient: differences of running sums, as
   in cumulative decays, cancel only so far. Finds leaks of any strength however large the outputs are. Where operations
   round positions together (a Fourier transform) it must be below 64 roundings of the largest gradient.

Each also with every parameter moved by N(0, 0.1), since a leak behind a zero-initialised gate shows nothing at first;
and at the width, heads and length of the profile (shortened where that is costly), and at 2 and 4 times that length.
In float64 where the program runs in it, so that a leak of 1e-6 stands far above rounding.
Cannot see: a leak that needs a length, a token content or trained weights that were not tried, or that stands at one
token beyond the 256th; gradients are computed inside the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier import future
from training.scorer.verifier.context import Context, failed, passed
from training.scorer.verifier.evidence import differs, place_of, positions
from training.scorer.verifier.source import chunk_sizes

__all__ = ["NAME", "run"]

NAME = "causality"
PREFIX_CUTS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 193)
GRADIENT_CUTS = {130: (1, 2, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129), 77: (4, 8, 48, 76)}
LONGEST = 8192


def run(context: Context) -> list[CheckOutcome]:
    """One outcome: passed, or refused with the first counterexample found."""
    sizes, tried = chunk_sizes(context.program.text), future.situations(context)
    tests = (
        lambda: _gradient(context, sizes, jitter=False),
        lambda: future.every_cut(context, tried),
        lambda: _prefix(context, sizes, jitter=False),
        lambda: _gradient(context, sizes, jitter=True),
        lambda: future.single_rows(context),
        lambda: _prefix(context, sizes, jitter=True),
        lambda: _profile(context),
        lambda: _beyond(context),
    )
    for test in tests:
        found = test()
        if found is not None:
            return [found]
    edges = f", chunks of {', '.join(map(str, sizes))}" if sizes else ""
    cuts = _count(sizes) + future.SINGLE + sum(len(situation.cuts) for situation in tried)
    return [passed(NAME, f"by prefix, future and gradient, {cuts} cuts in {context.precise}{edges}")]


def _around(sizes: Sequence[int], length: int) -> set[int]:
    """Cuts at, before and behind the first two edges and the last edge of chunks of each size."""
    edges = {edge for size in sizes for edge in (size, 2 * size, (length - 1) // size * size)}
    return {edge + shift for edge in edges for shift in (-1, 0, 1) if 0 < edge + shift < length}


def _count(sizes: Sequence[int]) -> int:
    """Cuts by prefix and by gradient."""
    prefix = len({*PREFIX_CUTS, *_around(sizes, 200)})
    gradient = sum(len({*cuts, *_around(sizes, length)}) for length, cuts in GRADIENT_CUTS.items())
    return 2 * (prefix + gradient)


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
            place = {"test": "prefix", **place_of(spec, length, cut)}
            return differs(NAME, what, difference, tolerance[:cut], whole, place)
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
        found = positions(~(leaked <= allowed), cut)
        what = f"the gradient of the output before token {cut} with respect to token {found[0]} is not zero"
        finite = bool(np.isfinite(leaked).all())
        evidence = {
            "test": "gradient",
            **place_of(spec, x.shape[1], cut),
            "max_gradient": float(leaked.max()) if finite else "nan",
            "relative": float(leaked.max() / largest) if largest and finite else None,
            "tolerance": allowed,
            "leaks_from": found,
        }
        return failed(NAME, what, evidence)
    return None


def _profile(context: Context) -> CheckOutcome | None:
    """Future and gradient at the sizes that training uses."""
    options = context.options
    length = int(min(options.profile_length, context.affordable_rows(1)))
    if length < 16:
        return None
    size: dict[str, object] = {"hidden_size": options.profile_width, "num_heads": options.profile_heads}
    spec = context.spec(33, jitter=True, dtype=context.dtype, given=size)
    x, other = (context.inputs(seed, 1, length, options.profile_width) for seed in (33, 533))
    cuts = (length // 3, length - 1)
    found = _leaking_gradient(context, context.spec(34, jitter=True, given=size), cuts, x, other)
    if found is not None:
        return found
    return future.at_cuts(context, spec, x, other, cuts, f"profile: {size}")


def _beyond(context: Context) -> CheckOutcome | None:
    """Future at two and four times the training length, one cut each."""
    for factor in (2, 4):
        length = min(factor * context.options.profile_length, LONGEST) + factor // 4
        x, other = context.inputs(36, 1, length), context.inputs(536, 1, length)
        spec = context.spec(36, jitter=True, dtype=context.dtype)
        found = future.at_cuts(context, spec, x, other, (length - length // 3,), f"{factor} times the training length")
        if found is not None:
            return found
    return None
