"""What a language model said of a design, and for which numbers: kept with the element's evidence.

The published weights are applied here: the model gives three integers, and its own weighted value is not asked for.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, Field

from common.files import sha256_text
from common.records import Baseline, Measurement
from database.evaluate_agent.rubric import Judgement, Part, weighted

__all__ = ["LONGEST_REASON", "Verdict", "basis_of", "judgement_of"]

LONGEST_REASON = 2_000


class Verdict(BaseModel):
    """Three integers from 1 to 10 and why. `basis` names the numbers that were judged: where they have changed, the
    verdict no longer holds."""

    model: str
    basis: str
    performance_score: int = Field(ge=1, le=10)
    innovation_score: int = Field(ge=1, le=10)
    complexity_score: int = Field(ge=1, le=10)
    reason: str = Field(max_length=LONGEST_REASON)


def basis_of(
    model: str,
    loss: Measurement | None,
    benchmark: Measurement | None,
    flops_per_token: float | None,
    work_exponent: float | None,
    baseline: Baseline,
) -> str:
    """SHA-256 of all numbers that a verdict of `model` is about."""
    parts = [
        model,
        None if loss is None else loss.model_dump(mode="json"),
        None if benchmark is None else benchmark.model_dump(mode="json"),
        flops_per_token,
        work_exponent,
        baseline.model_dump(mode="json"),
    ]
    return sha256_text(json.dumps(parts, sort_keys=True))


def judgement_of(verdict: Verdict) -> Judgement:
    scores = {
        "performance": verdict.performance_score,
        "innovation": verdict.innovation_score,
        "complexity": verdict.complexity_score,
    }
    return Judgement(
        performance_score=verdict.performance_score,
        innovation_score=verdict.innovation_score,
        complexity_score=verdict.complexity_score,
        weighted_final_score=weighted(scores),
        judgement_reason=verdict.reason,
        judged_by=verdict.model,
        parts={name: Part(score=score, how=f"judged by {verdict.model}") for name, score in scores.items()},
    )
