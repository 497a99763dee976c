"""Programs that forge what their process reports get no score, or no better one than without it."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from common.process import REPOSITORY
from common.records import CheckReport, RunRecord
from common.settings import Settings
from tests.training.forgeries import AFTER_THE_CHECKS, FAST, FORGERIES, HONEST
from training.launcher import Launcher
from training.profiles import load_profile
from training.programs import Program

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"
ENDED = ("forged", "refused", "crashed", "nan")


def outcomes(names: list[str], out: Path, check: bool) -> dict[str, tuple[CheckReport | None, RunRecord]]:
    """Name -> its report, where it was checked, and its run. What the check refuses is trained all the same: the
    scorer has to hold by itself."""
    launcher = Launcher(Settings(), load_profile(str(TINY)))
    launcher.prepare()
    programs = [Program(name, FORGERIES[name].text if name else HONEST) for name in names]
    reports = dict(zip(names, launcher.check(programs), strict=True)) if check else dict.fromkeys(names)

    def train(program: Program) -> RunRecord:
        report = reports[program.name]
        return launcher.train(
            program, seed=0, out=out / program.name, run_id=program.name or "honest", checks=report or ()
        )

    with ThreadPoolExecutor(2) as pool:
        return {name: (reports[name], run) for name, run in zip(names, pool.map(train, programs), strict=True)}


def judged(names: list[str], out: Path, check: bool) -> dict[str, str]:
    """Name -> how it ended; asserts that it is as its forgery has to end."""
    said, wrong = {}, []
    found = outcomes([*names, ""] if check else names, out, check)
    honest = found.pop("")[1].heldout_loss if check else None
    for name, (report, run) in found.items():
        refused = report is not None and report.accepted is False
        loss = run.heldout_loss.value if run.heldout_loss else None
        said[name] = (
            f"check {'refuses' if refused else 'accepts'}; run {run.status}, {run.reason}: {run.detail[:300]}"
            + (f" loss {loss}, {run.checks[-1].detail[:300]}" if loss is not None else "")
        )  # fmt: skip
        ended = run.reason in ENDED and run.heldout_loss is None and not run.benchmarks
        unchanged = FORGERIES[name].ends != "without" and (honest is None or loss == honest.value)
        if not (ended or unchanged) or (FORGERIES[name].ends == "check" and check and not refused):
            wrong.append(f"{name}: {said[name]}")
    assert not wrong, f"honest loss {honest}\n" + "\n".join(wrong)
    return said


def test_a_forger_gets_no_score(tmp_path: Path) -> None:
    said = judged(list(FAST), tmp_path, check=False)
    assert "reported a training loss" in said["cross_entropy_by_name"]
    assert "forged" in said["after_training_only"] and "process that was trained" in said["after_training_only"]
    assert "finished" in said["in_the_trained_process"] and "the weights' own" in said["in_the_trained_process"]
    assert (
        "forged" in said["counts_and_clock_of_its_own"]
        and "the report of step 20" in said["counts_and_clock_of_its_own"]
    )
    reports = [json.loads(line) for line in (tmp_path / FAST[3] / "metrics.jsonl").read_text().splitlines()]
    assert [(report["step"], report["tokens"]) for report in reports] == [(n, n * 4 * 64) for n in (1, 5, 10, 15)]
    seconds = [report["seconds"] for report in reports]
    assert seconds[0] > 1e-3 and seconds == sorted(seconds) and seconds[-1] < 120
    rates = [
        (report["tokens"] - before["tokens"]) / (report["seconds"] - before["seconds"])
        for before, report in pairwise([{"tokens": 0, "seconds": 0.0}, *reports])
    ]
    assert [report["tokens_per_second"] for report in reports] == pytest.approx(rates)
    assert "forged" in said["steps_in_forward"] and "something else than the optimiser" in said["steps_in_forward"]


@pytest.mark.slow
def test_the_command_says_that_a_program_is_forged(tmp_path: Path) -> None:
    file = tmp_path / "forger.py"
    file.write_text(AFTER_THE_CHECKS)
    command = [sys.executable, str(REPOSITORY / "training" / "train.py"), str(file), "--profile", str(TINY)]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "forged" in done.stdout, done
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (record["status"], record["reason"]) == ("failed", "forged")
    assert record["heldout_loss"] is None and not record["benchmarks"]
    assert all(check["passed"] or check["severity"] == "warn" for check in record["checks"])
    assert not (tmp_path / "out" / "test.csv").exists()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_no_forger_gets_a_score(tmp_path: Path) -> None:
    for name, how in judged(list(FORGERIES), tmp_path, check=True).items():
        print(f"{name}: {how}")
    print(f"{len(FORGERIES)} forgeries, none with a score or with a better one than honest")
