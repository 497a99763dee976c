"""The table at the end says what was measured, what it means, where the time went, and what to type next."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.files import write_json
from common.records import Baseline, BenchmarkScore
from pipeline.agents.roles import AnalysisSubject, Kin, Proposal, Relative
from pipeline.analyse.offline import OfflineAnalyzer
from pipeline.experiment import Experiment
from pipeline.measured import Measured, Root, mean_run, save_baseline
from pipeline.report import main as report
from pipeline.summary import load_rows, print_summary
from tests.pipeline.labs import record
from tests.pipeline.test_experiment import PROPOSAL, RESULTS

BASELINE = Baseline(
    key="key-1",
    profile="tiny",
    seeds=[0, 1],
    loss=4.0,
    loss_sd=0.02,
    benchmark=0.4,
    benchmark_sd=0.05,
    tasks=["recall"],
    sd_dof=2,
)


def make(root: Path, profile: str = "tiny", loss: float = 3.95, recall: float = 0.4) -> None:
    """A data-dir with two roots, one stored experiment and one that failed."""
    runs = {
        name: [record(name, name, seed, "key-1", loss) for seed, loss in enumerate(losses)]
        for name, losses in {"delta_net": (3.98, 4.02), "gated_delta_net": (3.9, 4.1)}.items()
    }
    weak = {"copying": BenchmarkScore(value=0.1, n=100, se=0.02, chance=0.1)}
    scores = {"recall": BenchmarkScore(value=recall, n=100, se=0.02, chance=0.1), **weak}
    for name, group in runs.items():
        runs[name] = [run.model_copy(update={"benchmarks": scores}) for run in group]
    roots = [
        Root(index=index, name=name, score=1.4, run=mean_run(group))
        for index, (name, group) in enumerate(runs.items(), 1)
    ]
    tasks = ["recall"] if recall > 0.2 else ["recall", "copying"]
    baseline = BASELINE.model_copy(update={"profile": profile, "tasks": tasks})
    save_baseline(root, Measured(baseline=baseline, runs=runs, roots=roots))
    stored, failed = (Experiment(number, root / "experiments" / f"{number:04d}", "") for number in (1, 2))
    run = record("n", "p", 0, "key-1", loss).model_dump()
    for stage, value in RESULTS.items():
        stored.write(stage, {**value, **({"run": run} if stage == "evaluate" else {})})
    failed.write("sample", RESULTS["sample"])
    failed.write("evolve", RESULTS["evolve"])
    attempts = [{"kind": "nan", "detail": "", "proposal": PROPOSAL, "run": run}] * 2
    failed.write("failed", {"stage": "evaluate", "reason": "nan", "detail": "", "attempts": attempts, "seconds": 20.0})


def printed(root: Path, width: int = 200, **console: Any) -> str:
    out = io.StringIO()
    print_summary(Console(file=out, width=width, soft_wrap=True, **console), root)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 60, 20])
def test_a_narrow_terminal_shows_every_number_whole(tmp_path: Path, width: int) -> None:
    make(tmp_path)
    write_json(tmp_path / "timings.json", {"baselines": 1234.5})
    wide, narrow = printed(tmp_path), printed(tmp_path, width)
    assert "…" not in narrow
    numbers = set(re.findall(r"[-+]?\d[\d,]*\.\d+", wide))
    assert "1234.5" in numbers and numbers <= set(re.findall(r"[-+]?\d[\d,]*\.\d+", narrow))
    tables = [line for line in narrow.splitlines() if line.strip().startswith(("experiment", "baselines", "1 ", "3 "))]
    assert width < 80 or max(map(len, tables)) <= 80


def test_a_data_dir_that_looks_like_a_flag_is_shown_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "-run")
    text = printed(tmp_path / "-run")
    assert "--data-dir ./-run" in text and "--data-dir -run" not in text


def test_failed_experiments_show_their_time(tmp_path: Path) -> None:
    make(tmp_path)
    failed = load_rows(tmp_path)[-1]
    assert failed.failure == "evaluate, nan"
    assert {part: failed.seconds[part] for part in ("check", "train", "score")} == {
        "check": 1.0,
        "train": 10.0,
        "score": 4.0,
    }
    shown = next(line for line in printed(tmp_path).splitlines() if line.strip().startswith("experiment 2"))
    assert "10.0" in shown and shown.split()[-1] == "22.1"


def test_refused_designs_show_the_time_of_their_checks(tmp_path: Path) -> None:
    make(tmp_path)
    experiment = Experiment(3, tmp_path / "experiments" / "0003", "")
    attempts = [{"kind": "refused", "detail": "", "proposal": PROPOSAL, "seconds": 3.0}] * 2
    experiment.write(
        "failed", {"stage": "evolve", "reason": "refused", "detail": "", "attempts": attempts, "seconds": 7.0}
    )
    seconds = load_rows(tmp_path)[-1].seconds
    assert (seconds["check"], seconds["evolve"]) == (6.0, 1.0)


@pytest.mark.parametrize(("loss", "green"), [(3.95, False), (3.8, True), (4.2, False)])
def test_only_better_is_green(tmp_path: Path, loss: float, green: bool) -> None:
    make(tmp_path, loss=loss)
    assert ("\x1b[32m" in printed(tmp_path, force_terminal=True)) is green


def test_the_notes_say_the_sign_the_seeds_and_the_tasks_left_out(tmp_path: Path) -> None:
    make(tmp_path)
    text = printed(tmp_path)
    assert "+ SD is better, a lower loss" in text
    assert text.count("mean of 2 seeds") == 2
    assert "over recall; left out, as no seed architecture is above chance there: copying." in text
    make(tmp_path / "weak", recall=0.1)
    assert "no task is above chance: all count" in printed(tmp_path / "weak")


def test_the_next_command_starts_nothing_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "demo", profile="cpu-smoke")
    assert "--profile cpu --experiments 10 --data-dir runs/cpu\n" in printed(tmp_path / "runs" / "demo")
    make(tmp_path / "runs" / "cpu", profile="cpu")
    assert "--profile cpu --experiments 10 --data-dir runs/cpu-2\n" in printed(tmp_path / "runs" / "demo")
    more = "--config runs/cpu/settings.toml --data-dir runs/cpu --experiments 11\n"
    assert more in printed(tmp_path / "runs" / "cpu")


def test_the_database_is_named_where_it_is(tmp_path: Path) -> None:
    make(tmp_path)
    assert "database.sqlite" not in printed(tmp_path)
    (tmp_path / "database.sqlite").touch()
    assert "database.sqlite" in printed(tmp_path)


@pytest.mark.parametrize(
    ("loss", "said"), [(3.94, "neither confirmed nor refuted"), (3.8, "confirmed on loss"), (4.2, "refuted on loss")]
)
def test_an_expectation_is_judged_in_the_words_of_the_verdict(loss: float, said: str) -> None:
    parent = mean_run([record("p", "p", seed, "key-1", 4.0) for seed in (0, 1)])
    subject = AnalysisSubject(
        Proposal("n", "We expect it to be lower.", "p", "o", "c"),
        record("n", "n", 0, "key-1", loss),
        BASELINE,
        parent=Kin(Relative("p", "p", "m", "", "", "", None, 1), parent),
    )
    analysis = OfflineAnalyzer().analyse(subject)
    assert f"This is {said}" in analysis.expectation_vs_reality_comparison
    assert "its mixers take 100" in analysis.design_evaluation


def test_a_folder_of_figures_that_cannot_be_written_is_told_with_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "file").write_text("")
    assert report(["--data-dir", str(tmp_path), "--out", str(tmp_path / "file" / "figures")]) == 3
    told = capsys.readouterr().err
    assert "--out DIR" in told and "--data-dir" not in told and told.count("fix: ") == 1
