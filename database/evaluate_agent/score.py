"""Fitness of one element: sigma(loss gain) + sigma(benchmark gain) + judge, 0 to 3 (arXiv 2507.18074, section on
fitness).

Everything here is a pure function of the stored evidence and a baseline, so a score can be recomputed at any time.
A term that cannot be computed makes the score None: missing is never good.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, FiniteFloat, model_validator

from common.records import Baseline, Measurement, RunRecord
from common.result_table import Table, benchmark_mean, finite_number, is_accuracy, parse_table
from database.evaluate_agent.rubric import Judgement, Novelty, judge
from database.evaluate_agent.verdict import Verdict, basis_of, judgement_of

__all__ = [
    "PUBLISHED",
    "SCORE_VERSION",
    "Evaluation",
    "Evidence",
    "Table",
    "baseline_of",
    "basis",
    "benchmark_mean",
    "evaluate",
    "evidence_of",
    "is_accuracy",
    "last_loss",
    "parse_table",
    "sigma_term",
]

SCORE_VERSION = 4
_STEEPNESS = 6.0

PUBLISHED = Baseline(
    key="published-20m",
    profile="20m",
    seeds=[],
    loss=4.575,
    loss_sd=None,
    benchmark=0.224,
    benchmark_sd=0.0048,
    tasks=[
        "arc_challenge", "arc_easy", "boolq", "fda", "hellaswag", "lambada_openai", "openbookqa", "piqa", "social_iqa",
        "squad_completion", "swde", "winogrande",
    ],
)  # fmt: skip
"""DeltaNet at 20M parameters as published; the benchmark SD is the standard error of its 12-task mean at 500 samples
a task."""


class Evidence(BaseModel):
    """What is known of an element, before any judgement."""

    source: Literal["run", "result"]
    """Whether the numbers come from a run record, or were read from the element's CSV texts."""
    baseline_key: str | None = None
    anchor: bool = False
    """It is the standard itself (the first root), which the judge's scale is anchored to."""
    loss: Measurement | None = None
    benchmark: Measurement | None = None
    flops_per_token: FiniteFloat | None = None
    work_exponent: FiniteFloat | None = None
    novelty: Novelty | None = None
    verdict: Verdict | None = None
    """What a language model said of it, where one is asked."""
    missing: list[str] = []
    """Why a number is not there."""

    @model_validator(mode="after")
    def _without_spread_of_tasks(self) -> Evidence:
        """An earlier release took the spread between the tasks of a CSV for a standard error of their mean."""
        if self.source == "result" and self.benchmark is not None and self.benchmark.se is not None:
            self.benchmark = self.benchmark.model_copy(update={"se": None})
        return self


class Evaluation(BaseModel):
    """A score and how it came about."""

    version: int = SCORE_VERSION
    revision: int | None = None
    """Which state of the rules and of the baseline it was computed from, see `database.scores`."""
    score: float | None = None
    loss_term: float | None = None
    benchmark_term: float | None = None
    judge: float | None = None
    judgement: Judgement | None = None
    source: Literal["run", "result"]
    baseline_key: str | None = None
    loss_clip: float | None = None
    benchmark_clip: float | None = None
    missing: list[str] = []


def last_loss(text: str) -> Measurement | None:
    """The last cell of the train row, when it is a number above zero, as every cross-entropy is."""
    table = parse_table(text)
    if not table.cells or len(table.cells) != len(table.columns):
        return None
    value = finite_number(table.cells[-1])
    return None if value is None or value <= 0 else Measurement(value=value, n=1)


def evidence_of(train: str, test: str, run: RunRecord | None) -> Evidence:
    """The evidence of an element: from its run record, or, without one, from its CSV texts."""
    if run is not None:
        missing = []
        if run.loss is None:
            missing.append("the run has no held-out loss")
        if run.benchmark_mean is None:
            missing.append("the run has no benchmark mean")
        return Evidence(
            source="run",
            baseline_key=run.baseline_key,
            loss=run.loss,
            benchmark=run.benchmark_mean,
            flops_per_token=run.flops_per_token,
            work_exponent=run.work_exponent,
            missing=missing,
        )
    loss = last_loss(train)
    benchmark, missing = benchmark_mean(test)
    if loss is None:
        missing = ["the last cell of the train row is no loss above zero", *missing]
    return Evidence(source="result", loss=loss, benchmark=benchmark, missing=missing)


def baseline_of(evidence: Evidence, stored: Baseline | None) -> Baseline | None:
    """What the element is compared with: the baseline stored under its key, or the published constants without a
    run."""
    return PUBLISHED if evidence.source == "result" else stored


def sigma_term(gain: float, base: float, clip: float) -> float | None:
    """1 / (1 + exp(-6 x)) with x = gain / (clip * base) cut to [-1, 1]; None where the baseline is not above zero."""
    width = clip * base
    if not width > 0:
        return None
    x = max(-1.0, min(1.0, gain / width))
    return 1.0 / (1.0 + math.exp(-_STEEPNESS * x))


def evaluate(evidence: Evidence, stored: Baseline | None, model: str | None = None) -> Evaluation:
    """Scores an element.

    Args:
        stored: the baseline under the element's key; None when there is none.
        model: the language model whose verdict counts; None for the rubric.
    """
    baseline = baseline_of(evidence, stored)
    missing = list(evidence.missing)
    if baseline is None:
        missing.append(f"no baseline is stored under {evidence.baseline_key!r}")
        return Evaluation(source=evidence.source, baseline_key=evidence.baseline_key, missing=missing)
    loss_term = benchmark_term = None
    # An earlier release took any number of an element's CSV for its loss.
    if evidence.loss is not None and evidence.loss.value > 0:
        loss_term = sigma_term(baseline.loss - evidence.loss.value, baseline.loss, baseline.loss_clip)
    elif evidence.loss is not None:
        missing.append(f"the loss is {evidence.loss.value:g}: expected one above zero")
    if evidence.benchmark is not None and baseline.benchmark is not None:
        gain = evidence.benchmark.value - baseline.benchmark
        benchmark_term = sigma_term(gain, baseline.benchmark, baseline.benchmark_clip)
    if evidence.benchmark is not None and benchmark_term is None:
        missing.append("the baseline has no benchmark mean above zero")
    judgement = _judgement(evidence, baseline, model)
    if judgement is None:
        missing.append(_why_unjudged(evidence, model))
    worth = None if judgement is None else (judgement.weighted_final_score - 1) / 9
    terms = (loss_term, benchmark_term, worth)
    score = None if any(term is None for term in terms) else math.fsum(term for term in terms if term is not None)
    return Evaluation(
        score=score,
        loss_term=loss_term,
        benchmark_term=benchmark_term,
        judge=worth,
        judgement=judgement,
        source=evidence.source,
        baseline_key=baseline.key,
        loss_clip=baseline.loss_clip,
        benchmark_clip=baseline.benchmark_clip,
        missing=missing,
    )


def _judgement(evidence: Evidence, baseline: Baseline, model: str | None) -> Judgement | None:
    if model is None or evidence.anchor:
        return judge(
            loss=evidence.loss,
            benchmark=evidence.benchmark,
            flops_per_token=evidence.flops_per_token,
            work_exponent=evidence.work_exponent,
            novelty=evidence.novelty,
            anchor=evidence.anchor,
            baseline=baseline,
        )
    verdict = evidence.verdict
    return judgement_of(verdict) if verdict is not None and verdict.basis == basis(evidence, baseline, model) else None


def basis(evidence: Evidence, baseline: Baseline, model: str) -> str:
    """Names the numbers of an element that a verdict of `model` is about."""
    return basis_of(
        model, evidence.loss, evidence.benchmark, evidence.flops_per_token, evidence.work_exponent, baseline
    )


def _why_unjudged(evidence: Evidence, model: str | None) -> str:
    if evidence.novelty is None:
        return "not judged yet: its motivation could not be embedded"
    return "not judged" if model is None else f"not judged yet by {model}"
