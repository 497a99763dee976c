"""The trusted process of one job: `python training/scorer/main.py check|train < job.json`, started by training/jobs.py.

Reads one JSON job from standard input, which may come late, and prints one JSON event a line; the last is
{"event": "result", ...}, or {"event": "error", message, fix} for a fault of ours. Candidate code never runs here.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import json
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from common.errors import AsiError
from common.process import exit_with_parent
from training import local_job

__all__ = ["main"]

Emit = Callable[[dict[str, Any]], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job on standard input. Returns 0, or 3 when it failed through a fault of ours."""
    exit_with_parent(before=local_job.abandon)
    signal.signal(signal.SIGTERM, _ended)
    emit = _emitter()
    try:
        run = _runner((sys.argv[1:] if argv is None else argv)[0])
        result = run(json.load(sys.stdin), emit)
        emit({"event": "result", **result})
    except AsiError as error:
        emit({"event": "error", "message": error.message, "fix": error.fix})
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the process boundary: the parent reports what went wrong here
        traceback.print_exc()
        emit({"event": "error", "message": f"{type(error).__name__}: {error}", "fix": traceback.format_exc(limit=-4)})
        return 3
    return 0


def _ended(number: int, frame: FrameType | None) -> None:
    """A job that is cancelled ends at once, but leaves no folder behind."""
    local_job.abandon()
    os._exit(128 + number)


def _emitter() -> Emit:
    """Writes events to the real stdout, and sends whatever else prints to stderr."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(event: dict[str, Any]) -> None:
        with lock:
            events.write(json.dumps(event) + "\n")
            events.flush()

    return emit


def _runner(kind: str) -> Callable[[dict[str, Any], Emit], dict[str, Any]]:
    if kind == "check":
        from training.scorer import check_job

        return check_job.run
    from training.scorer import train_job

    return train_job.run


if __name__ == "__main__":
    sys.exit(main())
