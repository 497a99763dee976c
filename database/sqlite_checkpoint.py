"""The log of an SQLite store is copied into the file beside the writes, by a thread of its own.

SQLite does it within the commit that makes the log long, and whoever waits for that commit waits for the copy of a
thousand elements. Beside the writes only what came meanwhile is left, which the writer copies between two of its
groups: once all is copied, and nobody reads from the log, it begins anew.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["LONGEST_LOG", "PAGE", "Checkpoints"]

_LOG = logging.getLogger(__name__)
PAGE = 4096
"""Bytes."""
LONGEST_LOG = 8000
"""Pages of the log at which it is brought to begin anew. Where it is twice as long before it is looked at, it is copied
at once."""
_EVERY = 1.0
"""Longest time in seconds from a commit to the copy of what it, and others meanwhile, wrote."""
_PATIENCE_MS = 250
"""Longest wait for those who read."""


class Checkpoints:
    """Copies what is committed, a moment later.

    Args:
        file: the store.
        connect: a connection to the store, made and used in the thread only.
    """

    def __init__(self, file: Path, connect: Callable[[], sqlite3.Connection]) -> None:
        self._file = file
        self._log = file.with_name(file.name + "-wal")
        self._connect = connect
        self._long = False
        self._most = LONGEST_LOG
        self._connection: sqlite3.Connection | None = None
        self._committed = threading.Event()
        self._urgent = threading.Event()
        """The log has become too long to wait."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def committed(self, writer: sqlite3.Connection) -> None:
        """There is something to copy. From the thread that writes, between two transactions."""
        self._committed.set()
        if self._long:
            self._long = False
            # What is wrong with the disk is found, and told, in the thread.
            with contextlib.suppress(sqlite3.Error):
                # Where somebody reads for long, it is not waited for each time.
                self._most = max(LONGEST_LOG, 2 * _left_by_readers(writer))
        else:
            with contextlib.suppress(OSError):
                # Where it begins anew SQLite cuts it to twice `LONGEST_LOG` (`journal_size_limit`): it has grown since.
                if self._log.stat().st_size > 2 * self._most * PAGE:
                    self._urgent.set()

    def close(self) -> None:
        """Ends the thread. What is not copied yet stays in the log, where the next start finds it."""
        self._closing.set()
        self._committed.set()
        self._urgent.set()
        self._thread.join()

    def _run(self) -> None:
        failed = False
        while not self._closing.is_set():
            self._committed.wait()
            # What cannot be copied is not tried at each commit.
            (self._closing if failed else self._urgent).wait(_EVERY)
            if self._closing.is_set():
                break
            if failed and not self._fits():
                continue
            self._committed.clear()
            try:
                self._connection = self._connection or self._connect()
                self._long = _copy(self._connection) > self._most
                self._urgent.clear()
                failed = False
            except sqlite3.Error as error:
                # Nothing is lost: the log grows, and the next write says what is wrong with the disk.
                if not failed:
                    _LOG.warning("the log of the store could not be copied into its file, tried again: %s", error)
                failed = True
                self._drop()
                self._committed.set()
        self._drop()

    def _fits(self) -> bool:
        """Whether the disk has room for all of the log a second time. After a failure less is left to the writes, which
        the copy of a part would take it from."""
        try:
            return shutil.disk_usage(self._file.parent).free >= self._log.stat().st_size
        except OSError:
            return False

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _copy(connection: sqlite3.Connection) -> int:
    """Copies what is committed and nobody needs in its place, without waiting for anybody; returns the pages of the
    log."""
    _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return int(pages)


def _left_by_readers(writer: sqlite3.Connection) -> int:
    """Copies the rest, and waits a moment for those who read from the log: where reads overlap there is always one, and
    the log would never begin anew. Those who begin meanwhile read from the file. Returns the pages of a log that goes
    on because of one who reads for longer; else 0, also where another copies at this moment, as is seen next time."""
    before = writer.execute("PRAGMA busy_timeout").fetchone()[0]
    writer.execute(f"PRAGMA busy_timeout = {_PATIENCE_MS}")
    try:
        busy, pages, _ = writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
    finally:
        writer.execute(f"PRAGMA busy_timeout = {before}")
    return max(0, int(pages)) if busy else 0
