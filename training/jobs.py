"""Runs one scorer job as a child process: check or train. Torch-free, used by training/check.py and the launcher."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from common.errors import JobError
from common.process import REPOSITORY, spawn
from training.local_job import SCORER, kill_marked

__all__ = ["CANCELLED", "run_job"]

CANCELLED: dict[str, Any] = {"event": "cancelled"}
"""What `run_job` returns when it was cancelled."""

_TAIL = 16384


def run_job(
    kind: Literal["check", "train"],
    job: dict[str, Any] | Callable[[], dict[str, Any]],
    on_event: Callable[[dict[str, Any]], None] | None = None,
    cancel: threading.Event | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Starts training/scorer/main.py, sends it `job`, and returns its result event.

    Args:
        job: what training/scorer/check_job.py or train_job.py takes, plain JSON; or what makes it, called while the
            scorer starts.
        on_event: called in this thread with each event before the result. What it raises ends the job and is raised.
        cancel: once set, the job's whole group is killed within about 0.2 s and a copy of `CANCELLED` returned.
        timeout: seconds after which the job is killed.

    Raises:
        JobError: the scorer failed through a fault of ours, or took longer than `timeout`. What making the job raises.
    """
    mark = secrets.token_hex(16)
    process = spawn(
        [sys.executable, str(REPOSITORY / "training" / "scorer" / "main.py"), kind],
        env={**os.environ, SCORER: mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    tail = bytearray()
    drain = threading.Thread(target=_drain, args=(process, tail), daemon=True)
    drain.start()
    try:
        assert process.stdin is not None
        text = json.dumps(job() if callable(job) else job)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(text.encode())
            process.stdin.close()
        return _events(process, tail, drain, on_event, cancel, None if timeout is None else time.monotonic() + timeout)
    finally:
        _kill(process)
        kill_marked(SCORER, mark)


def _events(
    process: subprocess.Popen[bytes],
    tail: bytearray,
    drain: threading.Thread,
    on_event: Callable[[dict[str, Any]], None] | None,
    cancel: threading.Event | None,
    deadline: float | None,
) -> dict[str, Any]:
    assert process.stdout is not None
    buffer = bytearray()
    while True:
        if cancel is not None and cancel.is_set():
            return dict(CANCELLED)
        if deadline is not None and time.monotonic() > deadline:
            raise JobError("the scorer did not end in time", f"its last words: {_words(tail)}")
        if not select.select([process.stdout], [], [], 0.2)[0]:
            continue
        part = os.read(process.stdout.fileno(), 1 << 16)
        buffer += part
        *lines, rest = buffer.split(b"\n")
        buffer = bytearray(rest)
        for line in filter(None, lines):
            event = _parse(bytes(line))
            if event.get("event") == "result":
                return event
            if event.get("event") == "error":
                raise JobError(str(event.get("message")), str(event.get("fix") or _words(tail)))
            if on_event is not None:
                on_event(event)
        if not part:
            code = process.wait()
            drain.join(1)
            raise JobError(f"the scorer ended with status {code} before it had a result: {_words(tail)}")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise JobError(f"expected a JSON event from the scorer, got {line[:200]!r}")
    return event


def _drain(process: subprocess.Popen[bytes], tail: bytearray) -> None:
    assert process.stderr is not None
    with process.stderr as pipe:
        while part := os.read(pipe.fileno(), 1 << 16):
            tail += part
            del tail[:-_TAIL]


def _words(tail: bytearray) -> str:
    return tail.decode("utf-8", "replace").strip()[-1500:] or "it said nothing"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the scorer and everything in its group, also when the scorer already ended by itself.

    Its pid names the group while the scorer is not waited for or another member lives; no new process gets the number
    as long as the group is there, and where it is gone the signal finds nothing.
    """
    # A scorer that is ended gently removes the folders of its jobs; on a busy machine that takes a while.
    for sign, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 0.5)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
