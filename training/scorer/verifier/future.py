"""Causality by a changed future: what comes before a cut must not change with what comes after it.

Two runs of equal shape add the same numbers in the same order, so next to no rounding is excused. One kind of honest
program rounds with its future all the same: a sum over whole chunks from which the own chunk is taken again
(`sums - own`) is left with the rounding of what it took away. What rounding makes has another sign in every run once
the past is changed by a trifle; what is computed from the future, however faintly, stays. So a difference that is found
is measured again under eight such changes: `is_rounding`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import EPSILON, Context, Refused
from training.scorer.verifier.evidence import differs, place_of

__all__ = [
    "EVERY",
    "SINGLE",
    "Situation",
    "at_cuts",
    "every_cut",
    "is_rounding",
    "single_rows",
    "situations",
]

NAME = "causality"
GROWTHS = (1.0, 30.0, 0.0)
"""What the future is replaced by: so many times other noise; 0 is zeros."""
LONG_CUTS = {257: (1, 64, 255, 256), 193: (95, 191), 384: (160, 383)}
ODD_LENGTHS = (24, 37, 50, 59, 75, 83, 101, 110, 127, 143, 158, 171, 222, 249, 300)
SINGLE = len(ODD_LENGTHS) + sum(map(len, LONG_CUTS.values()))
"""Cuts that `single_rows` tries."""
EVERY, ROWS, NARROW = 256, 32, 32
"""The length at which every cut is tried, so many in one batch; with autograd recording, at this smaller width."""
DRAWN = {256: 20, 512: 6}
"""Cuts that the hash of a program draws, by length: no place is known to be left out while its text is written."""
CALLS, CHANGES = 64, 8


@dataclass(frozen=True)
class Situation:
    """One way to run a mixer, for the tests of many cuts at once.

    Attributes:
        kind: of the input: noise, also "large", "small" or "sparse" (half of the positions zero), or "tokens" (a few
            that come again).
        cuts: in ascending order; grad: whether autograd records; extreme: so far from its start that a program may
            overflow, which is no finding; rows: of its batches, unless they are of `ROWS` or as many as cuts.
    """

    name: str
    spec: dict[str, Any]
    length: int
    cuts: Sequence[int]
    kind: str = "noise"
    grad: bool = False
    width: int | None = None
    extreme: bool = False
    rows: int | None = None


def every_cut(context: Context, tried: Sequence[Situation]) -> CheckOutcome | None:
    """The first leak that is found in these situations."""
    for situation in tried:
        try:
            found = _many_cuts(context, situation)
        except Refused:
            if not situation.extreme:
                raise
            continue
        if found is not None:
            return found
    return None


def situations(context: Context) -> list[Situation]:
    """All that `every_cut` is to try for this program."""
    return list(_situations(context))


def _situations(context: Context) -> Iterator[Situation]:
    moved, everywhere = context.spec(21, jitter=True), range(1, EVERY)
    yield Situation("as initialised", context.spec(20), 50, range(1, 50))
    yield Situation("moved", moved, EVERY, everywhere)
    yield _recording(context)
    for length, count in DRAWN.items():
        for grad in (False, True):
            cuts = _drawn(context, length, count)
            yield Situation("recording gradients" if grad else "moved", moved, length, cuts, grad=grad)
    few = _spread(34, 6)
    yield Situation("in a batch of 128", context.spec(41, jitter=True), 20, range(1, 20), rows=128)
    yield Situation("repeated tokens", context.spec(22, jitter=True), 48, _spread(48, 12), "tokens")
    yield Situation("partly zero", context.spec(23, jitter=True), 51, _spread(51, 12), "sparse")
    yield Situation("after many calls", {**context.spec(24, jitter=True), "before": CALLS}, 34, few)
    yield Situation("large inputs", context.spec(37, jitter=True), 34, few, "large", extreme=True)
    yield Situation("small inputs", context.spec(38, jitter=True), 34, few, "small")
    for shift in (3.0, -3.0):
        spec = context.spec(39, jitter=True)
        spec["jitter"] = {**spec["jitter"], "shift": shift}
        yield Situation(f"vectors moved by {shift:g}", spec, 34, few, extreme=True)
    called = {**context.spec(35, jitter=True), "call": "bare", "normed": True}
    yield Situation("as the model's block calls it", called, 34, few)
    for number, dtype in enumerate(context.dtypes):
        training = {**context.spec(25 + number, jitter=True, train=True, dtype=dtype), "history": True}
        yield Situation(f"training in {dtype}", training, 66, _spread(66, 18), grad=True)
        yield Situation(
            f"in {dtype}", context.spec(27 + number, jitter=True, dtype=dtype), 35, _spread(35, 10), "tokens"
        )
    yield Situation("training", context.spec(30, jitter=True, train=True), 41, _spread(41, 8), grad=True)
    yield from _as_trained(context)
    frozen = {**context.spec(40, jitter=True, train=True), "frozen": True}
    yield Situation("with frozen weights", frozen, 34, few, grad=True)


def _as_trained(context: Context) -> Iterator[Situation]:
    """All at once as training has it, for the first mixers and the last: shape of the batch, size, precision, layer,
    inputs behind other layers, the call of the block, gradients; and two mixers one behind the other, which may hand
    something on past their outputs. Fewer rows where all would cost too much."""
    options = context.options
    length = options.profile_length
    affordable = context.affordable_rows(length)
    if affordable < 1 or length < 2:
        return
    rows = int(min(options.profile_batch, affordable))
    cuts = _drawn(context, length, min(length - 1, max(12, rows)))
    for layer in sorted({0, min(1, options.profile_layers - 1), options.profile_layers - 1}):
        spec = context.trained_spec(45 + layer, layer)
        name = f"as layer {layer} is trained"
        yield Situation(name, spec, length, cuts, grad=True, width=options.profile_width, rows=rows)
    if options.profile_layers > 1:
        for train in (True, False):
            spec = {**context.trained_spec(49, 1, train=train), "behind": 0}
            name = f"as layer 1 is {'trained' if train else 'scored'} behind layer 0"
            yield Situation(name, spec, length, cuts, grad=train, width=options.profile_width, rows=rows)


def _recording(context: Context) -> Situation:
    """Every cut again where autograd records: at a small width, where the program can be built in it."""
    width = NARROW if context.options.width > NARROW else context.options.width
    spec = context.spec(21, jitter=True, given={"hidden_size": width})
    reply, outputs = context.worker.call("forward", {"spec": spec}, [context.inputs(21, 1, 4, width)])
    if not reply["results"][0].get("ok") or outputs[0].shape != (1, 4, width):
        width, spec = context.options.width, context.spec(21, jitter=True)
    return Situation("recording gradients", spec, EVERY, range(1, EVERY), grad=True, width=width)


def _spread(length: int, count: int) -> list[int]:
    return [int(cut) for cut in np.unique(np.linspace(1, length - 1, count).round())]


def _drawn(context: Context, length: int, count: int) -> list[int]:
    generator = random.Random(f"{context.program.sha256} {length}")
    return sorted(generator.sample(range(1, length), count))


def _many_cuts(context: Context, situation: Situation) -> CheckOutcome | None:
    """Each row of a batch has its input from its own cut on replaced; the same batch unchanged is what it is held
    against."""
    spec, length, cuts = situation.spec, situation.length, np.array(situation.cuts)
    rows = situation.rows or min(ROWS, len(cuts))
    x = _input(context, spec["seed"], length, situation)
    other = context.inputs(spec["seed"] + 500, 1, length, situation.width)[0]
    base = np.repeat(x, rows, axis=0)
    batches = [np.resize(cuts[start : start + rows], rows) for start in range(0, len(cuts), rows)]
    same: np.ndarray | None = None
    for batch in batches:
        changed = base.copy()
        for row, cut in enumerate(batch):
            changed[row, cut:] = _growth(cut) * other[cut:]
        arrays = [changed] if same is not None else [base, changed]
        *first, outputs = context.outputs(NAME, spec, arrays, grad=situation.grad)
        same = first[0] if first else same
        assert same is not None
        difference = np.abs(same - outputs).max(axis=2)
        allowed = [context.same_shape_tolerance(same, max(1.0, _growth(cut)), spec["dtype"]) for cut in batch]
        past = np.arange(length)[None, :] < batch[:, None]
        excess = np.where(past, difference / np.maximum(allowed, 1e-300)[:, None], 0.0).max(axis=1)
        excess /= np.array([max(1.0, _growth(cut)) ** 2 for cut in batch])
        leaking = (~(difference <= np.array(allowed)[:, None]) & past).any(axis=1)
        for row in sorted(map(int, np.flatnonzero(leaking)), key=lambda row: -excess[row])[:3]:
            beside = base.copy()
            beside[row] = changed[row]
            # Alone; and where only a batch of that size shows it, among rows that stay as they are.
            for one, two, at in ((x, changed[row : row + 1], 0), (base, beside, row)):
                alike, found = _compared(context, situation.name, spec, one, two, int(batch[row]), at, situation.grad)
                if found is not None:
                    return found
                if not alike:
                    break
    return None  # what depends on how neighbours change is a matter of the batch check


def _growth(cut: int) -> float:
    return GROWTHS[cut % len(GROWTHS)]


def _input(context: Context, seed: int, length: int, situation: Situation) -> np.ndarray:
    """[1, length, width] of the situation's kind."""
    x = context.inputs(seed, 1, length, situation.width)
    generator = np.random.default_rng(seed)
    if situation.kind == "tokens":
        return x[:, generator.integers(0, 6, length)]
    if situation.kind in ("large", "small"):
        return x * (30.0 if situation.kind == "large" else 0.01)
    if situation.kind == "sparse":
        x[:, generator.random(length) < 0.5] = 0.0
    return x


def _compared(
    context: Context,
    situation: str,
    spec: dict[str, Any],
    x: np.ndarray,
    changed: np.ndarray,
    cut: int,
    row: int = 0,
    grad: bool = False,
) -> tuple[bool, CheckOutcome | None]:
    """Whether the outputs are alike, and what was found, for row `row` of `x` and of `changed`, which has another
    input there from `cut` on and is equal elsewhere."""
    base, output = context.outputs(NAME, spec, [x, changed], grad=grad)
    difference = np.abs(base[row, :cut] - output[row, :cut]).max(axis=1)
    allowed = context.same_shape_tolerance(base, max(1.0, _larger(x, changed, row, cut)), spec["dtype"])
    if (difference <= allowed).all():
        return True, None
    if is_rounding(context, NAME, spec, x, changed, row, cut, grad=grad):
        return False, None
    what = f"the output before token {cut} changes when only the input from token {cut} on changes"
    where = {"row": row, "situation": situation, "future_scale": _larger(x, changed, row, cut)}
    place = {"test": "future", **place_of(spec, x.shape[1], cut, len(x)), **where, "gradients": grad or None}
    return False, differs(NAME, what, difference, allowed, base, place)


def _larger(x: np.ndarray, changed: np.ndarray, row: int, cut: int) -> float:
    """How many times as large as `x` its new future is."""
    return float(np.abs(changed[row, cut:]).max() / (np.abs(x[row]).max() or 1.0))


def is_rounding(
    context: Context,
    check: str,
    spec: dict[str, Any],
    x: np.ndarray,
    changed: np.ndarray,
    row: int,
    cut: int,
    *,
    grad: bool = False,
) -> bool:
    """Whether that row's outputs before `cut` differ by no more than rounding of the future can make.

    Both inputs get the same small change of the past (of some 2^20 roundings in float64, 2^11 in float32, 4 in
    bfloat16), eight times. Differences by rounding then add up like random numbers, to a squared size of one times the
    sum of theirs, those of a leak to eight times; up to 2.5 is rounding. It has a bound too, for a leak that makes
    noise of the last bits: in float64 4096 roundings of the largest output, times the square of how much larger the
    new future is (a state is a product of two inputs), so much less than a leak that could be of use; 64 in
    float32, and under autocast two of bfloat16.
    """
    last_bit, generator = context.epsilon_in(spec["dtype"]), np.random.default_rng(9)
    trifle = 2.0**-32 if last_bit < 1e-10 else 2.0**-12 if last_bit < 1e-6 else 2.0**-5
    arrays = []
    for _ in range(CHANGES):
        factor = 1 + trifle * generator.uniform(-1, 1, x[row, :cut].shape)
        for array in (x, changed):
            other = array.copy()
            other[row, :cut] *= factor
            arrays.append(other)
    outputs = np.stack([output[row] for output in context.outputs(check, spec, arrays, grad=grad)])
    differences = (outputs[0::2] - outputs[1::2])[:, :cut]
    fine, coarse = min(last_bit, EPSILON["float32"]), 2 * EPSILON["bfloat16"] * (spec["dtype"] == "bfloat16")
    growth = max(1.0, _larger(x, changed, row, cut))
    bound = ((4096 if fine < 1e-10 else 64) * fine * growth**2 + coarse) * float(np.abs(outputs).max())
    together = float(np.square(differences.sum(axis=0)).sum())
    return bool(np.abs(differences).max() <= bound and together <= 2.5 * float(np.square(differences).sum()))


def single_rows(context: Context) -> CheckOutcome | None:
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
    for (length, cut), other, output in zip(cases, changed, outputs[len(inputs) :], strict=True):
        allowed = context.same_shape_tolerance(bases[length], GROWTHS[cut % 2], spec["dtype"])
        if not (np.abs(bases[length][:, :cut] - output[:, :cut]) <= allowed).all():
            _, found = _compared(context, "one row", spec, inputs[length], other, cut)
            if found is not None:
                return found
    return None


def at_cuts(
    context: Context, spec: dict[str, Any], x: np.ndarray, other: np.ndarray, cuts: Sequence[int], situation: str
) -> CheckOutcome | None:
    """One row at a few cuts: `other` is what the future of `x` is replaced by."""
    for cut in cuts:
        changed = np.concatenate([x[:, :cut], other[:, cut:]], axis=1)
        _, found = _compared(context, situation, spec, x, changed, cut)
        if found is not None:
            return found
    return None
