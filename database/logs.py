"""The log of the service: lines on stderr, written in a thread of their own."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import deque
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

__all__ = ["GatheredLines", "log_to_stderr"]

_GATHER_SECONDS = 0.05
_MOST = 20_000
"""Lines that wait for whoever reads stderr."""
_LAST_SECONDS = 1.0
"""How long the end of the process waits for that reader."""


def log_to_stderr(form: Literal["text", "json"]) -> None:
    """Sends the log of this process to stderr: a text a line, or one JSON object a line."""
    handler = GatheredLines()
    if form == "json":
        fields = "%(asctime)s %(name)s %(levelname)s %(message)s"
        renamed = {"asctime": "time", "name": "logger", "levelname": "level"}
        handler.setFormatter(JsonFormatter(fields, rename_fields=renamed))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # No form names them, and to find them out for each line takes longer than to keep the line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    for name in ("httpx", "faiss.loader"):
        logging.getLogger(name).setLevel(logging.WARNING)


class GatheredLines(logging.Handler):
    """Writes to stderr what came within a moment with one call, in a thread of its own, which a warning or worse wakes
    at once; the rest at the end of the process. What a line is given must not change afterwards: it is made when it is
    written.

    A line by line costs each request a system call, in the loop that all requests share, and with it the interpreter's
    lock, which the thread that commits may then hold for a while. Where nobody reads stderr the thread waits, and
    nothing else: lines beyond the last 20,000 are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._records: deque[logging.LogRecord | threading.Event] = deque()
        """And, between them, what is set when all before it is written."""
        self._dropped = 0
        self._some = threading.Event()
        self._urgent = threading.Event()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._records) >= _MOST:
            self._dropped += 1
            return
        self._records.append(record)
        if record.levelno >= logging.WARNING:
            self._urgent.set()
        if not self._some.is_set():
            self._some.set()

    def flush(self) -> None:
        """Waits until what was logged so far is written. A second at most: the thread may wait for a reader that never
        comes."""
        written = threading.Event()
        self._records.append(written)
        self._urgent.set()
        self._some.set()
        written.wait(_LAST_SECONDS)

    def _write(self) -> None:
        taken = [self._records.popleft() for _ in range(len(self._records))]
        records = [record for record in taken if isinstance(record, logging.LogRecord)]
        lines = [line for record in records if (line := self._line(record)) is not None]
        if self._dropped:
            lines.append(f"{self._dropped} lines are left out: nobody read those before them")
            self._dropped = 0
        if lines:
            # Nobody may read stderr any more; the service goes on.
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write("\n".join(lines) + "\n")
                sys.stderr.flush()
        for written in taken:
            if isinstance(written, threading.Event):
                written.set()

    def _line(self, record: logging.LogRecord) -> str | None:
        try:
            return self.format(record)
        except Exception:  # noqa: BLE001 - the boundary of a thread: a wrong call of the log is told, and ends nothing
            self.handleError(record)
            return None

    def _run(self) -> None:
        while True:
            self._some.wait()
            self._urgent.wait(_GATHER_SECONDS)
            self._some.clear()
            self._urgent.clear()
            self._write()
