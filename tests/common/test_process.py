"""No child of ours outlives its parent, whichever way the parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = (
    "import os, sys; sys.path.insert(0, {root!r})\nfrom common.process import exit_with_parent\n"
    "exit_with_parent({watched})\nimport time\ntime.sleep(60)"
)
PARENT = (
    "import sys, time; sys.path.insert(0, {root!r})\nfrom common.process import spawn\n"
    "print(spawn([sys.executable, '-c', {child!r}]).pid, flush=True)\ntime.sleep(60)"
)


# Such as torchrun: it says nothing of itself, and its child has a session of its own.
OTHER = (
    "import subprocess, sys, time\n"
    "print(subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True).pid, flush=True)\n"
    "time.sleep(60)"
)


@pytest.mark.parametrize(("parent", "watched"), [(PARENT, ""), (OTHER, "parent=os.getppid()")])
def test_a_child_ends_within_five_seconds_of_a_killed_parent(parent: str, watched: str) -> None:
    child = CHILD.format(root=str(ROOT), watched=watched)
    process = subprocess.Popen(
        [sys.executable, "-c", parent.format(root=str(ROOT), child=child)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(1.0)
    os.kill(pid, 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.1)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
