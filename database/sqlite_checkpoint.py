"""The log of an SQLite store is copied into the file beside the writes, by a thread of its own.

SQLite does it within the commit that makes the log long, and whoever waits for that commit waits for the copy of a
thousand elements. Beside the writes only what came meanwhile is left, which the writer copies between two of its
groups: once all is copied, and nobody reads from the log, it begins anew.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable

__all__ = ["LONGEST_LOG", "Checkpoints"]

_LOG = logging.getLogger(__name__)
LONGEST_LOG = 8000
"""Pages of the log (4 KiB each) at which it is brought to begin anew."""
_EVERY = 1.0
"""Seconds from a commit to the copy of what it, and others meanwhile, wrote."""
_PATIENCE_MS = 100


class Checkpoints:
    """Copies what is committed, a moment later.

    Args:
        connect: a connection to the store, made and used in the thread only.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._long = False
        self._connection: sqlite3.Connection | None = None
        self._committed = threading.Event()
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
                _begin_anew(writer)

    def close(self) -> None:
        """Ends the thread. What is not copied yet stays in the log, where the next start finds it."""
        self._closing.set()
        self._committed.set()
        self._thread.join()

    def _run(self) -> None:
        failed = False
        while not self._closing.is_set():
            self._committed.wait()
            if self._closing.wait(_EVERY):
                break
            self._committed.clear()
            try:
                self._connection = self._connection or self._connect()
                self._long = _copy(self._connection) > LONGEST_LOG
                failed = False
            except sqlite3.Error as error:
                # Nothing is lost: the log grows, and the next write says what is wrong with the disk.
                if not failed:
                    _LOG.warning("the log of the store could not be copied into its file, tried again: %s", error)
                failed = True
                self._drop()
                self._committed.set()
        self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _copy(connection: sqlite3.Connection) -> int:
    """Copies what is committed and nobody needs in its place, without waiting for anybody; returns the pages of the
    log."""
    _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return int(pages)


def _begin_anew(writer: sqlite3.Connection) -> None:
    """Copies the rest, and waits a moment for those who read from the log: where reads overlap there is always one, and
    the log would never begin anew. Those who begin meanwhile read from the file."""
    before = writer.execute("PRAGMA busy_timeout").fetchone()[0]
    writer.execute(f"PRAGMA busy_timeout = {_PATIENCE_MS}")
    try:
        writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
    finally:
        writer.execute(f"PRAGMA busy_timeout = {before}")
