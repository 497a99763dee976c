"""Fingerprint: a hash of the function that a program computes, whatever its names, order and text.

Every parameter is filled from a stream that only its trailing shape selects (sizes of 1 left out): row i takes row
i mod 4 of the stream. So neither names nor the order of registration matter, and one fused projection counts like
several, as long as the parts begin at multiples of four rows, as widths of heads and of whole projections do. The
mixer runs on fixed inputs (two rows of 80 tokens: two chunk edges of 32) in the highest precision in which it runs.
Hashed are: twelve random projections of the output relative to its root mean square, in steps of 0.01; the logarithm
of that root mean square in steps of 0.05; how many rows of each trailing shape there are; and the growth of its
counted work to the nearest half power. (The amount of work depends on how a function is written, so it is left out.)

Equal prints: functionally equal programs. The twelve values of a float64 program move by some 1e-12 when it is
written in another way, so about one pair of equals in 10^9 is split by the edge of a step; a program that computes in
float32 inside by some 1e-6 (one pair in 500), one that only runs in bfloat16 by 1e-2: there the print only finds
copies. Cannot see: differences that vanish when equal shapes hold equal values (which of two matrices of one shape
is used where), between rows four apart, or beyond 80 tokens and the default arguments; equality of programs whose
parameters have other shapes (a transposed matrix, a head dimension first), or that draw constants at random.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, passed

__all__ = ["NAME", "run"]

NAME = "fingerprint"
PERIOD, SEED, LENGTH = 4, 150, 80
PROJECTIONS, STEP, SCALE_STEP = 12, 0.01, 0.05


def run(context: Context) -> list[CheckOutcome]:
    """Sets facts.fingerprint: 32 hexadecimal digits, None where the output on such parameters is not finite,
    or so large that its square is not."""
    context.facts["fingerprint"] = None
    spec = {**context.spec(SEED), "fill": {"seed": SEED, "period": PERIOD}}
    x = context.inputs(SEED, 2, LENGTH)
    reply, outputs = context.worker.call("forward", {"spec": spec}, [x])
    if not reply["results"][0].get("ok") or outputs[0].shape != x.shape or not np.isfinite(outputs[0]).all():
        return [passed(NAME, "no print: on parameters filled by shape the output is not finite")]
    output = outputs[0].astype(np.float64)
    scale = float(np.sqrt(np.square(output).mean()))
    if not np.isfinite(scale):
        return [passed(NAME, "no print: on parameters filled by shape the output is too large")]
    values = [round(float(value) / STEP) for value in _projections(output / (scale or 1.0))]
    content = {
        "function": values,
        "scale": round(np.log(scale) / SCALE_STEP) if scale > 0 else None,
        "rows": sorted(_rows(context.shapes).items()),
        "work": round(2 * float(context.facts.get("work_exponent", 1.0))),
    }
    print_ = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    context.facts["fingerprint"] = print_
    return [passed(NAME, print_)]


def _projections(output: np.ndarray) -> np.ndarray:
    """Twelve sums of the output, of size about 1, over random signs; each over another part of the positions too, so
    that no mechanism is averaged away."""
    generator = np.random.default_rng(SEED + 1)
    signs = generator.choice((-1.0, 1.0), (PROJECTIONS, *output.shape))
    kept = generator.random((PROJECTIONS, 1, output.shape[1], 1)) < 0.5
    weights = signs * kept
    return np.tensordot(weights, output, axes=3) / np.sqrt(np.square(weights).sum(axis=(1, 2, 3)))


def _rows(shapes: list[list[int]]) -> Counter[str]:
    """Rows by trailing shape: [192, 1, 4] and [64, 4] three times are both 192 rows of 4."""
    found: Counter[str] = Counter()
    for rows, *trailing in (shape or [1] for shape in shapes):
        found["x".join(str(size) for size in trailing if size > 1)] += rows
    return found
