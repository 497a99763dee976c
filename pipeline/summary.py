"""The table at the end: what was designed, how it measured up, where the time went, and what to type next.

Everything is read from the journal and the baseline file, so it prints the same whether the experiments ran now or
last week.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from common.process import REPOSITORY
from common.records import Baseline, RunRecord
from common.t_quantile import t95
from common.text import printable
from pipeline.experiment import Experiment, journal
from pipeline.measured import Measured, load_baseline, seeds_of
from pipeline.verdict import against_baseline, verdict
from pipeline.workspace import read_timings
from training.baseline import tasks_with_signal
from training.command import WARNING

__all__ = ["Row", "load_rows", "print_summary"]


WIDE_ENOUGH = 120
"""Columns of a terminal in which every cell of the results table has room."""


@dataclass(frozen=True)
class Row:
    """One stored experiment, or one that failed (`index` None, `failure` says why)."""

    number: int
    index: int | None
    name: str
    parent: str
    parent_index: int | None
    change: str
    run: RunRecord | None
    score: float | None
    failure: str
    seconds: dict[str, float]
    motivation: str = ""
    analysis: str = ""
    ended: tuple[RunRecord, ...] = ()
    """Runs of its attempts that did not finish."""


def load_rows(root: Path) -> list[Row]:
    """Every ended experiment of a data-dir, stored ones by index, then failed ones.

    Raises:
        JournalError: a damaged journal.
    """
    if not (root / "experiments").is_dir():
        return []
    ended = [e for e in journal(root / "experiments", "") if e.state in ("stored", "failed")]
    found = load_baseline(root)
    names = {one.index: one.name for one in found.roots} if found is not None else {}
    for experiment in ended:
        if update := experiment.read("update"):
            names[update["index"]] = update["name"]
    rows = [_row(experiment, names) for experiment in ended]
    return sorted(rows, key=lambda row: (row.index is None, row.index or row.number))


def _row(experiment: Experiment, names: dict[int, str]) -> Row:
    stages: dict[str, Any] = {
        stage: experiment.read(stage) or {} for stage in ("sample", "evolve", "evaluate", "analyse", "update")
    }
    failed = experiment.read("failed")
    proposal = stages["evaluate"].get("proposal") or stages["evolve"].get("proposal") or {}
    if not proposal and failed and failed["attempts"]:
        proposal = failed["attempts"][-1]["proposal"]
    run = RunRecord.model_validate(stages["evaluate"]["run"]) if stages["evaluate"] else None
    parent = stages["sample"].get("parent")
    return Row(
        number=experiment.number,
        index=stages["update"].get("index"),
        name=stages["update"].get("name") or proposal.get("name", "-"),
        parent=names.get(parent, f"element {parent}") if parent else "-",
        parent_index=parent,
        change=proposal.get("change", ""),
        run=run,
        score=stages["update"].get("score"),
        failure=f"{failed['stage']}, {failed['reason']}" if failed else "",
        seconds=_seconds({**stages, failed["stage"]: failed} if failed else stages),
        motivation=proposal.get("motivation", ""),
        analysis=stages["analyse"].get("analysis", ""),
        ended=tuple(
            RunRecord.model_validate(attempt["run"])
            for attempt in (failed or stages["evaluate"]).get("attempts", [])
            if "run" in attempt
        ),
    )


def _seconds(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Wall seconds of an experiment by stage, and of what its checks and runs took, those that failed included."""
    seconds = {stage: float(value["seconds"]) for stage, value in stages.items() if value}
    evolve, evaluate = stages["evolve"], stages["evaluate"]
    refused = sum(float(attempt.get("seconds", 0.0)) for attempt in evolve.get("attempts", []))
    check = float(evolve.get("check_seconds", refused))
    seconds["check"], seconds["evolve"] = check, seconds.get("evolve", 0.0) - check
    for ended in (*evaluate.get("attempts", []), evaluate):
        for phase in ("start", "train", "score"):
            if phase in ended.get("run", {}).get("seconds", {}):
                seconds[phase] = seconds.get(phase, 0.0) + float(ended["run"]["seconds"][phase])
    return seconds


def print_summary(console: Console, root: Path) -> None:
    """The results table, the time table, the files and the next commands."""
    found = load_baseline(root)
    if found is None:
        console.print("Nothing has been measured yet.")
        return
    baseline = found.baseline
    rows = load_rows(root)
    console.print()
    narrow = console.width < WIDE_ENOUGH
    table, legend = _results(rows, found, narrow)
    _show(console, table, narrow)
    for line in legend:
        console.print(line)
    console.print(_notes(found))
    _show(console, _times(rows, read_timings(root), narrow), narrow)
    console.print(_files(root.resolve(), rows, baseline.profile))


def _show(console: Console, table: Table, narrow: bool) -> None:
    """Prints a table; a narrow terminal breaks its lines rather than the table its numbers."""
    if narrow:
        measured = Measurement.get(console, console.options.update(width=WIDE_ENOUGH), table)
        wraps = any(not column.no_wrap for column in table.columns)
        table.width = max(measured.minimum if wraps else measured.maximum, console.width if wraps else 0)
    console.print(table)


def _results(rows: list[Row], measured: Measured, narrow: bool) -> tuple[Table, list[str]]:
    """The table, and for a narrow terminal the words that have no room in it, to follow below."""
    baseline = measured.baseline
    title = f"Experiments, profile {baseline.profile}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("#",) if narrow else ("#", "name", "parent", "what changed"):
        table.add_column(heading, overflow="fold")
    for heading in ("loss", "vs base", "bench", "vs base", "params", "score"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    legend: list[str] = []

    def add(index: str, name: str, parent: str, change: str, numbers: Sequence[str], said: str, style: str) -> None:
        table.add_row(
            index, *(() if narrow else map(_cell, (name, parent, change))), *numbers, _cell(said), style=style
        )
        if narrow:
            legend.append(_cell(f"{index:>3}  {name}" + (f" from {parent}: {change}" if parent != "-" else "")))

    for root in measured.roots:
        own = root.name == baseline.program
        many = len(seeds_of(root.run))
        note = "baseline" if own else verdict(root.run, baseline)
        note += f", mean of {len(baseline.seeds) if own else many} seeds" if own or many > 1 else ""
        numbers = _baseline_numbers(baseline, root.run, root.score) if own else _numbers(root.run, baseline, root.score)
        add(str(root.index), root.name, "-", "root", numbers, note, "dim")
    for row in rows:
        if row.run is None or row.index is None:
            add("-", row.name, row.parent, row.change, ("-",) * 6, f"failed: {row.failure}", "")
            continue
        said, difference = verdict(row.run, baseline), against_baseline(row.run, baseline)
        style = "green" if difference is not None and difference.word == "better" else ""
        add(str(row.index), row.name, row.parent, row.change, _numbers(row.run, baseline, row.score), said, style)
    return table, legend


def _baseline_numbers(baseline: Baseline, run: RunRecord, score: float | None) -> tuple[str, ...]:
    """The baseline's own row: its means, and the score of its element."""
    shown = _numbers(run, baseline, score)
    bench = f"{baseline.benchmark:.3f}" if baseline.benchmark is not None else "-"
    return f"{baseline.loss:.4f}", "", bench, "", *shown[4:]


def _cell(text: str) -> str:
    """Names and changes may come from a model: shown, never obeyed."""
    return escape(printable(text))


def _numbers(run: RunRecord, baseline: Baseline, score: float | None) -> tuple[str, ...]:
    loss, bench = run.loss, run.benchmark_mean
    dloss, dbench = against_baseline(run, baseline), against_baseline(run, baseline, "benchmark")
    return (
        f"{loss.value:.4f}" if loss else "-",
        f"{-dloss.value:+.4f}" if dloss else "-",
        f"{bench.value:.3f}" if bench else "-",
        f"{dbench.value:+.3f}" if dbench else "-",
        f"{run.parameters:,}" if run.parameters else "-",
        f"{score:.3f}" if score is not None else "-",
    )


def _notes(measured: Measured) -> str:
    baseline = measured.baseline
    sd = f"{baseline.loss_sd:.4f}" if baseline.loss_sd is not None else "unknown"
    mean = f"{baseline.benchmark:.3f}" if baseline.benchmark is not None else "none"
    bench_sd = f"{baseline.benchmark_sd:.3f}" if baseline.benchmark_sd is not None else "unknown"
    seeds = len(baseline.seeds)
    dof = baseline.sd_dof if baseline.loss_sd else None
    band = t95(dof) * math.sqrt(1 + 1 / seeds) if dof else None
    sure = f"; beyond {band:.1f} SD (95 % band, {dof} degrees of freedom) it is better or worse" if band else ""
    own = all(run.trainer == "own" for group in measured.runs.values() for run in group)
    text = "Loss is nats a token on held-out text" if own else f"{WARNING}. Loss is the last training loss"
    return (
        f"Base: mean of {baseline.program} over seeds {baseline.seeds}: {'held-out' if own else 'reported'} loss "
        f"{baseline.loss:.4f} "
        f"(seed SD {sd}, pooled over the seed architectures), "
        f"benchmark mean {mean} (seed SD {bench_sd}) over {_tasks(measured)}.\n"
        f"One seed a candidate; + SD is better, a lower loss. Up to 2 SD is a tie, more is perhaps better or "
        f"worse{sure}.\n"
        f"{text} (lower is better); score runs from 0 to 3."
    )


def _tasks(measured: Measured) -> str:
    """The tasks of the benchmark mean, and those left out because no seed architecture is above chance on them."""
    counted = measured.baseline.tasks
    runs = [run for group in measured.runs.values() for run in group]
    if any(run.trainer == "command" for run in runs):
        return f"{', '.join(counted)}, each with the same weight: their n and their chance level are not reported"
    if runs and not tasks_with_signal(runs):
        return f"{', '.join(counted)}; no task is above chance: all count, and the mean is close to coin flips"
    left = [task for task in dict.fromkeys(task for run in runs for task in run.benchmarks) if task not in counted]
    return ", ".join(counted) + (
        f"; left out, as no seed architecture is above chance there: {', '.join(left)}" if left else ""
    )


def _times(rows: list[Row], timings: dict[str, float], narrow: bool) -> Table:
    title = "Where the time went (wall seconds; lanes overlap)"
    padding = 0 if narrow else (0, 1)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=padding, pad_edge=False)
    table.add_column("part", no_wrap=True)
    for heading in ("design", "check", "start", "train", "score", "analyse", "store", "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    setup = REPOSITORY / ".venv" / "setup-seconds"
    if setup.exists():
        table.add_row("install (make setup)", *[""] * 7, setup.read_text().strip())
    for phase in ("corpus", "services", "baselines"):
        if phase in timings:
            table.add_row(phase, *[""] * 7, f"{timings[phase]:.1f}")
    for row in rows:
        keys = ("evolve", "check", "start", "train", "score", "analyse", "update")
        cells = [f"{row.seconds[key]:.1f}" if row.seconds.get(key) is not None else "" for key in keys]
        total = sum(
            row.seconds.get(stage, 0.0) for stage in ("sample", "evolve", "check", "evaluate", "analyse", "update")
        )
        table.add_row(f"experiment {row.number}", *cells, f"{total:.1f}")
    return table


def _files(root: Path, rows: list[Row], profile: str) -> str:
    """Where everything lies, and commands that can be pasted as they are."""
    here = Path.cwd()
    shown = str(root.relative_to(here) if root.is_relative_to(here) else root)
    shown = f"./{shown}" if shown.startswith("-") else shown  # else a command would take it for a flag
    entry = REPOSITORY.relative_to(here) if REPOSITORY.is_relative_to(here) else REPOSITORY
    python = Path(sys.executable)
    python = python.relative_to(here) if python.is_relative_to(here) else python
    stored = [row for row in rows if row.index is not None]
    best = max(stored, key=lambda row: row.score if row.score is not None else -1.0) if stored else None

    store = f"{shown}/database.sqlite, " if (root / "database.sqlite").exists() else ""

    def command(script: str, *words: str) -> str:
        return "  " + shlex.join([str(python), str(entry / script), *words])

    lines = [
        f"Files: {shown}/pool (programs), {shown}/experiments (journals, curves, results), "
        f"{store}{shown}/settings.toml",
        "Next:",
        command("pipeline/report.py", "--data-dir", shown),
    ]
    if best is not None and best.run is not None:
        trust = ["--trust"] if best.run.sandbox == "process" else []
        again = [f"{shown}/pool/{best.name}.py", "--profile", "cpu", "--seed", "1", "--out", f"{shown}/again", *trust]
        lines.append(command("training/train.py", *again))
    lines.append(command("pipeline/pipeline.py", *_more(profile, shown, len(stored))))
    return escape("\n".join(lines))


def _more(profile: str, shown: str, stored: int) -> list[str]:
    """The same search with more experiments; after the smoke profile the next one, in a folder that is free."""
    if profile == "cpu-smoke":
        names = ("runs/cpu", *(f"runs/cpu-{number}" for number in range(2, 1000)))
        free = next((name for name in names if not Path(name).exists()), names[-1])
        return ["--profile", "cpu", "--experiments", "10", "--data-dir", free]
    # The settings hold what else the run was started with: profile, seed, services.
    return ["--config", f"{shown}/settings.toml", "--data-dir", shown, "--experiments", str(stored + 10)]
