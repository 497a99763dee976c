"""The user's own training script (training.command): what it is called with, and its run from start to end.

It is the user's own, so nothing holds it but a time limit; and so nothing holds the program that it trains.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.command_words import file_of, filled, words_of
from common.errors import StoreError, UsageError
from common.process import REPOSITORY, spawn
from common.text import printable
from training.command_job import MARK
from training.local_job import kill_marked

__all__ = ["LOG", "WARNING", "Command", "Ended", "label"]

LOG = "command.log"
"""What the command printed, in its folder, as it goes on."""
WARNING = (
    "training.command runs every program WITHOUT a sandbox, with your rights, and its numbers are unaudited: "
    "taken as your command reports them"
)
_GRACE = 3.0
_SAID_EVERY = 5.0
"""Seconds between two looks at the last line of the log."""
_TAIL = 16384


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (None where it was ended from here, and why), and the end of its log."""

    status: int | None
    reason: Literal["timeout", "interrupted"] | None
    said: str


@dataclass(frozen=True)
class Command:
    """One command, with its placeholders.

    Raises:
        UsageError: what it is to start is not there.
    """

    text: str
    seconds: float

    def __post_init__(self) -> None:
        if shutil.which(self.words[0]) is None:
            raise UsageError(
                f"expected training.command to start with a program, got {self.words[0]!r}, which is not on PATH or "
                "cannot be executed",
                "name an existing program: 'bash train.sh {program} {seed} {out}'",
            )

    @property
    def words(self) -> list[str]:
        return words_of(self.text)

    def facts(self) -> dict[str, str]:
        """What a result depends on: the words, and the bytes of every file that they name by a path.

        Raises:
            UsageError: one of the files cannot be read.
        """
        named = {word: file_of(word) for word in self.words if "/" in word}
        return {"command": self.text} | {word: _hash(path) for word, path in named.items() if path is not None}

    def run(
        self, values: dict[str, str], folder: Path, cancel: threading.Event | None, tell: Callable[[str], None]
    ) -> Ended:
        """Runs it in `folder` until it ends, is cancelled or its time is over; nothing of it is left then.

        Args:
            values: of the placeholders.
            tell: told the last line that it printed, now and then.

        Raises:
            StoreError: the log cannot be written.
        """
        mark, log = secrets.token_hex(16), folder / LOG
        words = [str(REPOSITORY / "training" / "command_job.py"), mark, str(folder), *filled(self.words, values)]
        # Settings of ours, in any case of letters: they hold keys and addresses with passwords, and a script that calls
        # our trainer would call itself by ASI_TRAINING__COMMAND.
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("ASI_")}
        try:
            with log.open("wb") as output:
                process = spawn([sys.executable, *words], env=environment, stdout=output, stderr=output)
        except OSError as error:
            raise StoreError(
                f"cannot write {log}: {error.strerror}", "free disk space, or name another --out"
            ) from error
        reason: Literal["timeout", "interrupted"] | None = None
        try:
            reason = self._wait(process, log, cancel, tell)
        finally:
            _end(process, mark, gently=reason is not None)
        return Ended(None if reason else process.returncode, reason, _tail(log))

    def _wait(
        self,
        process: subprocess.Popen[bytes],
        log: Path,
        cancel: threading.Event | None,
        tell: Callable[[str], None],
    ) -> Literal["timeout", "interrupted"] | None:
        begun = heard = time.monotonic()
        last = ""
        while process.poll() is None:
            if cancel is not None and cancel.is_set():
                return "interrupted"
            now = time.monotonic()
            if now - begun > self.seconds:
                return "timeout"
            if now - heard > _SAID_EVERY:
                heard = now
                line = (_tail(log, 2000).strip().splitlines() or [""])[-1][:200]
                if line not in ("", last):
                    last = line
                    tell(line)
            time.sleep(0.05)
        return None


def label(name: str) -> str:
    """`name` as a command may be given it: letters, digits, "_", "-" and ".", so that a shell takes it for one word
    and a file can be called so."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".-")[:120] or "program"


def _hash(path: Path) -> str:
    """SHA-256 of a file's bytes, however many."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}, which training.command names: {error.strerror}",
            "results are kept apart by what the files of the command hold: make it readable, or leave it out",
        ) from error


def _end(process: subprocess.Popen[bytes], mark: str, gently: bool) -> None:
    """Ends the command's group, and what left the group."""
    for sign, seconds in ((signal.SIGTERM, _GRACE),) * gently + ((signal.SIGKILL, None),):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    kill_marked(MARK, mark)


def _tail(log: Path, size: int = _TAIL) -> str:
    try:
        with log.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - size))
            return printable(handle.read(size).decode("utf-8", "replace").replace("\r", "\n"))
    except OSError:
        return ""
