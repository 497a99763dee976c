"""No child of ours outlives its parent, whichever way the parent ends; and nobody who reads need be there."""

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


SERVICE = (
    "import sys; sys.path.insert(0, {root!r})\nfrom common.process import announce\n"
    "announce('http://127.0.0.1:1')\nprint('served', file=sys.stderr)"
)
COMMAND = (
    "import sys; sys.path.insert(0, {root!r})\nfrom common.process import piped\n"
    "def main():\n    print('broken: 1')\n    return 1\n"
    "raise SystemExit(piped(main))"
)


def _run_into(output: str, program: str, unbuffered: str) -> subprocess.CompletedProcess[str]:
    """`output` is where its stdout goes: a file, "closed", or "left" for a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    redirected = {"closed": ">&-", "left": ""}.get(output, f">{output}")
    argv = ["/bin/sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-c", program.format(root=str(ROOT))]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        return subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        os.close(writing)


@pytest.mark.parametrize("output", ["closed", "left", "/dev/full"])
def test_a_service_serves_though_it_cannot_say_where_on_stdout(output: str) -> None:
    done = _run_into(output, SERVICE, "")
    assert (done.returncode, done.stderr) == (0, "listening on http://127.0.0.1:1\nserved\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("output", "status", "said"), [("closed", 1, ""), ("left", 141, ""), ("/dev/full", 3, "No space left on device")]
)
def test_a_command_whose_output_goes_nowhere_ends_without_a_traceback(
    output: str, status: int, said: str, unbuffered: str
) -> None:
    done = _run_into(output, COMMAND, unbuffered)
    assert done.returncode == status, done.stderr
    assert said in done.stderr if said else done.stderr == ""


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
