"""No child of ours outlives its parent, whichever way the parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHILD = (
    "import sys; sys.path.insert(0, {root!r})\nfrom common.process import exit_with_parent\n"
    "exit_with_parent()\nimport time\ntime.sleep(60)"
)
PARENT = (
    "import sys, time; sys.path.insert(0, {root!r})\nfrom common.process import spawn\n"
    "print(spawn([sys.executable, '-c', {child!r}]).pid, flush=True)\ntime.sleep(60)"
)


def test_a_child_ends_within_five_seconds_of_a_killed_parent() -> None:
    child = CHILD.format(root=str(ROOT))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(root=str(ROOT), child=child)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(1.0)
    os.kill(pid, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
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
