"""Checkpoints: whole or not there, of one run only, and a run that goes on from one gives the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import JobError, UsageError
from common.process import REPOSITORY
from common.records import RunRecord
from common.settings import load
from tests.pipeline.running import children, command_line
from tests.training.test_launcher import MEAN, SLEEPS
from training import checkpoints
from training.branch import branched
from training.checkpoints import FOLDER, Checkpoint, Identity
from training.launcher import Event, Launcher
from training.profiles import CheckpointSpec, load_profile
from training.programs import Program
from training.scorer.heldout import ForgedError
from training.scorer.saving import Place, Saver

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"
OWN = Identity("program", "key", 0, "name", "tiny")
TENSORS = {"weights": np.arange(12, dtype=np.float32), "rng": np.arange(5, dtype=np.int32)}


def checkpoint(step: int, identity: Identity = OWN) -> Checkpoint:
    return Checkpoint(identity, step, 1.5, 1.25, [{"step": step, "loss": 0.1 + 0.2, "task_loss": None}], TENSORS)


def test_what_is_written_is_read_again_to_the_last_bit(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, checkpoint(7))
    found = checkpoints.newest(tmp_path, OWN, pytest.fail)
    assert found is not None and replace(found, tensors={}) == replace(checkpoint(7), tensors={})
    assert {name: array.tolist() for name, array in found.tensors.items()} == {
        name: array.tolist() for name, array in TENSORS.items()
    }
    assert checkpoints.newest(tmp_path / "absent", OWN, pytest.fail) is None


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_damaged_one_is_told_and_the_one_before_is_taken(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    checkpoints.write(folder, checkpoint(10))
    path = checkpoints.write(folder, checkpoint(20))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    said: list[str] = []
    found = checkpoints.newest(folder, OWN, said.append)
    assert found is not None
    if found.step == 20:  # white space of the header, or the like: all that is read is as it was written
        assert replace(found, tensors={}) == replace(checkpoint(20), tensors={})
        assert all((found.tensors[name] == array).all() for name, array in TENSORS.items())
    else:
        assert found.step == 10 and "damaged" in said[0] and "the one before" in said[0]


@pytest.mark.parametrize(
    "other", [replace(OWN, program_sha256="p2"), replace(OWN, seed=1), replace(OWN, baseline_key="k2")]
)
def test_those_of_another_run_are_refused_by_name(tmp_path: Path, other: Identity) -> None:
    checkpoints.write(tmp_path, checkpoint(7, other))
    with pytest.raises(UsageError, match="another run") as caught:
        checkpoints.newest(tmp_path, OWN, pytest.fail)
    assert "name another --out" in caught.value.fix
    with pytest.raises(UsageError, match="another run"):
        checkpoints.refuse_foreign(tmp_path, OWN)


def test_only_the_last_and_the_stable_ends_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoints.write(tmp_path, checkpoint(step))
    checkpoints.write(tmp_path, checkpoint(20), stable=True)
    (tmp_path / ".writing-x").write_bytes(b"half")
    checkpoints.prune(tmp_path, 2)
    assert checkpoints.kept(tmp_path)[0].stem == "step-000000030"
    assert {path.stem for path in checkpoints.kept(tmp_path)} == {
        "step-000000020",
        "step-000000030",
        "stable-000000020",
    }
    assert not (tmp_path / ".writing-x").exists()
    checkpoints.settle(tmp_path, keep=True)
    assert {path.stem for path in checkpoints.kept(tmp_path)} == {"step-000000030", "stable-000000020"}
    checkpoints.settle(tmp_path, keep=False)
    assert not tmp_path.exists()


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[tuple[Saver, Path, list[str]]]:
    said: list[str] = []
    made = Saver(
        Place(tmp_path / "c", OWN, 2, frozenset({20})), 100, 5, 30, lambda step: replace(checkpoint(step), tensors={}),
        said.append,
    )  # fmt: skip
    yield made, tmp_path / "c", said
    made.close()


def test_pieces_become_a_checkpoint(saver: tuple[Saver, Path, list[str]]) -> None:
    one, folder, _ = saver
    one.piece({"step": 20, "name": "weights", "last": False}, [TENSORS["weights"][:5]])
    one.piece({"step": 20, "name": "weights", "last": False}, [TENSORS["weights"][5:]])
    one.piece({"step": 20, "name": "rng", "last": True}, [TENSORS["rng"]])
    one.close()
    assert [path.stem for path in checkpoints.kept(folder)] == ["step-000000020", "stable-000000020"]
    assert (checkpoints.read(checkpoints.kept(folder)[0]).tensors["weights"] == TENSORS["weights"]).all()


@pytest.mark.parametrize(
    "meta",
    [
        {"step": 5, "name": "weights", "last": True},
        {"step": 31, "name": "weights", "last": True},
        {"step": True, "name": "weights", "last": True},
        {"step": 20, "name": "../weights", "last": True},
        {"step": 20, "name": "tensor.123456", "last": True},
        {"name": "weights"},
        {},
    ],
)
def test_a_piece_of_another_form_is_forged(saver: tuple[Saver, Path, list[str]], meta: dict[str, Any]) -> None:
    with pytest.raises(ForgedError):
        saver[0].piece(meta, [TENSORS["weights"]])


def test_more_than_a_model_can_hold_is_forged(saver: tuple[Saver, Path, list[str]]) -> None:
    saver[0].piece({"step": 20, "name": "weights", "last": False}, [np.zeros(1 << 23, dtype=np.float64)])
    with pytest.raises(ForgedError, match="bytes"):
        saver[0].piece({"step": 20, "name": "weights", "last": True}, [np.zeros(1 << 23, dtype=np.float64)])
    with pytest.raises(ForgedError):
        saver[0].piece({"step": 21, "name": "weights", "last": True}, [TENSORS["weights"]])


def test_a_disk_that_cannot_be_written_costs_the_checkpoint_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("in the way")
    said: list[str] = []
    one = Saver(
        Place(tmp_path / "c", OWN, 2), 100, 0, 30, lambda step: replace(checkpoint(step), tensors={}), said.append
    )
    one.piece({"step": 20, "name": "weights", "last": True}, [TENSORS["weights"]])
    one.close()
    assert len(said) == 1 and "step 20 was not written" in said[0]


# Whole runs, killed and started again.


@pytest.fixture(scope="module")
def launcher(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    text = TINY.read_text().replace("[eval]", "[checkpoint]\nsteps = 2\n\n[eval]")
    profile = tmp_path_factory.mktemp("profile") / "tiny-saving.toml"
    profile.write_text(text)
    flags = {"training": {"text": [text_file], "cache_dir": tmp_path_factory.mktemp("cache"), "device": "cpu"}}
    made = Launcher(load(None, flags), load_profile(profile))
    made.prepare()
    return made


def slow(seconds: float) -> Program:
    """Trains slowly enough to be killed in the middle."""
    return Program("sample", SLEEPS.replace("0.3", str(seconds)), trust="user")


def numbers(record: RunRecord) -> tuple[Any, ...]:
    return record.status, record.train_loss, record.heldout_loss, record.benchmarks


@pytest.fixture(scope="module")
def whole(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    out = tmp_path_factory.mktemp("whole")
    record = launcher.train(slow(0.03), seed=0, out=out, run_id="whole")
    assert record.status == "finished" and not (out / FOLDER).exists()
    return record


@pytest.mark.slow
@pytest.mark.parametrize("who", ["training.worker", "scorer/main.py"])
def test_a_run_whose_process_was_killed_goes_on_and_gives_the_same_numbers(
    launcher: Launcher, whole: RunRecord, tmp_path: Path, who: str
) -> None:
    struck: list[int] = []
    notes: list[str] = []

    def strike(event: Event) -> None:
        notes.append(event.text)
        if event.kind == "progress" and (event.step or 0) >= 10 and not struck:
            struck.append(max(one for one in children(os.getpid()) if who in command_line(one)))
            os.kill(struck[0], signal.SIGKILL)

    def train() -> RunRecord:
        return launcher.train(slow(0.03), seed=0, out=tmp_path, run_id="whole", on_event=strike, keep=True)

    try:
        record = train()
    except JobError:
        assert who != "training.worker" and struck
        record = train()
    assert struck and any("goes on from the checkpoint of step" in note for note in notes)
    assert numbers(record) == numbers(whole)
    assert [path.stem for path in checkpoints.kept(tmp_path / FOLDER)] == ["step-000000030"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f'{{"step": {step}' for step in (1, 5, 10, 15, 20, 25, 30, 30)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_command_goes_on_after_kills_at_random_moments(text_file: Path, tmp_path: Path) -> None:
    profile = tmp_path / "tiny-saving.toml"
    profile.write_text(TINY.read_text().replace("[eval]", "[checkpoint]\nsteps = 1\n\n[eval]"))
    seed = REPOSITORY / "training" / "architectures" / "delta_net.py"
    environment = {**os.environ, "ASI_TRAINING__CACHE_DIR": str(tmp_path / "cache"), "ASI_TRAINING__DEVICE": "cpu"}
    random = np.random.default_rng(0)
    records = []
    for kills, out in ((0, "whole"), (3, "killed")):
        command = [sys.executable, str(REPOSITORY / "training" / "train.py"), str(seed), "--profile", str(profile)]
        command += ["--text", str(text_file), "--out", str(tmp_path / out)]
        while True:
            with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                steps = 0
                for line in process.stdout:
                    steps += line.startswith("train: step")
                    if kills and (steps or line.startswith("start:")) and random.random() < 0.5:
                        time.sleep(random.random() / 2)
                        process.kill()
                        kills -= 1
                        break
                process.stdout.read()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL
        records.append(RunRecord.model_validate_json((tmp_path / out / "result.json").read_text()))
    assert numbers(records[0]) == numbers(records[1]) and not (tmp_path / "killed" / FOLDER).exists()


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_checkpoints_and_another_program_is_refused(
    launcher: Launcher, whole: RunRecord, tmp_path: Path
) -> None:
    cancel = threading.Event()
    stopped = launcher.train(
        slow(0.03), seed=0, out=tmp_path, run_id="i", cancel=cancel,
        on_event=lambda event: cancel.set() if (event.step or 0) >= 10 else None,
    )  # fmt: skip
    assert stopped.reason == "interrupted" and checkpoints.kept(tmp_path / FOLDER)
    newest = checkpoints.kept(tmp_path / FOLDER)[0]
    newest.write_bytes(newest.read_bytes()[:-8])
    other = Program("other", MEAN, trust="user")
    with pytest.raises(UsageError, match="another run"):
        launcher.train(other, seed=0, out=tmp_path, run_id="i")
    notes: list[str] = []
    again = launcher.train(
        slow(0.03), seed=0, out=tmp_path, run_id="i", on_event=lambda event: notes.append(event.text)
    )
    assert numbers(again) == numbers(whole)
    assert any("is damaged" in note for note in notes) and any("goes on from" in note for note in notes)
    fresh = launcher.train(other, seed=0, out=tmp_path, run_id="i", foreign="discard")
    assert fresh.status == "finished"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stable_end_is_extended_to_the_longer_run_and_decayed(launcher: Launcher, tmp_path: Path) -> None:
    def variant(stable: list[float], **train: Any) -> Launcher:
        spec = launcher.profile.train.model_copy(update={"schedule": "wsd", **train})
        keeping = CheckpointSpec(stable=stable)
        return Launcher(launcher.settings, launcher.profile.model_copy(update={"train": spec, "checkpoint": keeping}))

    def train(one: Launcher, name: str, **options: Any) -> RunRecord:
        return one.train(Program("sample", MEAN, trust="user"), seed=0, out=tmp_path / name, run_id=name, **options)

    short, long = variant([0.5, 1.0], decay=10), variant([], steps=40, decay=10)
    assert train(short, "short", keep=True).status == "finished"
    half, end = sorted(path for path in checkpoints.kept(tmp_path / "short" / FOLDER) if "stable" in path.name)
    assert [checkpoints.describe(path)[1] for path in (half, end)] == [10, 20]
    whole = train(long, "long")
    assert numbers(train(long, "extended", origin=end)) == numbers(whole)
    decayed = train(Launcher(launcher.settings, branched(short.profile, half, 6)), "decayed", origin=half)
    assert decayed.status == "finished" and list(decayed.train_loss)[-1] == "16"
    rates = [json.loads(line).get("lr") for line in (tmp_path / "decayed" / "metrics.jsonl").read_text().splitlines()]
    assert rates[-2] == pytest.approx(0.1 * launcher.profile.train.lr)
    with pytest.raises(UsageError, match="cannot be gone on from"):
        long.train(Program("sample", MEAN, trust="user"), seed=1, out=tmp_path / "x", run_id="x", origin=end)
    with pytest.raises(UsageError, match="ends at step 20"):
        branched(
            short.profile.model_copy(update={"train": short.profile.train.model_copy(update={"steps": 20})}), end, None
        )


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\x02" + b"\x00" * 7 + b"{}", b"\xff" * 9, None])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "start"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    for wrong in (path, tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match="is no checkpoint"):
            checkpoints.describe(wrong)
