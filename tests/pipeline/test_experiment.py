"""The journal: a stage is there whole or not at all, and damage is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import BusyError, JournalError, UsageError
from common.settings import load
from pipeline.experiment import STAGES, Experiment, journal
from pipeline.measured import load_baseline
from pipeline.workspace import Workspace, read_timings

PROPOSAL = {"name": "n", "motivation": "m", "program": "p", "operator": "o", "change": "c", "mechanisms": []}
REPORT = {"program": "n", "accepted": True, "checks": []}
RUN = {
    "run_id": "r",
    "name": "n",
    "profile": "p",
    "seed": 0,
    "status": "finished",
    "program_sha256": "0",
    "baseline_key": "k",
}
RESULTS = {
    "sample": {"parent": 1, "references": [2], "seconds": 0.1},
    "evolve": {"proposal": PROPOSAL, "report": REPORT, "attempts": [], "check_seconds": 1.0, "seconds": 2.0},
    "evaluate": {"proposal": PROPOSAL, "run": RUN, "result": {}, "log": "", "attempts": [], "seconds": 3.0},
    "analyse": {"analysis": "a", "cognition": "c", "summary": "s", "seconds": 0.2},
    "update": {"index": 3, "name": "n", "score": None, "gain": None, "seconds": 0.1},
}


def test_the_state_is_the_first_stage_that_is_missing(tmp_path: Path) -> None:
    experiment = Experiment(1, tmp_path / "0001", "run")
    for stage in STAGES:
        assert experiment.state == stage
        experiment.write(stage, RESULTS[stage])
        assert experiment.read(stage) == RESULTS[stage]
    assert experiment.state == "stored"


def test_a_failed_experiment_stays_failed(tmp_path: Path) -> None:
    experiment = Experiment(2, tmp_path / "0002", "run")
    experiment.write("failed", {"stage": "evolve", "reason": "refused", "detail": "", "attempts": [], "seconds": 0.0})
    assert journal(tmp_path, "run")[0].state == "failed"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"index": 3}', "\x00"])
def test_damage_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "0001").mkdir()
    (tmp_path / "0001" / "update.json").write_text(content)
    with pytest.raises(JournalError, match=r"update\.json"):
        journal(tmp_path, "run")


@pytest.mark.parametrize("part", ["proposal", "run"])
def test_damage_inside_a_stage_is_named(tmp_path: Path, part: str) -> None:
    experiment = Experiment(1, tmp_path / "0001", "run")
    experiment.write("evaluate", {**RESULTS["evaluate"], part: {"of": "another version"}})
    with pytest.raises(JournalError, match=r"evaluate\.json"):
        journal(tmp_path, "run")


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("update", {"index": "third"}, "index: "),
        ("update", {"gain": "much"}, "gain: "),
        ("sample", {"references": 2}, "references: "),
        ("evolve", {"attempts": [{"detail": "no kind"}]}, r"attempts\.0\.kind: "),
        ("evolve", {"proposal": {**PROPOSAL, "of": "another version"}}, "a proposal has no of"),
        ("evaluate", {"seconds": None}, "seconds: "),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path: Path, stage: str, change: dict[str, Any], told: str) -> None:
    experiment = Experiment(1, tmp_path / "0001", "run")
    experiment.write(stage, {**RESULTS[stage], **change})
    with pytest.raises(JournalError, match=rf"{stage}\.json.*{told}"):
        journal(tmp_path, "run")


@pytest.mark.parametrize("content", ['{"corpus": "abc"}', "[1]", '{"corpus": NaN}', "{", "[" * 100_000])
def test_a_damaged_table_of_times_is_told_and_set_aside_at_the_start(tmp_path: Path, content: str) -> None:
    settings = load(None, {"run": {"data_dir": tmp_path}})
    (tmp_path / "timings.json").write_text(content)
    with pytest.raises(JournalError, match=r"timings\.json: expected seconds by phase.*") as told:
        read_timings(tmp_path)
    assert str(told.value).count("fix: ") == 1
    workspace = Workspace(tmp_path, settings)
    (note,), (aside,) = workspace.notes, tmp_path.glob("timings.damaged-*.json")
    assert "timings.json: expected seconds by phase" in note and aside.name in note and aside.read_text() == content
    workspace.record_time("corpus", 1.5)
    assert read_timings(tmp_path) == {"corpus": 1.5}
    workspace.close()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"baseline": 3, "runs": {}}'])
def test_a_damaged_baseline_is_told_with_one_fix(tmp_path: Path, content: str) -> None:
    (tmp_path / "baseline.json").write_text(content)
    with pytest.raises(JournalError, match=r"baseline\.json is not a baseline") as told:
        load_baseline(tmp_path)
    assert str(told.value).count("fix: ") == 1


def test_keys_differ_between_runs_and_numbers(tmp_path: Path) -> None:
    keys = {Experiment(number, tmp_path, run).key for number in (1, 2) for run in ("a", "b")}
    assert len(keys) == 4


def test_one_pipeline_holds_a_data_dir_and_its_identity_stays(tmp_path: Path) -> None:
    settings = load(None, {"run": {"data_dir": tmp_path, "profile": "cpu", "seed": 1}})
    workspace = Workspace(tmp_path, settings)
    with pytest.raises(BusyError, match="in use"):
        Workspace(tmp_path, settings)
    workspace.close()
    again = Workspace(tmp_path, settings)
    assert again.run_id == workspace.run_id
    (again.experiments / "0001").mkdir()  # from here on the data-dir is bound to its profile and seed
    again.close()
    with pytest.raises(UsageError, match="seed 1"):
        Workspace(tmp_path, load(None, {"run": {"data_dir": tmp_path, "profile": "cpu", "seed": 2}}))
    Workspace(tmp_path, settings).close()


def test_experiments_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10000, 9999, 2):
        (tmp_path / f"{number:04d}").mkdir()
    assert [experiment.number for experiment in journal(tmp_path, "run")] == [2, 9999, 10000]


def test_a_journal_is_read_once(tmp_path: Path) -> None:
    Experiment(1, tmp_path / "0001", "run").write("update", RESULTS["update"])
    (experiment,) = journal(tmp_path, "run")
    (tmp_path / "0001" / "update.json").write_text("{")
    assert experiment.state == "stored" and experiment.read("update") == RESULTS["update"]
