"""Cost: work and memory grow no faster than length^1.15, and few operations are launched per token. Counted, not timed.

Refuses: matmul FLOPs (forward or backward), elements produced, bytes moved, bytes kept for the backward pass, or its
largest tensor growing faster than length^1.15, fitted from 256 to 4096 tokens in train mode or over any doubling in
between (a small quadratic term shows at the long end first, one behind a branch where the branch begins), or from 509
over 1018 to 2036 in eval mode; more operations per added token than the setting. Warns: more than 4 of them (a loop
over chunks launches 1-2, a Python loop over tokens 5-30). 1.15 lets n log n pass (1.1 over this range) and stops
anything with n^2 that matters at these lengths. Lengths are doubled from a power of two or from a prime, so that for
any chunk size from 8 to 256 either all or none of them are whole chunks (what is padded takes another path), and the
number of chunks never more than doubles. How: a dispatch mode inside the worker counts; the exponents are fitted here.
The table of length against work is the counterexample. Lengths are left out where 80,000 operations would be launched
or 400 MB kept: by counting too, so that the rows are the same on every machine; a program that is too slow to be
counted to the end is refused. Pooling counts every element of every window. For a reference program (outside the
search) every refusal is a warning. Cannot see: work in kernels that torch does not dispatch; a quadratic term that is
still under about a tenth of the work at 4096 tokens; many small tensors of the backward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, failed, passed, warned

__all__ = ["EVAL_LENGTHS", "LENGTHS", "NAME", "run"]

NAME = "cost"
LENGTHS = (256, 512, 1024, 2048, 4096)
EVAL_LENGTHS = (509, 1018, 2036)
MOST_OPERATIONS, MOST_SAVED = 80_000, 400 << 20
_KINDS = {
    "flops": "matmul FLOPs",
    "elements": "elements produced",
    "bytes": "bytes moved",
    "saved": "bytes kept for the backward pass",
    "backward_flops": "matmul FLOPs of the backward pass",
    "backward_largest": "elements of the backward pass's largest tensor",
}
_BEHIND = ("backward_flops", "backward_largest")
"""Counted in train mode only. All elements of the backward pass are not judged: autograd fills a tensor of the whole
length for every slice that was read, so an honest loop over chunks makes a small square of zeros."""


def run(context: Context) -> list[CheckOutcome]:
    """Sets facts.work_exponent, memory_exponent, ops_per_token and flops_per_token."""
    options = context.options
    rows, late = _rows(context, train=True, lengths=LENGTHS, backward=True)
    _facts(context, rows)
    if len(rows) < 2:
        context.slow = True
        return [_refuse(context, f"one forward pass over {LENGTHS[0]} tokens took {rows[0]['seconds']:.1f} s", rows)]
    exponents = {kind: _exponent(rows, kind) for kind in _KINDS}
    work, memory = max(exponents["flops"], exponents["elements"]), max(exponents["bytes"], exponents["saved"])
    context.facts["work_exponent"], context.facts["memory_exponent"] = round(work, 4), round(memory, 4)
    span = rows[-1]["length"] - rows[-2]["length"]
    launched = max(0.0, (rows[-1]["operations"] - rows[-2]["operations"]) / span)
    context.facts["ops_per_token"] = round(launched, 3)
    refusal = _too_steep(context, rows, exponents, "train mode")
    if refusal is not None:
        return [refusal]
    if not launched <= options.refuse_operations:
        context.slow = True
        what = f"{launched:.0f} operations are launched per added token, more than {options.refuse_operations:g}"
        return [_refuse(context, what, rows)]
    if late:
        return [_too_slow(context, rows, "train mode")]
    for what, grad, layer in (("eval mode", True, 0), ("eval mode without gradients at layer 3", False, 3)):
        evaluated, late = _rows(context, train=False, lengths=EVAL_LENGTHS, grad=grad, layer=layer)
        if len(evaluated) > 1:
            ahead = {kind: _exponent(evaluated, kind) for kind in _KINDS if kind not in _BEHIND}
            refusal = _too_steep(context, evaluated, ahead, what)
            if refusal is not None:
                return [refusal]
        if late:
            return [_too_slow(context, evaluated, what)]
    outcome = passed(NAME, f"work grows as length^{work:.2f}; {launched:.2g} operations per added token")
    if launched > options.warn_operations:
        what = f"{launched:.1f} operations are launched per added token: a loop over tokens is slow; work in chunks"
        return [outcome, warned(NAME, what, {"table": _table(rows)})]
    return [outcome]


def _rows(
    context: Context,
    *,
    train: bool,
    lengths: tuple[int, ...],
    grad: bool = True,
    layer: int = 0,
    backward: bool = False,
) -> tuple[list[dict[str, Any]], bool]:
    """The counts by length, and whether lengths are missing because those before them took too long."""
    options = context.options
    meta = {
        "spec": context.spec(90, dtype=context.dtype, train=train, given={"layer_idx": layer}),
        "grad": grad,
        "backward": backward,
        "width": options.width,
        "lengths": lengths,
        "operations": MOST_OPERATIONS,
        "saved": MOST_SAVED,
        "seconds": options.call_seconds * 2 / 3,
    }
    reply = context.worker.call("count", meta)[0]
    return reply["rows"], bool(reply["late"])


def _too_steep(
    context: Context, rows: list[dict[str, Any]], exponents: dict[str, float], mode: str
) -> CheckOutcome | None:
    limit = context.options.exponent
    for kind, exponent in exponents.items():
        if not exponent <= limit:  # nor is it a number that a forged count makes
            what = f"{_KINDS[kind]} grow as length^{exponent:.2f} in {mode}, more than length^{limit:g}"
            return _refuse(context, what, rows)
    return None


def _facts(context: Context, rows: list[dict[str, Any]]) -> None:
    """FLOPs a token at the profile's sizes: matmuls, and one for each element that another operation produces."""
    options = context.options
    same = (options.profile_width, options.profile_heads) == (options.width, options.heads)
    known = [row for row in rows if same and row["length"] == options.profile_length]
    if not known:
        size = {"hidden_size": options.profile_width, "num_heads": options.profile_heads}
        spec = context.spec(90, dtype=context.dtype, train=True, given=size)
        lengths = [options.profile_length]
        reply, _ = context.worker.call("count", {"spec": spec, "width": options.profile_width, "lengths": lengths})
        known = reply["rows"]
    context.facts["flops_per_token"] = (known[0]["flops"] + known[0]["elements"]) / options.profile_length


def _too_slow(context: Context, rows: list[dict[str, Any]], mode: str) -> CheckOutcome:
    """What was not counted is not known to be linear."""
    context.slow = True
    last = rows[-1]
    what = f"{last['length']} tokens took {last['seconds']:.1f} s in {mode}, so longer inputs were not counted"
    return _refuse(context, what, rows)


def _exponent(rows: list[dict[str, Any]], kind: str) -> float:
    """The largest of the exponent fitted over all lengths and those of each doubling. A kind that is nowhere a
    hundredth of the work (a few FLOPs in a program of element work) cannot matter."""
    amounts = np.array([float(max(1, row[kind])) for row in rows])
    if kind.endswith("flops"):
        amounts += 0.01 * np.array([float(row["elements"]) for row in rows])
    lengths, logs = np.log([row["length"] for row in rows]), np.log(amounts)
    fitted = float(np.polyfit(lengths, logs, 1)[0])
    return max(fitted, float((np.diff(logs) / np.diff(lengths)).max()))


def _table(rows: list[dict[str, Any]]) -> list[dict[str, int]]:
    keys = ("length", "operations", *_KINDS)
    return [{key: int(row[key]) for key in keys if key in row} for row in rows]


def _refuse(context: Context, what: str, rows: list[dict[str, Any]]) -> CheckOutcome:
    if context.program.reference:
        return warned(NAME, f"{what} (a reference program, outside the search)", {"table": _table(rows)})
    return failed(NAME, what, {"table": _table(rows)})
