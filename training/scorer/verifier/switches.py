"""Switches: what the constructor's other values build also keeps causality, batch independence and shapes.

Proves, for every switch that construct could build, for heads 2 and 8, for d_model, for the call that the model's
block makes (only the input, by position) and for use_cache and output_attentions: the output has its shape and is
finite; it does not change before a token when only later input changes; nor with its neighbours in the batch; nor
with what follows the prefix. Also with all those values together and with six halves of them, where they can be
combined; and, only that the future is not used, for layers up to 23 and three other widths; its work and saved bytes
grow no faster than the cost check allows, from 256 to 1024 tokens. How: a short form of those checks at two lengths,
with moved parameters, judged here; a finding is reported under the name of the check that it belongs to. Equal shapes
are compared with next to no tolerance (but for rounding of the future, see the module of that name), others with 4096
roundings of the largest output (16 in a coarse dtype): this looks for what a switch adds, and the full checks for what
is faint. An explicit raise in the forward pass means unsupported, as in construct. Cannot see: most combinations of
three and more switches, values other than these, code behind a name that the text does not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.client import OperationFailed
from training.scorer.verifier.construct import SWITCHES, unsupported
from training.scorer.verifier.context import Context, failed, not_finite, passed, raised
from training.scorer.verifier.evidence import differs
from training.scorer.verifier.future import is_rounding

__all__ = ["NAME", "run"]

NAME = "switches"
LENGTH, PREFIX, SEED = 65, 40, 110
CUTS = (33, 64)
CALLS: dict[str, object] = {
    "the block's call": "bare",
    "use_cache=True": {"use_cache": True},
    "output_attentions=True": {"output_attentions": True},
}
_FREE = ("use_cache=True", "output_attentions=True")
"""Not used in training: where they break, decode tells or nobody asks."""
COMBINATIONS = 6
OTHERS: dict[str, dict[str, object]] = {
    "num_heads=2": {"num_heads": 2},
    "num_heads=8": {"num_heads": 8},
    "layer_idx=1": {"layer_idx": 1},
    "layer_idx=None": {"layer_idx": None},
    "d_model too": {"d_model": 64},
}
LAYERS, WIDTHS, COUNTED = range(2, 24), (32, 128, 256), (256, 1024)
"""Layers and widths are tried in a still shorter form: two rows of one batch that differ only in their end. Work is
counted at powers of two, as in the cost check."""


def run(context: Context) -> list[CheckOutcome]:
    """A refusal for each check that a switch breaks, at most one a check, or passed."""
    specs = {label: context.spec(SEED, jitter=True, given=changes) for label, changes in context.switches.items()}
    specs |= {label: context.spec(SEED, jitter=True, given=changes) for label, changes in OTHERS.items()}
    specs |= _combined(context)
    specs |= {label: {**context.spec(SEED, jitter=True), "call": form} for label, form in CALLS.items()}
    found: dict[str, CheckOutcome] = {}
    tested = 0
    for _, outcome in _outcomes(context, specs, _inputs(context), again=context.precise != context.dtype):
        tested += 1
        if outcome is not None and outcome.name not in context.refused:
            found.setdefault(outcome.name, outcome)
    outcome = _sizes(context)
    if outcome is not None and outcome.name not in context.refused:
        found.setdefault(outcome.name, outcome)
    outcome = _steep(context)
    if outcome is not None and outcome.name not in context.refused:
        found.setdefault(outcome.name, outcome)
    tested += len(LAYERS) + len(WIDTHS)
    if found:
        return list(found.values())
    without = f"; unsupported: {', '.join(context.facts['unsupported'])}" if context.facts["unsupported"] else ""
    return [passed(NAME, f"{tested} forms keep causality, batch and shapes{without}")]


def _combined(context: Context) -> dict[str, dict[str, Any]]:
    """All switches at once, then halves of them under a fixed seed: every pair is on together in most of these."""
    generator = np.random.default_rng(SEED)
    labels = list(context.switches)
    if len(labels) < 2:
        return {}
    picks = [labels] + [
        [label for label, kept in zip(labels, generator.random(len(labels)) < 0.5, strict=True) if kept]
        for _ in range(COMBINATIONS)
    ]
    found: dict[str, dict[str, Any]] = {}
    for pick in picks:
        given: dict[str, object] = {}
        for label in pick:
            given |= context.switches[label]
        named = ", ".join(f"{name}={value!r}" for name, value in given.items())
        if len(given) > 1:
            found[named] = context.spec(SEED, jitter=True, given=given)
    return found


def _inputs(context: Context) -> list[np.ndarray]:
    """[1, T], its prefix, that row three times, and that row with two whose end is replaced."""
    x = context.inputs(SEED, 1, LENGTH)
    mixed = np.repeat(x, 1 + len(CUTS), axis=0)
    other = context.inputs(SEED + 1, 1, LENGTH)[0]
    for row, cut in enumerate(CUTS, start=1):
        mixed[row, cut:] = (30.0 if row == 1 else 1.0) * other[cut:]
    return [x, x[:, :PREFIX], np.repeat(x, 1 + len(CUTS), axis=0), mixed]


def _outcomes(
    context: Context, specs: dict[str, dict[str, Any]], arrays: list[np.ndarray], *, again: bool
) -> Iterator[tuple[str, CheckOutcome | None]]:
    """Each label with what was found. `again`: what fails in the precise dtype is tried again in the trained one."""
    each = [spec for spec in specs.values() for _ in arrays]
    reply, outputs = context.worker.call("forward", {"spec": None, "specs": each}, arrays * len(specs))
    later: dict[str, dict[str, Any]] = {}
    for index, (label, spec) in enumerate(specs.items()):
        at = slice(index * len(arrays), (index + 1) * len(arrays))
        results = reply["results"][at]
        broken = next((result for result in results if not result.get("ok")), None)
        if broken is None:
            parts = [output.astype(np.float64) for output in outputs[at]]
            yield label, _judge(context, label, spec, arrays, parts)
        elif again:
            later[label] = {**spec, "dtype": context.dtype}
        else:
            error = broken.get("error", {})
            if label not in context.switches and label not in OTHERS and label not in CALLS:
                continue  # what does not go together need not
            free = label in _FREE or (label in context.switches and label not in SWITCHES)
            if not unsupported(context, label, error, own=free):
                what = f"with {label} the forward pass breaks; raise ValueError for what is not supported:"
                yield label, raised("shapes", what, error, {"with": label, **_place(spec)})
    if later:
        yield from _outcomes(context, later, arrays, again=False)


def _judge(
    context: Context, label: str, spec: dict[str, Any], arrays: list[np.ndarray], outputs: list[np.ndarray]
) -> CheckOutcome | None:
    place = {"with": label, **_place(spec)}
    for array, output in zip(arrays, outputs, strict=True):
        if output.shape != array.shape:
            found = {**place, "expected": list(array.shape), "output": list(output.shape)}
            return failed("shapes", f"with {label}: expected {list(array.shape)}, got {list(output.shape)}", found)
        if not np.isfinite(output).all():
            return failed("shapes", f"with {label} the output is not finite", {**place, **not_finite(output)})
    alone, prefix, same, mixed = outputs
    for row, cut in enumerate(CUTS, start=1):
        allowed = context.same_shape_tolerance(same, 30.0 if row == 1 else 1.0, spec["dtype"])
        difference = np.abs(same[row, :cut] - mixed[row, :cut]).max(axis=1)
        close = (difference <= allowed).all()
        if not close and not is_rounding(context, NAME, spec, arrays[2], arrays[3], row, cut):
            what = f"with {label} the output before token {cut} changes when only the input from there on changes"
            return differs("causality", what, difference, allowed, same, {**place, "test": "future", "t": cut})
    allowed = context.same_shape_tolerance(same, 30.0, spec["dtype"])
    difference = np.abs(same[0] - mixed[0]).max(axis=1)
    if not (difference <= allowed).all():
        what = f"with {label} a row changes with its neighbours"
        return differs("batch", what, difference, allowed, same, place)
    loose = context.loose_tolerance(alone, spec["dtype"])
    for check, what, one, two in (
        ("causality", f"the output on the first {PREFIX} tokens differs from the output on those alone", alone, prefix),
        ("batch", "a row alone differs from the same row among three", alone, same),
    ):
        length = two.shape[1]
        difference = np.abs(one[0, :length] - two[0]).max(axis=1)
        if (difference > loose).any():
            return differs(check, f"with {label} {what}", difference, loose, one, place)
    return None


def _sizes(context: Context) -> CheckOutcome | None:
    """Later layers and other widths. What cannot be built or run there is a matter of construct at the profile."""
    width = context.options.width
    given: dict[str, tuple[int, dict[str, object]]] = {f"layer_idx={n}": (width, {"layer_idx": n}) for n in LAYERS}
    given |= {f"hidden_size={size}": (size, {"hidden_size": size}) for size in WIDTHS if size != width}
    specs = [context.spec(SEED, jitter=True, given=changes) for _, changes in given.values()]
    arrays = []
    for size, _ in given.values():
        pair = np.repeat(context.inputs(SEED, 1, LENGTH, size), 2, axis=0)
        pair[1, CUTS[0] :] = context.inputs(SEED + 1, 1, LENGTH, size)[0, CUTS[0] :]
        arrays.append(pair)
    reply, outputs = context.worker.call("forward", {"spec": None, "specs": specs}, arrays)
    for label, spec, array, result, output in zip(given, specs, arrays, reply["results"], outputs, strict=True):
        if not result.get("ok") or output.shape != array.shape or not np.isfinite(output).all():
            continue
        difference = np.abs(output[0, : CUTS[0]] - output[1, : CUTS[0]]).max(axis=1).astype(np.float64)
        allowed = context.loose_tolerance(output, spec["dtype"])
        if not (difference <= allowed).all():
            what = f"with {label} the output before token {CUTS[0]} changes when only the input from there on changes"
            place = {"with": label, **_place(spec), "batch": 2, "test": "future", "t": CUTS[0]}
            return differs("causality", what, difference, allowed, output, place)
    return None


def _steep(context: Context) -> CheckOutcome | None:
    """Work and saved bytes of each switch from 256 to 1024 tokens."""
    for label, changes in context.switches.items():
        spec = context.spec(SEED, dtype=context.dtype, train=True, given=changes)
        meta = {"spec": spec, "width": context.options.width, "lengths": COUNTED}
        try:
            rows = context.worker.call("count", meta)[0]["rows"]
        except OperationFailed:
            continue  # whether it runs was judged above
        if len(rows) < 2 or context.program.reference:
            continue
        for kind in ("elements", "saved", "flops"):
            spare = 0.01 * np.array([row["elements"] for row in rows]) if kind == "flops" else 0
            amounts = np.log(np.array([max(1.0, row[kind]) for row in rows]) + spare)
            power = float((amounts[1] - amounts[0]) / np.log(COUNTED[1] / COUNTED[0]))
            if not power <= context.options.exponent:
                what = (
                    f"with {label} the {kind} grow as length^{power:.2f}, more than length^{context.options.exponent:g}"
                )
                table = [{key: int(row[key]) for key in ("length", "flops", "elements", "saved")} for row in rows]
                return failed("cost", what, {"with": label, "table": table})
    return None


def _place(spec: dict[str, Any]) -> dict[str, Any]:
    return {"seed": spec["seed"], "batch": 1 + len(CUTS), "length": LENGTH, "dtype": spec["dtype"], "mode": "eval"}
