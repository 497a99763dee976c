"""benchmarks/lr_sweep.py around the runs: which kept ones are taken, and how it ends before it is done."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lr_sweep
from common.errors import JobError
from common.files import sha256_text, write_json
from common.records import BenchmarkScore, Measurement, RunRecord
from training.profiles import Profile
from training.programs import Program


class Trained:
    """A launcher that trains nothing: its runs are finished at once.

    Attributes:
        begun: (name of the program, rate) of each run.
    """

    begun: list[tuple[str, float]]

    def __init__(self, settings: Any, profile: Profile) -> None:
        self.profile = profile

    def ready(self, on_event: Any = None, cancel: threading.Event | None = None) -> None:
        pass

    def baseline_key(self) -> str:
        return sha256_text(self.profile.fingerprint())

    def train(self, program: Program, *, seed: int, out: Path, **_: Any) -> RunRecord:
        self.begun.append((program.name, self.profile.train.lr))
        record = RunRecord(
            run_id="r",
            name=program.name,
            profile=self.profile.name,
            seed=seed,
            status="finished",
            program_sha256=program.sha256,
            baseline_key=self.baseline_key(),
            heldout_loss=Measurement(value=self.profile.train.lr, n=10),
            train_loss={"1": 5.0},
            benchmarks={"recall": BenchmarkScore(value=0.5, n=10, chance=0.1)},
        )
        write_json(out / "result.json", record.model_dump(mode="json"))
        return record


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    monkeypatch.setattr(Trained, "begun", found, raising=False)
    monkeypatch.setattr(lr_sweep, "Launcher", Trained)
    return found


def test_kept_runs_are_taken_again_where_program_and_rate_are_the_same(
    begun: list[tuple[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("class DeltaNet: ...\n")
    sweep = ["--seeds", "1", "--keep", str(tmp_path / "runs"), "--rates", "0.1"]
    assert lr_sweep.main(sweep) == 0 and lr_sweep.main([*sweep, "0.2"]) == 0
    assert begun == [("delta_net", 0.1), ("delta_net", 0.2)]
    assert "| 0.1 | 0.100 |  | 5.000 | 1 |" in capsys.readouterr().out
    assert lr_sweep.main([*sweep, "--program", str(mine)]) == 0
    assert begun[2:] == [("mine", 0.1)], "the runs of another program are none of this one's"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ctrl_c", [True, False])
def test_a_sweep_that_ends_early_ends_what_runs_and_begins_nothing_more(
    begun: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ctrl_c: bool
) -> None:
    two = threading.Barrier(2, timeout=30)

    def train(self: Trained, program: Program, *, seed: int, cancel: threading.Event | None = None, **_: Any) -> Any:
        rate = self.profile.train.lr
        self.begun.append((program.name, rate))
        first = rate <= 0.2 and two.wait() == 0
        if first and ctrl_c:
            os.kill(os.getpid(), signal.SIGINT)
        elif rate == 0.1 and not ctrl_c:
            raise JobError("a fault of ours")
        assert cancel is not None and cancel.wait(30), "nobody ends it"
        raise JobError("was cancelled")

    monkeypatch.setattr(Trained, "train", train)
    # A shell that starts the tests in the background lets them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sweep = ["--seeds", "1", "--jobs", "2", "--keep", str(tmp_path), "--rates", "0.1", "0.2", "0.3", "0.4"]
    try:
        if ctrl_c:
            assert lr_sweep.main(sweep) == 130
        else:
            with pytest.raises(JobError, match="a fault of ours"):
                lr_sweep.main(sweep)
    finally:
        signal.signal(signal.SIGINT, before)
    # One may take the place of the faulty run before the fault is seen.
    assert {0.1, 0.2} <= {rate for _, rate in begun} <= {0.1, 0.2} | ({0.3} if not ctrl_c else set())
