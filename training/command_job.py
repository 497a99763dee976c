"""Stands between us and the user's training script: `python training/command_job.py MARK FOLDER WORD...`.

Starts WORD... in FOLDER, says by its exit status how that ended, and ends all of it when whoever started this process
is gone: a script of the user's does not look whether its parent lives. Every process that bears the mark is found, also
one that left the process group.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import signal
import subprocess
import threading
from collections.abc import Sequence

from common.process import PARENT, exit_with_parent
from training.local_job import kill_marked

__all__ = ["MARK", "main"]

MARK = "ASI_COMMAND_MARK"
"""Variable by which the processes of one command are known."""
CANNOT_START = 127


def main(argv: Sequence[str]) -> int:
    mark, folder, *words = argv
    # What is ended gently may still say its last words; a handler, unlike SIG_IGN, is not inherited.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    environment = {name: value for name, value in os.environ.items() if name != PARENT} | {MARK: mark}
    starting = threading.Lock()
    exit_with_parent(before=lambda: _end(mark, starting))
    try:
        with starting:
            command = subprocess.Popen(words, cwd=folder, env=environment, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"cannot start {words[0]}: {error.strerror}", file=sys.stderr)
        return CANNOT_START
    status = command.wait()
    # The first to die may be killed by the watch over our parent, which ends with this process: what it has not yet
    # come to is ended here.
    _end_marked(mark)
    return status if status >= 0 else 128 - status


def _end(mark: str, starting: threading.Lock) -> None:
    # Held until this process ends: nothing is started after the last look.
    with starting:
        _end_marked(mark)
        os.killpg(0, signal.SIGKILL)


def _end_marked(mark: str) -> None:
    """Returns when no process bears the mark."""
    while not kill_marked(MARK, mark):
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
