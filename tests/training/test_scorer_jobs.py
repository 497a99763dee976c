"""The end of a scorer job takes its whole group along, and what a result depends on is in the baseline key."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import verifier_assets as assets

from common.errors import JobError
from common.process import spawn
from tests.pipeline.running import children, command_line
from training.environment import TRAINER_SOURCES
from training.jobs import _kill, run_job
from training.programs import Program, to_job


def test_what_a_scorer_left_in_its_group_ends_with_it() -> None:
    code = "import subprocess; print(subprocess.Popen(['/bin/sleep', '318'], stdout=subprocess.DEVNULL).pid)"
    for waited in (True, False):
        scorer = spawn([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert scorer.stdout is not None
        child = int(scorer.stdout.readline())
        if waited:
            assert scorer.wait(60) == 0
        _kill(scorer)
        deadline = time.monotonic() + 5
        while _lives(child) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _lives(child)
        _kill(scorer)  # the group is gone: nothing happens


def test_what_a_killed_scorer_leaves_between_two_steps_of_bubblewrap_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("bwrap")
    assert real is not None
    # Like bubblewrap's child before it dies with its parent: a process of the job that only waits.
    wait = f"{1000 + os.getpid() / 1e4:.4f}"
    (tmp_path / "bwrap").write_text(f'#!/bin/sh\n/bin/sleep {wait} &\nexec {real} "$@"\n')
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    struck: list[int] = []

    def strike(event: dict[str, Any]) -> None:
        if event["event"] == "check" and event["check"]["name"] == "construct" and not struck:
            assert _waiting(wait)
            struck.append(max(one for one in children(os.getpid()) if "scorer/main.py" in command_line(one)))
            os.kill(struck[0], signal.SIGKILL)

    program = Program("endless", assets.hostile("while True: pass", "forward"), trust="user")
    with pytest.raises(JobError):
        run_job("check", {"programs": to_job([program]), "backend": "bubblewrap"}, strike, timeout=60)
    assert struck and not _waiting(wait)


def _waiting(seconds: str) -> bool:
    found = subprocess.run(["pgrep", "-f", f"^/bin/sleep {seconds}"], capture_output=True, check=False)
    return found.returncode == 0


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_baseline_key_covers_all_that_trains_and_scores() -> None:
    wanted = {"training/worker/program.py", "training/worker/state.py", "training/fla_compat/modules/convolution.py"}
    wanted |= {f"training/scorer/{name}.py" for name in ("audit", "confirm", "fresh", "scored", "scoring", "verdict")}
    wanted |= {"training/profiles.py", "training/sections.py", "training/worker/guard.py", "training/worker/trial.py"}
    wanted |= {"training/worker/weights.py", "training/scorer/items.py", "training/items.py"}
    assert wanted <= set(TRAINER_SOURCES) and len(TRAINER_SOURCES) == len(set(TRAINER_SOURCES))
