"""The default store: one SQLite file, WAL, every acknowledged write on disk (synchronous = FULL).

One connection writes, under a lock here and BEGIN IMMEDIATE against other processes; readers use their own
connections and see the last committed state. The small columns lie apart from the documents, so that a question never
reads what it does not answer.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from common.errors import StoreError
from database.sqlite_session import SqliteSession
from database.store import StoreBusyError, StoreFullError

__all__ = ["SqliteStore"]

T = TypeVar("T")
_APPLICATION_ID = 0x41534931
_SCHEMA_VERSION = 1
_IDLE_READERS = 16

_SCHEMA = """
CREATE TABLE elements (
    idx INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    time TEXT NOT NULL,
    parent INTEGER,
    summary TEXT NOT NULL,
    loss REAL,
    benchmark REAL,
    complete INTEGER NOT NULL,
    baseline_key TEXT,
    score REAL,
    pending INTEGER NOT NULL DEFAULT 1,
    key TEXT UNIQUE,
    bytes INTEGER NOT NULL
);
CREATE INDEX elements_name ON elements (name, time, idx);
CREATE INDEX elements_parent ON elements (parent, idx);
CREATE INDEX elements_benchmark ON elements (benchmark DESC, idx);
CREATE INDEX elements_score ON elements (score DESC, idx);
CREATE INDEX elements_baseline ON elements (baseline_key);
CREATE INDEX elements_pending ON elements (idx) WHERE pending = 1;
CREATE INDEX elements_unscored ON elements (idx) WHERE score IS NULL;
CREATE INDEX elements_incomplete ON elements (idx) WHERE complete = 0;
CREATE TABLE documents (idx INTEGER PRIMARY KEY, body TEXT NOT NULL, evidence TEXT NOT NULL, evaluation TEXT);
CREATE TABLE runs (id INTEGER PRIMARY KEY, idx INTEGER NOT NULL, body TEXT NOT NULL);
CREATE INDEX runs_idx ON runs (idx);
CREATE INDEX runs_fingerprint ON runs (json_extract(body, '$.fingerprint'));
CREATE TABLE sketches (idx INTEGER PRIMARY KEY, sketch BLOB NOT NULL);
CREATE TABLE vectors (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    idx INTEGER NOT NULL UNIQUE,
    model TEXT NOT NULL,
    dimension INTEGER NOT NULL,
    windows BLOB NOT NULL
);
CREATE INDEX vectors_model ON vectors (model, sequence);
CREATE TABLE candidates (idx INTEGER PRIMARY KEY);
CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE answers (
    route TEXT NOT NULL,
    key TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (route, key)
) WITHOUT ROWID;
CREATE TABLE baselines (key TEXT PRIMARY KEY, body TEXT NOT NULL);
"""


class SqliteStore:
    """See `database.store.Store`.

    Args:
        file: path of the database; its folder is created when missing.
        lock_timeout: seconds to wait for another process that holds it.

    Raises:
        StoreError: the folder cannot be written, the file is no database of ours, it is locked, or the disk is full.
    """

    def __init__(self, file: str, lock_timeout: float = 10.0) -> None:
        self.path = Path(file).absolute()
        self._lock_timeout = lock_timeout
        self._writing = threading.Lock()
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot create the folder {self.path.parent} of the database: {error.strerror}",
                "name a file in a folder you can write to in --store sqlite:///FILE",
            ) from error
        with _translated(self.path):
            self._writer = self._connect()
            self._prepare()

    def read(self, work: Callable[[SqliteSession], T]) -> T:
        with _translated(self.path):
            connection = self._borrow()
            try:
                connection.execute("BEGIN")
                return work(SqliteSession(connection, self.path))
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if self._readers.qsize() < _IDLE_READERS:
                    self._readers.put(connection)
                else:
                    connection.close()

    def write(self, work: Callable[[SqliteSession], T]) -> T:
        with _translated(self.path), self._writing:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                result = work(SqliteSession(self._writer, self.path))
                self._writer.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, such as a full disk.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            return result

    def close(self) -> None:
        with self._writing:
            while True:
                try:
                    self._readers.get_nowait().close()
                except queue.Empty:
                    break
            self._writer.close()

    def cache_file(self) -> str | None:
        return str(self.path.with_name(self.path.name + ".faiss"))

    def _borrow(self) -> sqlite3.Connection:
        try:
            return self._readers.get_nowait()
        except queue.Empty:
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=self._lock_timeout, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -32000")
        return connection

    def _prepare(self) -> None:
        """Creates the schema in a new file, or makes sure that an existing one is ours; proves that it can be
        written."""
        writer = self._writer
        application = writer.execute("PRAGMA application_id").fetchone()[0]
        version = writer.execute("PRAGMA user_version").fetchone()[0]
        tables = writer.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if tables and application != _APPLICATION_ID:
            raise StoreError(
                f"{self.path} is an SQLite database of another program", "name another file in --store sqlite:///FILE"
            )
        if version > _SCHEMA_VERSION:
            raise StoreError(
                f"expected schema {_SCHEMA_VERSION} of {self.path}, got {version}: a newer release wrote it",
                "use that release, or name another file in --store sqlite:///FILE",
            )
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("BEGIN IMMEDIATE")
        if not writer.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            for statement in _SCHEMA.split(";\n"):
                writer.execute(statement)
            writer.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            writer.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        # A write that changes something is what finds a read-only folder or a full disk now rather than later.
        writer.execute("INSERT OR REPLACE INTO state VALUES ('opened', json_quote(datetime('now')))")
        writer.execute("COMMIT")


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Raises what SQLite says as an error that tells what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "") or ""
        text = f"{path}: {error}"
        if code in (
            "SQLITE_FULL",
            "SQLITE_IOERR_WRITE",
            "SQLITE_IOERR_FSYNC",
            "SQLITE_IOERR_SHMSIZE",
            "SQLITE_IOERR_TRUNCATE",
        ):
            raise StoreFullError(f"cannot write {text}", "free disk space; nothing of this write was kept") from error
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise StoreBusyError(f"{text}", "another process holds the database; end it, or try again") from error
        if code.startswith("SQLITE_NOTADB"):
            raise StoreError(f"{text}", "name an SQLite file, or a new one, in --store sqlite:///FILE") from error
        if code.startswith("SQLITE_CORRUPT"):
            raise StoreError(
                f"{text}", "restore the file from a backup, or name another in --store sqlite:///FILE"
            ) from error
        if code.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
            raise StoreError(
                f"cannot open or write {text}",
                f"make {path.parent} writable, or name another file in --store sqlite:///FILE",
            ) from error
        raise StoreError(f"{text} ({code or type(error).__name__})", "see the server's log") from error
