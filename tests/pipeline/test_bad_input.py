"""Bad input is refused at the door: one clear message, an exit status that is not 0, nothing half-written."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import JournalError, ServiceError
from common.settings import load
from pipeline.experiment import journal
from pipeline.services import Services
from pipeline.workspace import Workspace
from tests.pipeline.running import ROOT, TINY, run
from training.profiles import load_profile


def refused(done: subprocess.CompletedProcess[str], *told: str, status: int = 2) -> None:
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr + done.stdout
    assert "fix: " in done.stderr
    for word in told:
        assert word in done.stderr, done.stderr


def test_unknown_profile(tmp_path: Path) -> None:
    refused(run(tmp_path / "run", 1, profile="cpu-smok"), "cpu-smok", "cpu-smoke")
    assert not (tmp_path / "run").exists()


def test_a_data_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run(tmp_path / "file" / "run", 1), "cannot write the data-dir")


def test_a_typo_in_the_config_file(tmp_path: Path) -> None:
    config = tmp_path / "asi.toml"
    config.write_text("[run]\nexperimnts = 3\n")
    refused(run(tmp_path / "run", None, "--config", str(config)), "did you mean 'experiments'")
    assert not (tmp_path / "run").exists()


def test_a_second_pipeline_on_the_same_data_dir(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write("4711")
        handle.flush()
        refused(run(tmp_path, 1), "4711", "in use")


def test_another_profile_or_seed_on_the_same_data_dir(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "a", "profile": "20m", "seed": 0}))
    (tmp_path / "experiments" / "0001").mkdir(parents=True)
    refused(run(tmp_path, 1, profile="cpu"), "'20m'")


def test_a_start_that_failed_before_it_did_anything_binds_nobody(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "a", "profile": "20m", "seed": 0}))
    workspace = Workspace(tmp_path, load(None, {"run": {"data_dir": tmp_path, "profile": "cpu", "seed": 3}}))
    workspace.close()
    found = json.loads((tmp_path / "run.json").read_text())
    assert (found["run_id"], found["profile"], found["seed"]) == ("a", "cpu", 3)


def test_a_corrupt_journal(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "0001"
    folder.mkdir(parents=True)
    (folder / "update.json").write_text('{"index": 3')
    refused(run(tmp_path, 1), "update.json", status=3)
    assert (folder / "update.json").read_text() == '{"index": 3'
    for content in ("[]", '{"index": 3}'):
        (folder / "update.json").write_text(content)
        with pytest.raises(JournalError, match=r"update\.json") as told:
            journal(folder.parent, "run")
        assert told.value.fix and (folder / "update.json").read_text() == content


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for entry in ("database/mongodb_api.py", "cognition_base/rag_api.py"):
            done = subprocess.run(
                [sys.executable, str(ROOT / entry), "--port", port],
                capture_output=True,
                text=True,
                timeout=60,
                cwd=os.environ["HOME"],
            )
            refused(done, port)


def test_an_address_that_is_not_ours_is_told_with_its_flag() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "cognition_base/rag_api.py"), "--host", "192.0.2.1", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    refused(done, "192.0.2.1", "--host")
    assert "--port" not in done.stderr


def test_a_reader_that_is_gone_is_no_fault(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, str(ROOT / "training/check.py"), "--json", "missing.py"]
    done = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, cwd=tmp_path)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def heard() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, the tests among it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("script", "words", "sent", "status"),
    [
        ("pipeline/pipeline.py", ["--experiments", "1", "--profile", "cpu-smoke", "--data-dir", "run"], "SIGINT", 130),
        ("training/train.py", ["program.py", "--out", "out"], "SIGINT", 4),
        ("training/train.py", ["program.py", "--out", "out"], "SIGTERM", 4),
    ],
)
def test_a_signal_during_the_imports_is_one_line_and_the_status_of_one_that_comes_later(
    tmp_path: Path, script: str, words: list[str], sent: str, status: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=tmp_path, preexec_fn=heard,
    )  # fmt: skip
    while process.poll() is None and "pydantic" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    process.send_signal(signal.Signals[sent])
    printed, errors = process.communicate(timeout=20)
    assert (process.returncode, printed, errors) == (status, "", "\ninterrupted\n")
    assert not list(tmp_path.iterdir())


def test_what_a_service_says_when_it_does_not_start_is_told_also_where_no_log_can_be_written(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/file/database.sqlite"
    (tmp_path / "file").write_text("")
    settings = load(None, {"database": {"store": store}})
    with pytest.raises(ServiceError, match=r"did not start \(exit status 3\):\nerror: cannot .*file") as told:
        Services(settings, load_profile(str(TINY)), tmp_path / "d", tmp_path / "no such folder").start_database()
    assert str(told.value).count("fix: ") == 1 and told.value.fix


def test_a_service_that_does_not_answer(tmp_path: Path) -> None:
    done = run(
        tmp_path, 1, "--services.database_url", "http://127.0.0.1:9", "--services.cognition_url", "http://127.0.0.1:9"
    )
    refused(done, "does not answer", status=3)
