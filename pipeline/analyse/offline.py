"""Analyse without an LLM: every sentence is computed from the measured numbers, with their uncertainty.

A difference of losses is called what pipeline/verdict.py calls it: better or worse only beyond the 95 % band, within
training noise up to 2 seed SD. The results section names the symptoms (which task lags, where the curve bends) in the
words in which the cognition base describes them, since that section is the query to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.records import Baseline, BenchmarkScore, RunRecord
from pipeline.agents.roles import Analysis, AnalysisSubject, Kin
from pipeline.designer import MECHANISMS
from pipeline.verdict import Difference, against_baseline, between_runs

__all__ = ["OfflineAnalyzer", "OfflineSummarizer"]

SYMPTOMS = {
    "recall": "associative recall: pairs stored earlier are not found again by their key",
    "copying": "selective copying: marked tokens are lost among the noise between them",
    "induction": "induction: the token that followed an earlier occurrence is not repeated",
    "cloze": "cloze on held-out text: the true word is not preferred to words of the same passage",
}
"""What it means when a task is weak, by the name it has in the benchmark tables."""


@dataclass(frozen=True)
class OfflineAnalyzer:
    def analyse(self, subject: AnalysisSubject) -> Analysis:
        return Analysis(
            design_evaluation=_design(subject),
            experimental_results_analysis=_results(subject),
            expectation_vs_reality_comparison=_expectation(subject),
            theoretical_explanation_with_evidence=_explanation(subject),
            synthesis_and_insights=_synthesis(subject),
        )


@dataclass(frozen=True)
class OfflineSummarizer:
    def summarise(self, motivation: str, analysis: str, cognition: str) -> str:
        """The first sentence of the motivation, the verdict of the analysis, and the papers it led to."""
        papers = re.findall(r'"paper_key": "([^"]+)"', cognition)
        parts = [_first_sentences(motivation, 1), _section(analysis, "Synthesis", 3)]
        if papers:
            parts.append(f"The results point to {', '.join(dict.fromkeys(papers))}.")
        return " ".join(part for part in parts if part)


def _design(subject: AnalysisSubject) -> str:
    run, baseline, proposal = subject.run, subject.baseline, subject.proposal
    origin = (
        f"made from {subject.parent.element.name} by {proposal.operator}" if subject.parent else "a root of the search"
    )
    parts = [f"{proposal.name} is {origin}; changed: {proposal.change or 'nothing'}."]
    if run.parameters is not None and run.mixer_parameters is not None:
        parts.append(
            f"The model has {run.parameters:,} parameters at feed-forward width {run.ffn_width}, of which its mixers "
            f"take {run.mixer_parameters:,}: sizes are equal within 0.5 %, so what the mixers add the feed-forward "
            f"layers give up."
        )
    if run.flops_per_token is not None and baseline.flops_per_token:
        ratio = run.flops_per_token / baseline.flops_per_token
        parts.append(
            f"Counted work of one mixer is {run.flops_per_token:,.0f} FLOPs a token, {ratio:.2f} times the baseline's."
        )
    if run.work_exponent is not None:
        parts.append(f"Work grows with length as L^{run.work_exponent:.2f}.")
    if run.tokens_per_second is not None:
        parts.append(f"It trained at {run.tokens_per_second:,.0f} tokens/s on {run.device or 'this device'}.")
    return " ".join(parts)


def _results(subject: AnalysisSubject) -> str:
    run, baseline = subject.run, subject.baseline
    parts = [_against(run, baseline, "loss", run.loss_name.capitalize(), "nats a token")]
    parts.append(_against(run, baseline, "benchmark", "Benchmark mean", "accuracy"))
    if subject.parent is not None and subject.parent.run is not None:
        difference = between_runs(run, subject.parent.run, baseline)
        if difference is not None:
            parts.append(f"Against its parent {subject.parent.element.name} the loss is {_words(difference, 'nats')}.")
    parts += _moved(subject)
    parts += _weak(run)
    parts.append(_curve(run))
    return " ".join(part for part in parts if part)


def _against(run: RunRecord, baseline: Baseline, quantity: str, title: str, unit: str) -> str:
    measured = run.loss if quantity == "loss" else run.benchmark_mean
    mean = baseline.loss if quantity == "loss" else baseline.benchmark
    difference = against_baseline(run, baseline, quantity)
    if measured is None:
        return f"{title} was not measured."
    if difference is None or mean is None:
        return f"{title} is {measured.value:.4f} {unit} (n = {measured.n}); the baseline has none."
    error = f" +- {measured.se:.4f}" if measured.se is not None else ""
    return (
        f"{title} is {measured.value:.4f}{error} {unit} (n = {measured.n}) against {mean:.4f} of "
        f"{baseline.program} over "
        f"{len(baseline.seeds)} seeds: {_words(difference, unit)}."
    )


def _words(difference: Difference, unit: str) -> str:
    """A difference in the words of the verdict, with its standard error."""
    size = f"{abs(difference.value):.4f} {unit}"
    if difference.se is None or difference.sds is None:
        return f"{difference.word} by {size}, with no seed spread to judge it by"
    spread = f"standard error {difference.se:.4f}, 95 % band +-{difference.band:.4f}"
    if difference.word == "tie":
        return f"within training noise ({difference.value:+.4f} {unit}, {spread})"
    return f"{difference.word} by {size} ({abs(difference.sds):.1f} seed SD; {spread})"


def _moved(subject: AnalysisSubject) -> list[str]:
    """Benchmarks that differ from the parent's by more than two standard errors of the items."""
    parent = subject.parent.run if subject.parent is not None else None
    if parent is None:
        return []
    moved, still = [], []
    for task, score in subject.run.benchmarks.items():
        other = parent.benchmarks.get(task)
        if other is None or score.se is None or other.se is None or parent.baseline_key != subject.run.baseline_key:
            continue
        change, se = score.value - other.value, (score.se**2 + other.se**2) ** 0.5
        text = f"{task} {other.value:.3f} -> {score.value:.3f}"
        if abs(change) > 2 * se:
            moved.append(f"{text} ({change:+.3f}, standard error {se:.3f})")
        else:
            still.append(text)
    sentences = (
        [f"Moved against the parent beyond item noise (training noise comes on top): {'; '.join(moved)}."]
        if moved
        else []
    )
    return sentences + ([f"Not beyond item noise: {'; '.join(still)}."] if still else [])


def _weak(run: RunRecord) -> list[str]:
    """The tasks nearest to chance, as the symptoms under which papers are filed."""
    named = [
        f"{SYMPTOMS.get(task, task)} ({score.value:.3f}, chance {score.chance:.3f})" for task, score in _weakest(run)
    ]
    return [f"Weak where it counts most: {'; '.join(named[:3])}."] if named else []


def _weakest(run: RunRecord) -> list[tuple[str, BenchmarkScore]]:
    """Tasks on less than half the way from chance to perfect, worst first."""
    known = [(task, score) for task, score in run.benchmarks.items() if score.chance is not None]
    return sorted((item for item in known if _headroom(item[1]) < 0.5), key=lambda item: _headroom(item[1]))


def _headroom(score: BenchmarkScore) -> float:
    """Share of the way from chance (0) to perfect (1)."""
    assert score.chance is not None
    return (score.value - score.chance) / (1 - score.chance) if score.chance < 1 else 1.0


def _curve(run: RunRecord) -> str:
    points = [(int(step), loss) for step, loss in run.train_loss.items()]
    if len(points) < 4:
        return ""
    points.sort()
    quarter = max(1, len(points) // 4)
    early, late = points[quarter - 1][1] - points[2 * quarter - 1][1], points[-quarter - 1][1] - points[-1][1]
    shape = "has levelled off early: a loss plateau" if late < 0.15 * early else "is still falling at the end"
    return f"Training loss fell {early:.3f} nats in its second quarter and {late:.3f} in its last: the curve {shape}."


def _expectation(subject: AnalysisSubject) -> str:
    difference = against_baseline(subject.run, subject.baseline)
    if subject.parent is None:
        return f"{subject.proposal.name} is a root: it sets the scale and expects nothing."
    expected = _first_sentences(_after(subject.proposal.motivation, r"\bexpect"), 1) or _first_sentences(
        subject.proposal.motivation, 1
    )
    parent_run = subject.parent.run
    seen = between_runs(subject.run, parent_run, subject.baseline) if parent_run is not None else difference
    expected = re.sub(r"^expected:\s*", "", expected, flags=re.IGNORECASE)
    if seen is None:
        return f"Expected: {expected} There is no loss of the parent, measured alike, that could confirm or refute it."
    if seen.word in ("better", "worse"):
        outcome = f"{'confirmed' if seen.word == 'better' else 'refuted'} on loss: {_words(seen, 'nats')}"
    else:
        outcome = f"neither confirmed nor refuted, as one seed cannot resolve it: the loss is {_words(seen, 'nats')}"
    return f"Expected: {expected} This is {outcome}."


def _explanation(subject: AnalysisSubject) -> str:
    reasons = [f"{name}: {MECHANISMS[name].why}" for name in subject.proposal.mechanisms if name in MECHANISMS]
    shown = (
        f"The design stands on {'; '.join(reasons[:4])}."
        if reasons
        else "The program names no mechanism of the grammar."
    )
    evidence = [line for kin, title in _relatives(subject) if (line := _evidence(subject, kin, title))]
    if not evidence:
        return f"{shown} No relative with measured results exists yet, so there is no ablation to read."
    return f"{shown} Its relatives act as ablations: {' '.join(evidence)}"


def _relatives(subject: AnalysisSubject) -> list[tuple[Kin, str]]:
    kin = [(subject.parent, "parent"), (subject.grandparent, "grandparent")] + [
        (sibling, "sibling") for sibling in subject.siblings
    ]
    return [(relative, title) for relative, title in kin if relative is not None]


def _evidence(subject: AnalysisSubject, kin: Kin, title: str) -> str:
    if kin.run is None or kin.run.loss is None:
        return ""
    mine = set(subject.proposal.mechanisms)
    theirs = set((kin.run.design or {}).get("mechanisms", []))
    only_here, only_there = sorted(mine - theirs), sorted(theirs - mine)
    contrast = f"without {', '.join(only_here) or 'nothing of this one'}" + (
        f" but with {', '.join(only_there)}" if only_there else ""
    )
    difference = between_runs(subject.run, kin.run, subject.baseline)
    told = f"; this design is {_words(difference, 'nats')}" if difference is not None else ""
    return f"{title} {kin.element.name} ({contrast}) reached {kin.run.loss.value:.4f}{told}."


def _synthesis(subject: AnalysisSubject) -> str:
    run, baseline = subject.run, subject.baseline
    change = subject.proposal.change or subject.proposal.name
    difference = against_baseline(run, baseline)
    if difference is None or difference.sds is None:
        return f"'{change}' has no comparable loss; measure it with more seeds before building on it."
    ratio = run.flops_per_token / baseline.flops_per_token if run.flops_per_token and baseline.flops_per_token else None
    cost = f" at {ratio:.2f} times the baseline's counted work" if ratio is not None else ""
    if difference.word == "tie":
        cheaper = ratio is not None and ratio < 0.95
        told = f"is a tie with {baseline.program} ({difference.sds:+.1f} seed SD){cost}: " + (
            "keep it, it is cheaper" if cheaper else "no reason yet to prefer it"
        )
    else:
        advice = {
            "better": "keep it and repeat it with more seeds",
            "perhaps better": "repeat it with more seeds before building on it",
            "perhaps worse": "build on it only if more seeds say otherwise",
            "worse": "do not build on it",
        }
        size = f"{abs(difference.value):.4f} nats ({difference.sds:+.1f} seed SD)"
        told = f"is {difference.word} than {baseline.program} by {size}{cost}: {advice[difference.word]}"
    weak = _weakest(run)
    ask = f" The next design should address {weak[0][0]} first." if weak else ""
    return f"'{change}' {told}.{ask}"


def _first_sentences(text: str, count: int) -> str:
    return " ".join(re.split(r"(?<=[.!?])\s+", " ".join(text.split()))[:count])


def _after(text: str, pattern: str) -> str:
    """`text` from the sentence that matches `pattern`, "" when none does."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    for position, sentence in enumerate(sentences):
        if re.search(pattern, sentence, re.IGNORECASE):
            return " ".join(sentences[position:])
    return ""


def _section(analysis: str, title: str, sentences: int) -> str:
    _, found, rest = analysis.partition(f"## {title}")
    return _first_sentences(rest.split("\n## ")[0].partition("\n")[2], sentences) if found else ""
