"""The deterministic judge: the published rubric (performance 30 %, innovation 25 %, complexity 45 %), read off
measured facts.

No model is asked. The same facts give the same integers, and each part says how it was obtained.

The scale is anchored at DeltaNet, which is 5 overall by definition. The bands give a copy of it performance 5 (it is
the baseline), innovation 1 (nothing new) and complexity 8 (linear, its own work), 5.35 in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, FiniteFloat

from common.records import Baseline, Measurement
from common.t_quantile import t95

__all__ = ["ANCHOR", "RUBRIC", "WEIGHTS", "Judgement", "Novelty", "Part", "judge", "weighted"]

ANCHOR = 5
RUBRIC = "rubric"
WEIGHTS = {"performance": 0.30, "innovation": 0.25, "complexity": 0.45}
_NORMAL_DOF = 10**6

# Relative change against the baseline at which the next integer starts, from the published bands; where a band holds
# two integers it is cut in half.
_PERFORMANCE = [(-0.10, 1), (-0.05, 2), (-0.03, 3), (-0.01, 4), (0.01, 5), (0.03, 6), (0.07, 7), (0.15, 8), (0.25, 9)]
# Mean distance (0 = a copy, 1 = nothing in common) to the nearest earlier motivation and program.
_INNOVATION = [(0.02, 1), (0.05, 2), (0.10, 3), (0.17, 4), (0.25, 5), (0.33, 6), (0.42, 7), (0.52, 8), (0.65, 9)]
# Local exponent of counted work against length: 1 is linear, n log n shows as about 1.1, quadratic as 2.
_EXPONENT = [(1.08, None), (1.15, 5), (1.30, 4), (1.50, 3), (1.80, 2)]
# Counted FLOPs a token against the baseline's, for linear work.
_WORK = [(0.85, 10), (0.97, 9), (1.10, 8), (1.50, 7), (4.00, 6)]


class Novelty(BaseModel):
    """Distance to the nearest EARLIER element, in [0, 1]; None where there is no earlier one."""

    motivation: FiniteFloat | None = None
    motivation_index: int | None = None
    program: FiniteFloat | None = None
    program_index: int | None = None


class Part(BaseModel):
    score: int
    how: str


class Judgement(BaseModel):
    """The published Model Judger's answer; `weighted_final_score` is recomputed from the integers."""

    performance_score: int
    innovation_score: int
    complexity_score: int
    weighted_final_score: float
    judgement_reason: str
    judged_by: str = RUBRIC
    """This rubric, or the name of the language model that was asked."""
    parts: dict[str, Part]


def judge(
    *,
    loss: Measurement | None,
    benchmark: Measurement | None,
    flops_per_token: float | None,
    work_exponent: float | None,
    novelty: Novelty | None,
    anchor: bool,
    baseline: Baseline,
) -> Judgement | None:
    """Judges one element; None when its performance or its novelty is not known."""
    if anchor:
        how = "it is the standard that the scale is anchored to"
        parts = {name: Part(score=ANCHOR, how=how) for name in WEIGHTS}
    else:
        performance = _performance(loss, benchmark, baseline)
        if performance is None or novelty is None:
            return None
        parts = {
            "performance": performance,
            "innovation": _innovation(novelty),
            "complexity": _complexity(flops_per_token, work_exponent, baseline),
        }
    reasons = [f"{name} {part.score}: {part.how}" for name, part in parts.items()]
    return Judgement(
        performance_score=parts["performance"].score,
        innovation_score=parts["innovation"].score,
        complexity_score=parts["complexity"].score,
        weighted_final_score=weighted({name: part.score for name, part in parts.items()}),
        judgement_reason="; ".join(reasons),
        parts=parts,
    )


def weighted(scores: Mapping[str, int]) -> float:
    """The published weighted value of three integers from 1 to 10."""
    return round(math.fsum(WEIGHTS[name] * scores[name] for name in WEIGHTS), 10)


def _performance(loss: Measurement | None, benchmark: Measurement | None, baseline: Baseline) -> Part | None:
    found: list[tuple[int, str]] = []
    if loss is not None and baseline.loss > 0:
        margin = _margin(loss, baseline.loss_sd, baseline)
        found.append(_compared("loss", baseline.loss - loss.value, baseline.loss, loss.value, margin))
    if benchmark is not None and baseline.benchmark is not None and baseline.benchmark > 0:
        margin = _margin(benchmark, baseline.benchmark_sd, baseline)
        gain = benchmark.value - baseline.benchmark
        found.append(_compared("benchmark mean", gain, baseline.benchmark, benchmark.value, margin))
    if not found:
        return None
    mean = sum(score for score, _ in found) / len(found)
    # A half point is not shown: it goes towards the anchor.
    score = math.floor(mean) if mean > ANCHOR else math.ceil(mean)
    return Part(score=score, how=", ".join(how for _, how in found))


def _compared(what: str, gain: float, base: float, value: float, margin: float | None) -> tuple[int, str]:
    relative = gain / base
    score = _band(relative, _PERFORMANCE)
    said = f"{what} {value:.4g} against {base:.4g} ({100 * relative:+.1f} % gain"
    if margin is None:
        return score, said + ", spread unknown)"
    if abs(gain) <= margin and score != ANCHOR:
        return ANCHOR, said + f", within the 95 % margin of {margin:.2g}: no difference shown)"
    return score, said + f", 95 % margin {margin:.2g})"


def _margin(measured: Measurement, sd: float | None, baseline: Baseline) -> float | None:
    """How far candidate minus baseline goes by chance, in 95 of 100 cases; None when no spread is known.

    The items are the same for both, so the spread between training seeds decides where it was measured: one new run
    against the mean of n, SD sqrt(1 + 1/n), times Student's t with the SD's degrees of freedom, as an SD of a few seeds
    is uncertain itself. A spread that is not of seeds is of hundreds of items, once for each side: the normal quantile.
    The benchmark mean of a CSV has none (its tasks are not drawn): that of the baseline counts, which the published
    constants have; without either the bands are taken as they are.
    """
    if sd is not None and baseline.sd_dof:
        return t95(baseline.sd_dof) * sd * math.sqrt(1 + 1 / len(baseline.seeds))
    spread = sd if sd is not None else measured.se
    return None if spread is None else t95(_NORMAL_DOF) * spread * math.sqrt(2)


def _innovation(novelty: Novelty) -> Part:
    distances = [distance for distance in (novelty.motivation, novelty.program) if distance is not None]
    if not distances:
        return Part(score=ANCHOR, how="nothing earlier is stored to compare with")
    said = []
    if novelty.motivation is not None:
        said.append(f"{novelty.motivation:.2f} from the motivation of element {novelty.motivation_index} (1 - cosine)")
    if novelty.program is not None:
        said.append(f"{novelty.program:.2f} from the program of element {novelty.program_index} (1 - shared shingles)")
    mean = sum(distances) / len(distances)
    return Part(score=_band(mean, _INNOVATION), how=f"distance {' and '.join(said)}")


def _complexity(flops: float | None, exponent: float | None, baseline: Baseline) -> Part:
    if exponent is None:
        return Part(score=8, how="its work was not counted: taken as that of the standard")
    grows = f"counted work grows as length^{exponent:.2f}"
    for upper, score in _EXPONENT:
        if exponent < upper:
            if score is not None:
                return Part(score=score, how=grows)
            break
    else:
        return Part(score=1, how=grows)
    if flops is None or not baseline.flops_per_token:
        return Part(score=7, how=f"{grows}; FLOPs a token not compared")
    ratio = flops / baseline.flops_per_token
    score = next((score for upper, score in _WORK if ratio <= upper), 3)
    return Part(score=score or 3, how=f"{grows}, {ratio:.2f} x the baseline's FLOPs a token")


def _band(value: float, bands: Sequence[tuple[float, int]]) -> int:
    return next((score for upper, score in bands if value < upper), 10)
