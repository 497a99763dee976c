"""Training shared by several processes: the numbers of one process, from any checkpoint, and faults of a rank told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from common.process import REPOSITORY
from common.records import RunRecord
from common.settings import load
from tests.pipeline.running import children
from tests.training.test_launcher import MEAN, TINY
from training import checkpoints
from training.checkpoints import FOLDER
from training.launcher import Event, Launcher
from training.profiles import Profile, load_profile
from training.programs import Program
from training.torchrun import asked_for

# A buffer that counts and a random number in training: both differ between ranks unless they are looked after.
KEEPS = MEAN.replace(
    "        self.out = nn",
    "        self.register_buffer('seen', torch.zeros((), dtype=torch.int64))\n        self.out = nn",
).replace("        x = self.proj(hidden_states)", "        x = self.proj(hidden_states)\n        self.seen += len(x)")
FAILS = MEAN.replace(
    "        x = self.proj",
    "        self.calls = getattr(self, 'calls', 0) + 1\n"
    "        if self.training and self.calls == 3 and torch.distributed.get_rank() == 1:\n"
    "            raise ValueError('the second one gives up')\n        x = self.proj",
)
CHANGES = FAILS.replace(
    "raise ValueError('the second one gives up')", "\n                with torch.no_grad(): self.out.weight.add_(1e-3)"
)
DIES = FAILS.replace("raise ValueError('the second one gives up')", "import os; os._exit(9)")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    path = tmp_path_factory.mktemp("profile") / "tiny-shared.toml"
    path.write_text(TINY.read_text().replace("[eval]", "[checkpoint]\nsteps = 2\n\n[eval]"))
    return load_profile(path)


@pytest.fixture(scope="module")
def flags(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"text": [text_file], "cache_dir": tmp_path_factory.mktemp("cache"), "device": "cpu"}


def launcher(flags: dict[str, Any], profile: Profile, processes: int) -> Launcher:
    return Launcher(load(None, {"training": {**flags, "processes": processes}}), profile)


def train(one: Launcher, text: str, out: Path, **options: Any) -> RunRecord:
    return one.train(Program("sample", text, trust="user"), seed=0, out=out, run_id="r", **options)


def reports(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_shared_steps_are_those_of_one_process_and_go_on_with_any_number(
    flags: dict[str, Any], profile: Profile, tmp_path: Path
) -> None:
    alone, two = (launcher(flags, profile, processes) for processes in (1, 2))
    whole = train(alone, KEEPS, tmp_path / "whole")
    cancel = threading.Event()

    def stop(event: Event) -> None:
        if (event.step or 0) >= 10:
            cancel.set()

    stopped = train(two, KEEPS, tmp_path / "shared", on_event=stop, cancel=cancel)
    assert stopped.reason == "interrupted" and checkpoints.kept(tmp_path / "shared" / FOLDER)
    resumed = train(alone, KEEPS, tmp_path / "shared")
    assert (whole.status, resumed.status) == ("finished", "finished")
    spent = resumed.seconds
    assert "train_earlier" not in whole.seconds and 0 < spent["train_earlier"] < spent["train"]
    assert spent["total"] > spent["start"] + spent["train"] + spent["score"]
    mine, theirs = (reports(tmp_path / name) for name in ("whole", "shared"))
    assert [report["step"] for report in mine] == [report["step"] for report in theirs]
    for one, other in zip(mine[:-1], theirs[:-1], strict=True):
        for key in ("loss", "task_loss", "grad_norm", "lr", "tokens"):
            assert other[key] == pytest.approx(one[key], rel=1e-4)
    assert theirs[-1]["heldout_loss"] == pytest.approx(mine[-1]["heldout_loss"], rel=1e-4)
    # Not to the last bit: then nothing would show that the rows were shared at all.
    assert theirs[-1]["heldout_loss"] != mine[-1]["heldout_loss"]


@pytest.mark.slow
def test_the_same_number_of_processes_gives_the_same_bits(
    flags: dict[str, Any], profile: Profile, tmp_path: Path
) -> None:
    two = launcher(flags, profile, 2)
    first, second = (train(two, KEEPS, tmp_path / name) for name in ("one", "two"))
    assert first.heldout_loss is not None and first.heldout_loss == second.heldout_loss
    assert first.hardware["processes"] == 2
    cancel = threading.Event()

    def stop(event: Event) -> None:
        if (event.step or 0) >= 10:
            cancel.set()

    assert train(two, KEEPS, tmp_path / "three", on_event=stop, cancel=cancel).reason == "interrupted"
    assert train(two, KEEPS, tmp_path / "three").heldout_loss == first.heldout_loss


@pytest.mark.slow
def test_a_run_goes_on_with_more_and_with_fewer_processes(
    flags: dict[str, Any], profile: Profile, tmp_path: Path
) -> None:
    whole = train(launcher(flags, profile, 1), KEEPS, tmp_path / "whole")
    for number, until in ((1, 10), (2, 20), (3, 30)):
        cancel = threading.Event()

        def stop(event: Event, cancel: threading.Event = cancel, until: int = until) -> None:
            if (event.step or 0) >= until and until < profile.train.steps:
                cancel.set()

        record = train(launcher(flags, profile, number), KEEPS, tmp_path / "shared", on_event=stop, cancel=cancel)
    assert (record.status, record.hardware["processes"]) == ("finished", 3)
    mine, theirs = (reports(tmp_path / name) for name in ("whole", "shared"))
    for one, other in zip(mine[:-1], theirs[:-1], strict=True):
        for key in ("loss", "task_loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-4)
    assert record.heldout_loss is not None and whole.heldout_loss is not None
    assert record.heldout_loss.value == pytest.approx(whole.heldout_loss.value, rel=1e-4)


@pytest.mark.slow
def test_a_parameter_changed_in_any_rank_is_forged(flags: dict[str, Any], profile: Profile, tmp_path: Path) -> None:
    record = train(launcher(flags, profile, 2), CHANGES, tmp_path)
    assert (record.status, record.reason) == ("failed", "forged")
    assert "blocks.0.mixer.out.weight" in record.detail and record.heldout_loss is None


@pytest.mark.parametrize(
    ("text", "said"),
    [(FAILS, "the second one gives up (rank 1)"), pytest.param(DIES, "status 9", marks=pytest.mark.slow)],
)
def test_a_fault_of_one_rank_ends_the_run_and_is_told(
    flags: dict[str, Any], profile: Profile, tmp_path: Path, text: str, said: str
) -> None:
    record = train(launcher(flags, profile, 2), text, tmp_path)
    assert (record.status, record.reason) == ("failed", "crashed")
    assert said in record.detail and record.seconds["total"] < profile.limits.seconds / 2, (
        "nobody waits for who is gone"
    )


def test_more_processes_than_rows_are_refused(flags: dict[str, Any], profile: Profile) -> None:
    with pytest.raises(UsageError, match="at most 4 training processes"):
        launcher(flags, profile, 5)


def test_what_torchrun_asks_for_is_understood() -> None:
    def environment(rank: int, local: int, world: int) -> dict[str, str]:
        names = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": local, "WORLD_SIZE": world}
        return {"TORCHELASTIC_RUN_ID": "x", **{name: str(value) for name, value in names.items()}}

    assert asked_for({"LOCAL_RANK": "0"}) is None
    assert asked_for(environment(1, 2, 2)) == (1, 2)
    with pytest.raises(UsageError, match="2 machines"):
        asked_for(environment(0, 2, 4))
    with pytest.raises(UsageError, match="LOCAL_WORLD_SIZE"):
        asked_for({"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"})


@pytest.mark.slow
def test_more_reports_than_a_pipe_holds_stop_nobody(flags: dict[str, Any], profile: Profile, tmp_path: Path) -> None:
    spec = profile.train.model_copy(update={"steps": 400, "report_every": 1})
    record = train(launcher(flags, profile.model_copy(update={"train": spec}), 2), KEEPS, tmp_path)
    assert record.status == "finished" and len(reports(tmp_path)) > 400


def by_torchrun(profile: Path, text: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command that trains into folder/out, and its environment."""
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "training/train.py"]
    command += ["training/architectures/delta_net.py", "--profile", str(profile), "--text", str(text)]
    environment = {**os.environ, "ASI_TRAINING__CACHE_DIR": str(folder / "cache"), "ASI_TRAINING__DEVICE": "cpu"}
    return [*command, "--out", str(folder / "out")], environment


@pytest.mark.slow
def test_torchrun_trains_on_two_processes(text_file: Path, tmp_path: Path) -> None:
    command, environment = by_torchrun(TINY, text_file, tmp_path)
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = RunRecord.model_validate_json((tmp_path / "out" / "result.json").read_text())
    assert record.status == "finished" and record.hardware["processes"] == 2
    assert done.stdout.count("delta_net: finished") == 1


@pytest.mark.slow
def test_nothing_outlives_a_killed_torchrun_and_the_same_command_goes_on(text_file: Path, tmp_path: Path) -> None:
    profile = tmp_path / "tiny-longer.toml"
    text = TINY.read_text().replace("steps = 30\n", "steps = 300\n")
    profile.write_text(text.replace("[eval]", "[checkpoint]\nsteps = 10\n\n[eval]"))
    command, environment = by_torchrun(profile, text_file, tmp_path)
    with (tmp_path / "said").open("wb") as said:
        started = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=said, stderr=said, start_new_session=True
        )
        deadline = time.monotonic() + 240
        while not checkpoints.kept(tmp_path / "out" / FOLDER):
            assert started.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.1)
        begun = children(started.pid)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    assert int((tmp_path / "out" / ".lock").read_text()) in begun and len(begun) > 3
    deadline = time.monotonic() + 8
    while alive := [pid for pid in begun if _alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert not (tmp_path / "out" / "result.json").exists()
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "goes on from the checkpoint of step" in done.stdout


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
