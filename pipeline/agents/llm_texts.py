"""The data of an experiment as text for a prompt: results as tables, failures with their counterexamples, relatives.

Everything that came from a model or a program goes between fences and is cut to a length; nothing is formatted into a
template more than once.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence

from common.prompts import clip as clipped
from common.records import Baseline, CheckOutcome, Measurement, RunRecord
from pipeline.agents.roles import AnalysisSubject, Kin, Paper, Relative
from pipeline.measured import seeds_of
from pipeline.prompts import fenced

__all__ = [
    "clip",
    "failures",
    "insights",
    "kin",
    "losses",
    "measurements",
    "neighbours",
    "program",
    "references",
    "table",
    "tail",
    "text",
]

NOTHING = "none"
LONGEST_TEXT = 6_000
"""Characters of one motivation, experience or excerpt that a prompt shows."""


def clip(content: str, length: int = LONGEST_TEXT) -> str:
    """The start of `content`, marked where it was cut."""
    return clipped(content, length)


def tail(content: str, length: int = LONGEST_TEXT) -> str:
    """The end of `content`, marked where it was cut."""
    content = content.strip()
    return content if len(content) <= length else f"[{len(content) - length} characters before]\n" + content[-length:]


def text(content: str, length: int = LONGEST_TEXT) -> str:
    """Prose of an earlier answer as a fenced block."""
    return fenced(clip(content, length)) if content.strip() else NOTHING


def program(content: str) -> str:
    """A whole program, never cut: what is shown is what may be rewritten."""
    return fenced(content, "python")


def table(content: str) -> str:
    """A CSV with a header and a row."""
    return fenced(clip(content), "csv") if content.strip() else NOTHING


def references(elements: Sequence[Relative], room: int) -> str:
    """Other designs with results and experience; with their programs too, while these fit into `room` characters."""
    blocks = []
    for element in elements:
        block = (
            f"## {element.name} (score {score(element)})\n\nMotivation:\n{text(element.motivation, 1_500)}\n\n"
            f"Training losses:\n{table(element.train_csv)}\n\nBenchmarks:\n{table(element.test_csv)}\n\n"
            f"What was learnt from it:\n{text(element.summary, 2_000)}"
        )
        full = f"{block}\n\nIts program:\n{program(element.program)}"
        chosen = full if len(full) <= room else f"{block}\n\n(Its program is left out to keep this text short.)"
        room -= len(chosen)
        blocks.append(chosen)
    return "\n\n".join(blocks) or NOTHING


def score(element: Relative) -> str:
    return "not scored" if element.score is None else f"{element.score:.4f}"


def insights(papers: Sequence[Paper]) -> str:
    return (
        "\n\n".join(
            f"## {paper.paper_key}\n\n{text(paper.insight, 2_500)}\n\nHow to build it:\n{text(paper.guidance, 2_500)}"
            for paper in papers
        )
        or NOTHING
    )


def neighbours(elements: Sequence[Relative]) -> str:
    """Earlier designs by index, with motivation and experience."""
    return (
        "\n\n".join(
            f"## Index {element.index}: {element.name}\n\n{text(element.motivation, 4_000)}"
            + (f"\n\nWhat was learnt from it:\n{text(element.summary, 1_000)}" if element.summary.strip() else "")
            for element in elements
        )
        or NOTHING
    )


def failures(checks: Sequence[CheckOutcome]) -> str:
    """Failed checks, each with its counterexample as JSON."""
    blocks = []
    for check in checks:
        block = f"## {check.name}\n\n{text(check.detail, 3_000)}"
        if check.counterexample:
            example = json.dumps(check.counterexample, ensure_ascii=False, default=str)
            block += f"\n\nCounterexample:\n{fenced(clip(example, 3_000), 'json')}"
        blocks.append(block)
    return "\n\n".join(blocks) or NOTHING


def kin(label: str, relative: Kin | None) -> str:
    """A relative with its motivation and experience, and its published rows where it has no run record."""
    if relative is None:
        return f"## {label}\n\n{NOTHING}"
    element = relative.element
    block = (
        f"## {label}: {element.name}\n\nMotivation:\n{text(element.motivation, 2_000)}\n\n"
        f"What was learnt from it:\n{text(element.summary, 2_000)}"
    )
    if relative.run is None:
        block += f"\n\nTraining losses:\n{table(element.train_csv)}\n\nBenchmarks:\n{table(element.test_csv)}"
    return block


def measurements(subject: AnalysisSubject) -> str:
    """The results of a run beside the baseline's and those relatives' that have a run record, as CSV."""
    runs = _runs(subject)
    rows: list[list[str]] = [["measure", "baseline (mean of its seeds)", *(label for label, _ in runs)]]
    base = subject.baseline

    def row(name: str, standard: str, value: Callable[[RunRecord], str]) -> None:
        rows.append([name, standard, *(value(run) for _, run in runs)])

    title = f"{subject.run.loss_name} (nats a token)"
    row(title, _seeds(base, base.loss, base.loss_sd), lambda run: _measured(run.loss))
    if base.benchmark is not None or any(run.benchmark_mean for _, run in runs):
        standard = "-" if base.benchmark is None else _seeds(base, base.benchmark, base.benchmark_sd)
        row("benchmark mean (accuracy)", standard, lambda run: _measured(run.benchmark_mean))
    for task in dict.fromkeys(task for _, run in runs for task in run.benchmarks):
        row(f"{task}{_note(task, runs)}", "-", lambda run, task=task: _measured(run.benchmarks.get(task)))  # type: ignore[misc]
    row("parameters of the model", _count(base.parameters), lambda run: _count(run.parameters))
    row("parameters of all mixers", "-", lambda run: _count(run.mixer_parameters))
    row("FLOPs a token of one mixer", _count(base.flops_per_token), lambda run: _count(run.flops_per_token))
    row("growth of work with length (exponent)", "-", lambda run: _plain(run.work_exponent))
    row("seed", " ".join(map(str, base.seeds)), lambda run: " ".join(map(str, seeds_of(run))))
    return fenced(_csv(rows), "csv")


def losses(runs: Sequence[tuple[str, RunRecord]]) -> str:
    """Mean training loss since the previous listed step, one row a run."""
    steps = sorted({step for _, run in runs for step in run.train_loss}, key=lambda step: (len(step), step))
    if not steps:
        return NOTHING
    rows = [["step", *steps]]
    rows += [[label, *(_plain(run.train_loss.get(step)) for step in steps)] for label, run in runs]
    return fenced(_csv(rows), "csv")


def loss_curves(subject: AnalysisSubject) -> str:
    return losses(_runs(subject))


def _runs(subject: AnalysisSubject) -> list[tuple[str, RunRecord]]:
    found = [("this design", subject.run)]
    if subject.parent and subject.parent.run:
        found.append((f"parent {subject.parent.element.name}", subject.parent.run))
    if subject.grandparent and subject.grandparent.run:
        found.append((f"grandparent {subject.grandparent.element.name}", subject.grandparent.run))
    found += [(f"sibling {sibling.element.name}", sibling.run) for sibling in subject.siblings if sibling.run]
    return found


def _note(task: str, runs: Sequence[tuple[str, RunRecord]]) -> str:
    scores = [run.benchmarks[task] for _, run in runs if task in run.benchmarks]
    chance = f", chance {scores[0].chance:.3g}" if scores[0].chance is not None else ""
    return f" (accuracy{chance}{'' if scores[0].counted else ', not in the mean'})"


def _measured(value: Measurement | None) -> str:
    if value is None:
        return "-"
    spread = "SE unknown" if value.se is None else f"SE {value.se:.2g}"
    return f"{value.value:.4f} ({spread}, n {value.n})"


def _seeds(baseline: Baseline, value: float, spread: float | None) -> str:
    known = "SD over seeds unknown" if spread is None else f"SD over seeds {spread:.2g}"
    return f"{value:.4f} ({known}, n {len(baseline.seeds)})"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _csv(rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
