"""python training/check.py, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import verifier_assets as assets

from common.errors import JobError
from common.process import REPOSITORY
from tests.pipeline.running import children, command_line
from training.jobs import run_job
from training.programs import Program, to_job
from training.sandbox import choose

BEST = choose("auto")
real = pytest.mark.skipif(BEST.backend != "bubblewrap", reason=f"no bubblewrap here: {BEST.note}")


def check(*arguments: object, cwd: Path = REPOSITORY, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "training" / "check.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=200)


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_reader_that_left_is_no_refusal(form: tuple[str, ...], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "training/check.py", str(tmp_path), *form]
    done = subprocess.run(argv, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@real
def test_one_json_line_a_file_in_order(tmp_path: Path) -> None:
    narrow, crash, short = tmp_path / "narrow.py", tmp_path / "crash.py", tmp_path / "short.py"
    narrow.write_text(assets.SHAPES["too_short"])
    crash.write_text(assets.hostile("__import__('os')._exit(0)", "import"))
    short.write_text(assets.STATIC["no_kwargs"])
    loop = (
        assets.COST["token_loop"]
        .replace("range(40)", "range(1)")
        .replace("range(o.shape[1])", "range(0, o.shape[1], 32)")
    )
    loop = loop.replace("torch.stack(rows, 1)", "torch.stack(rows, 1).repeat_interleave(32, 1)[:, : o.shape[1]]")
    (tmp_path / "loop.py").write_text(loop)
    done = check("--json", "narrow.py", crash, short, "loop.py", "--check.operations", 0.05, cwd=tmp_path)
    found = lines(done)
    assert [item["program"] for item in found] == ["narrow.py", str(crash), str(short), "loop.py"]
    assert [item["accepted"] for item in found] == [False, False, False, False]
    assert done.returncode == 1, done.stderr
    for item in found:
        for outcome in item["checks"]:
            assert {"name", "passed", "severity", "detail", "counterexample"} <= outcome.keys()
            assert outcome["severity"] in ("refuse", "warn")
        refused = [outcome for outcome in item["checks"] if not outcome["passed"] and outcome["severity"] == "refuse"]
        assert item["accepted"] is not bool(refused)
    shapes = next(outcome for outcome in found[0]["checks"] if outcome["name"] == "shapes")
    assert not shapes["passed"] and {"seed", "batch", "length", "expected"} <= shapes["counterexample"].keys()
    assert (
        found[1]["checks"][-1]["name"] == "sandbox" and found[1]["checks"][-1]["counterexample"]["reason"] == "crashed"
    )
    details = [outcome["detail"] for outcome in found[3]["checks"]]
    assert any("operations are launched per added token, more than 0.05" in detail for detail in details)


def test_a_file_that_cannot_be_read_is_no_verdict(tmp_path: Path) -> None:
    done = check("--json", tmp_path / "missing.py")
    assert done.returncode == 2
    assert [item["accepted"] for item in lines(done)] == [None]
    assert "missing.py" in lines(done)[0]["error"]


def test_refusals_without_a_worker_read_as_a_table(tmp_path: Path) -> None:
    binary, numpy, pipe = tmp_path / "binary.py", tmp_path / "numpy.py", tmp_path / "pipe.py"
    binary.write_bytes(b"\xff\xfe")
    numpy.write_text(assets.STATIC["imports_numpy"])
    os.mkfifo(pipe)
    done = check(binary, numpy, pipe, tmp_path, "/dev/zero")
    assert done.returncode == 1
    assert (
        done.stdout.count("refused") == 5 and "use torch" in done.stdout and "counterexample of static" in done.stdout
    )
    for kind in ("a pipe", "a folder", "a device"):
        assert f"regular file, got {kind}" in " ".join(done.stdout.split())


def test_wrong_use_is_explained() -> None:
    assert check().returncode == 2
    done = check("x.py", ASI_SANDBOX__BACKEND="chroot")
    assert done.returncode == 2 and "sandbox.backend" in done.stderr and "fix:" in done.stderr
    done = check("--help")
    assert done.returncode == 0 and "--sandbox.backend" in done.stdout and "--json" in done.stdout


def test_the_limited_process_refuses_strangers(tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.py"
    stranger.write_text(assets.BASE)
    done = check("--json", stranger, ASI_SANDBOX__BACKEND="process")
    (refused,) = lines(done)
    assert refused["accepted"] is False and done.returncode == 1
    assert refused["checks"][-1]["name"] == "sandbox" and "nobody vouches" in refused["checks"][-1]["detail"]


@pytest.mark.slow
def test_the_limited_process_checks_seeds() -> None:
    seed = REPOSITORY / "training" / "architectures" / "delta_net.py"
    (accepted,) = lines(check("--json", seed, ASI_SANDBOX__BACKEND="process"))
    assert accepted["accepted"] is True


def test_a_fault_of_ours_is_no_verdict(tmp_path: Path) -> None:
    program = tmp_path / "p.py"
    program.write_text(assets.BASE)
    done = check("--json", program, ASI_SANDBOX__BACKEND="bubblewrap", PATH=str(tmp_path))
    (item,) = lines(done)
    assert done.returncode == 2 and item["accepted"] is None
    assert "bwrap is not installed" in item["error"] and "apt-get" in item["error"]


@real
def test_a_cancelled_job_leaves_nothing_behind() -> None:
    program = Program("endless", assets.hostile("while True: pass", "import"))
    cancel = threading.Event()

    def strike() -> None:
        while not any("training.worker" in line for line in _descendants()):
            time.sleep(0.05)
        cancel.set()

    threading.Thread(target=strike, daemon=True).start()
    assert run_job("check", {"programs": to_job([program])}, cancel=cancel) == {"event": "cancelled"}
    deadline = time.monotonic() + 15
    while (left := _descendants()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_a_cancelled_limited_process_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = Program("endless", assets.hostile("while True: pass", "import"), trust="user")
    cancel, seen = threading.Event(), []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "check" and event["check"]["name"] == "reach":  # the sandbox is started next
            threading.Thread(target=watch, daemon=True).start()

    def watch() -> None:
        while not list(tmp_path.glob("asi-arch-job-*")):
            time.sleep(0.02)
        seen.extend(tmp_path.glob("asi-arch-job-*"))
        cancel.set()

    job = {"programs": to_job([program]), "backend": "process"}
    assert run_job("check", job, on_event, cancel, 60) == {"event": "cancelled"}
    assert seen and not list(tmp_path.glob("asi-arch-job-*"))


def test_a_scorer_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(JobError) as found:
        run_job("check", {})
    assert "programs" in str(found.value)
    with pytest.raises(JobError, match="in time"):
        run_job("check", {"programs": to_job([Program("p", assets.BASE)])}, timeout=0.2)


def _descendants() -> list[str]:
    """Command lines of workers and scorers that descend from this test process."""
    lines = [command_line(pid) for pid in children(os.getpid())]
    return [line for line in lines if "training.worker" in line or "scorer" in line]
