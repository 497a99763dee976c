"""The loop as a user runs it: real services, sandbox, training, scoring; the same data-dir resumes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.designer import fingerprint
from pipeline.report import report
from tests.pipeline.running import (
    ROOT,
    assert_whole,
    children,
    command,
    command_line,
    elements,
    left_of,
    rest_of,
    run,
    stage,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A data-dir with two finished experiments, and what was printed. Meanwhile both services and the embedding server
    were killed."""
    data_dir = tmp_path_factory.mktemp("run")
    process = subprocess.Popen(
        command(data_dir, 2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    printed, killed = "", 0
    for line in process.stdout:
        printed += line
        if "evolve" in line and not killed:
            for pid in children(process.pid):
                words = command_line(pid).split("\0")
                if any(word.endswith(("mongodb_api.py", "rag_api.py", "embedding_server.py")) for word in words):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
    assert process.wait(120) == 0 and killed == 3, printed
    return data_dir, printed


@pytest.fixture(scope="module")
def stored(finished: tuple[Path, str]) -> list[dict[str, Any]]:
    """The elements of that run, as its database tells them."""
    return elements(finished[0])


def test_killed_services_come_back_and_the_run_goes_on(
    finished: tuple[Path, str], stored: list[dict[str, Any]]
) -> None:
    assert_whole(finished[0], 2, stored)


def test_the_report_compares_the_best_with_the_baseline_on_the_same_items(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert report(finished[0], tmp_path) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("Against the baseline on the same items") :]
    assert len(re.findall(r"mean of \d", table)) == 2
    assert len(re.findall(r"recall.*? 40 +[+-]\d\.\d{3} ± \d\.\d{3}.*? [+-]\d\.\d{3} ± \d", table)) == 2


def test_what_was_stored_is_what_was_trained(finished: tuple[Path, str], stored: list[dict[str, Any]]) -> None:
    data_dir, found = finished[0], stored
    assert [element["index"] for element in found] == [1, 2, 3, 4]
    assert [element["name"] for element in found[:2]] == ["delta_net", "gated_delta_net"]
    assert len({fingerprint(element["program"]) for element in found}) == 4
    for element in found:
        record = element["runs"][-1]
        assert hashlib.sha256(element["program"].encode()).hexdigest() == record.program_sha256
        assert record.status == "finished" and record.heldout_loss.n > 0 and record.heldout_loss.se > 0
        assert len(record.benchmarks) >= 4 and all(score.se is not None for score in record.benchmarks.values())
        assert element["result"]["train"].count("\n") >= 1 and element["result"]["test"].count("\n") >= 1
    for element in found[2:]:
        assert element["parent"] in (1, 2)
        spent = element["runs"][-1].efficiency
        assert len(spent.prefill) == 3 and (spent.decode is not None) == ("def step(" in element["program"])
        assert (data_dir / "pool" / f"{element['name']}.py").read_text() == element["program"]
        for title in (
            "Design evaluation",
            "Results",
            "Expectation and reality",
            "Explanation and evidence",
            "Synthesis",
        ):
            assert f"## {title}" in element["analysis"]


def test_candidates_have_the_size_of_the_baseline(stored: list[dict[str, Any]]) -> None:
    records = [element["runs"][-1] for element in stored]
    for record in records:
        assert abs(record.parameters / records[0].parameters - 1) <= 0.005


def test_the_table_says_what_happened(finished: tuple[Path, str]) -> None:
    data_dir, printed = finished
    for number in (1, 2):
        stored = stage(data_dir, number, "update")
        run_record = stage(data_dir, number, "evaluate")["run"]
        assert f"{stored['score']:.3f}" in printed
        assert f"{run_record['heldout_loss']['value']:.4f}" in printed
    for word in ("corpus", "services", "baselines", "pool", "Next:"):
        assert word in printed


def test_the_same_command_again_adds_nothing(finished: tuple[Path, str]) -> None:
    data_dir, _ = finished
    emptied, removed = sorted((data_dir / "pool").glob("*.py"))[:2]
    texts = emptied.read_text(), removed.read_text()
    emptied.write_text("")
    removed.unlink()
    again = run(data_dir, 2)
    assert (emptied.read_text(), removed.read_text()) == texts and "2 programs written again" in again.stdout
    assert again.returncode == 0 and "2 experiments stored" in again.stdout
    assert "evolve" not in again.stdout
    with sqlite3.connect(data_dir / "database.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM elements").fetchone() == (4,)


def test_a_lost_database_is_told_and_not_taken_for_a_finished_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    for path in copy.glob("database.sqlite*"):
        path.unlink()
    again = run(copy, 2)
    assert again.returncode == 3 and "lost or replaced" in again.stderr and "Traceback" not in again.stderr
    assert "asked for" not in again.stdout


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, None), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if "evolve" in line:  # the first experiment has begun
            break
    family = children(process.pid)
    process.send_signal(signal.SIGINT)
    printed += rest_of(process)
    assert process.wait(60) == 0, printed
    assert "To go on" in printed and "Traceback" not in printed
    # What was killed last may need a moment to be gone.
    assert len(family) > 3 and not left_of(family, 30)
