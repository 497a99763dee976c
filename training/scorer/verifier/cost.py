"""Cost: work and memory grow no faster than length^1.15, and few operations are launched per token. Counted, not timed.

Refuses: matmul FLOPs, elements produced, or bytes kept for the backward pass growing faster from 256 to 2048 tokens,
or from 1024 to 2048 (a small quadratic term shows at the long end first); more operations per added token than the
setting. Warns: more than 4 of them (a loop over chunks launches 1-2, a Python loop over tokens 5-30). 1.15 lets n log
n pass (1.1 over this range) and stops anything with n^2 that matters at these lengths. How: a dispatch mode inside
the worker counts; the exponents are fitted here. The table of length against work is the counterexample. For a
reference program (outside the search) every refusal is a warning. Cannot see: work in kernels that torch does not
dispatch; a quadratic term that is still under about a tenth of the work at 2048 tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, failed, passed, warned

__all__ = ["LENGTHS", "NAME", "run"]

NAME = "cost"
LENGTHS = (256, 512, 1024, 2048)
_KINDS = {"flops": "matmul FLOPs", "elements": "elements produced", "saved": "bytes kept for the backward pass"}


def run(context: Context) -> list[CheckOutcome]:
    """Sets facts.work_exponent, memory_exponent, ops_per_token and flops_per_token."""
    options = context.options
    spec = context.spec(90, dtype=context.dtype, train=True)
    reply, _ = context.worker.call(
        "count", {"spec": spec, "width": options.width, "lengths": LENGTHS, "seconds": options.seconds / 6}
    )
    rows = reply["rows"]
    _facts(context, rows)
    if len(rows) < 2:
        context.slow = True
        return [_refuse(context, f"one forward pass over {LENGTHS[0]} tokens took {rows[0]['seconds']:.1f} s", rows)]
    exponents = {kind: _exponent(rows, kind) for kind in _KINDS}
    work = max(exponents["flops"], exponents["elements"])
    context.facts["work_exponent"], context.facts["memory_exponent"] = round(work, 4), round(exponents["saved"], 4)
    span = rows[-1]["length"] - rows[-2]["length"]
    launched = max(0.0, (rows[-1]["operations"] - rows[-2]["operations"]) / span)
    context.facts["ops_per_token"] = round(launched, 3)
    for kind, name in _KINDS.items():
        if exponents[kind] > options.exponent:
            what = f"{name} grow as length^{exponents[kind]:.2f}, more than length^{options.exponent:g}"
            return [_refuse(context, what, rows)]
    if launched > options.refuse_operations:
        context.slow = True
        what = f"{launched:.0f} operations are launched per added token, more than {options.refuse_operations:g}"
        return [_refuse(context, what, rows)]
    outcome = passed(NAME, f"work grows as length^{work:.2f}; {launched:.2g} operations per added token")
    if launched > options.warn_operations:
        what = f"{launched:.1f} operations are launched per added token: a loop over tokens is slow; work in chunks"
        return [outcome, warned(NAME, what, {"table": _table(rows)})]
    return [outcome]


def _facts(context: Context, rows: list[dict[str, Any]]) -> None:
    """FLOPs a token at the profile's sizes: matmuls, and one for each element that another operation produces."""
    options = context.options
    same = (options.profile_width, options.profile_heads) == (options.width, options.heads)
    known = [row for row in rows if same and row["length"] == options.profile_length]
    if not known:
        spec = context.spec(
            90, dtype=context.dtype, train=True, hidden_size=options.profile_width, num_heads=options.profile_heads
        )
        lengths = [options.profile_length]
        reply, _ = context.worker.call("count", {"spec": spec, "width": options.profile_width, "lengths": lengths})
        known = reply["rows"]
    context.facts["flops_per_token"] = (known[0]["flops"] + known[0]["elements"]) / options.profile_length


def _exponent(rows: list[dict[str, Any]], kind: str) -> float:
    """The larger of the exponent fitted over all lengths and that of the last doubling."""
    lengths = np.log([row["length"] for row in rows])
    amounts = np.log([max(1, row[kind]) for row in rows])
    fitted = float(np.polyfit(lengths, amounts, 1)[0])
    last = float((amounts[-1] - amounts[-2]) / (lengths[-1] - lengths[-2]))
    return max(fitted, last)


def _table(rows: list[dict[str, Any]]) -> list[dict[str, int]]:
    return [{key: int(row[key]) for key in ("length", "flops", "elements", "saved", "operations")} for row in rows]


def _refuse(context: Context, what: str, rows: list[dict[str, Any]]) -> CheckOutcome:
    if context.program.reference:
        return warned(NAME, f"{what} (a reference program, outside the search)", {"table": _table(rows)})
    return failed(NAME, what, {"table": _table(rows)})
