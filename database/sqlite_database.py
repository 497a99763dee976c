"""The default store: one SQLite file, WAL, every acknowledged write on disk (synchronous = FULL).

One connection writes: whatever waits becomes one transaction with a savepoint for each write, so that writes share an
fsync and one that fails takes no other along. One that changes much is done alone: to take it back out of a shared
transaction, all that it changes would have to be held in memory. BEGIN IMMEDIATE keeps other processes out meanwhile;
readers use their own connections and see the last committed state.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import from_json

from common.errors import StoreError
from common.files import sha256_text
from database.group_writer import GroupWriter, Write
from database.sqlite_checkpoint import LONGEST_LOG, PAGE, Checkpoints
from database.sqlite_schema import APPLICATION_ID, MIGRATIONS
from database.sqlite_session import LargeWriteError, SqliteSession
from database.store import StoreBusyError, StoreFullError

__all__ = ["CANNOT_WRITE", "SqliteStore", "open_read_only"]

T = TypeVar("T")

CANNOT_WRITE = (
    "SQLITE_FULL",
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_FSYNC",
    "SQLITE_IOERR_SHMSIZE",
    "SQLITE_IOERR_TRUNCATE",
)
"""What SQLite says where the disk is full, or a limit on it or on a file is reached."""
_IDLE_READERS = 16


class SqliteStore:
    """See `database.store.Store`.

    Args:
        file: path of the database; its folder is created when missing.
        lock_timeout: seconds to wait for another process that holds it.
        read_only: changes nothing, and needs no right to: a copy on a read-only disk can be read so. Every write is
            refused.

    Raises:
        StoreError: the folder cannot be written, the file is no database of ours, it is locked, or the disk is full;
            to read only: it is missing, or of an earlier schema.
    """

    snapshots = True

    def __init__(self, file: str, lock_timeout: float = 10.0, read_only: bool = False) -> None:
        self.path = Path(file).absolute()
        self._lock_timeout = lock_timeout
        self._read_only = read_only
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        # None after one that is not to be used again; the next transaction opens another.
        self._writer: sqlite3.Connection | None = None
        with _translated(self.path):
            if read_only:
                self._open_to_read()
            else:
                self._open()
            self._place = self._found()
        self._group: GroupWriter[SqliteSession] = GroupWriter(self._commit, self._closed)
        self._checkpoints = None if read_only else Checkpoints(self.path, self._connect)

    def _open_to_read(self) -> None:
        connection = self._connect()
        version = self._version(connection)
        self._readers.put(connection)
        if version < len(MIGRATIONS):
            raise StoreError(
                f"expected schema {len(MIGRATIONS)} of {self.path}, got {version}: an earlier release wrote it",
                "take the steps that it lacks, on a copy if it must stay: database/admin.py migrate",
            )

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot create the folder {self.path.parent} of the database: {error.strerror}",
                "name a file in a folder you can write to in --store sqlite:///FILE",
            ) from error
        self._writer = self._connect("rwc")
        self._prepare(self._writer)

    def read(self, work: Callable[[SqliteSession], T]) -> T:
        with _translated(self.path):
            connection = self._borrow()
            sound = True
            try:
                connection.execute("BEGIN")
                return work(SqliteSession(connection, self.path))
            except (sqlite3.DatabaseError, StoreError):
                # It may hold pages that were damaged when it read them.
                sound = False
                raise
            finally:
                if sound and connection.in_transaction:
                    connection.execute("ROLLBACK")
                if sound and self._readers.qsize() < _IDLE_READERS:
                    self._readers.put(connection)
                else:
                    connection.close()

    def write(self, work: Callable[[SqliteSession], T]) -> T:
        return self.submit(work).result()

    def submit(self, work: Callable[[SqliteSession], T]) -> Future[T]:
        return self._group.submit(work)

    def close(self) -> None:
        self._group.close()
        if self._checkpoints is not None:
            self._checkpoints.close()
        while True:
            try:
                self._readers.get_nowait().close()
            except queue.Empty:
                break
        self._drop_writer()

    def _commit(self, group: Sequence[Write[SqliteSession]]) -> None:
        """Keeps a group of writes in one transaction. When the transaction itself is lost, each is kept alone."""
        try:
            with _translated(self.path):
                outcomes = self._transact(group)
        except StoreBusyError:
            raise
        except StoreError:
            if len(group) == 1:
                raise
            self._commit_alone(group)
            return
        for write, (value, failure) in zip(group, outcomes, strict=True):
            if failure is None:
                write.succeed(value)
            elif not isinstance(failure, LargeWriteError):
                write.fail(failure)
        if self._checkpoints is not None and self._writer is not None:
            self._checkpoints.committed(self._writer)
        self._commit_alone([write for write in group if not write.done.done()])

    def _commit_alone(self, writes: Sequence[Write[SqliteSession]]) -> None:
        for write in writes:
            try:
                self._commit([write])
            except StoreError as error:
                write.fail(error)

    def _transact(self, group: Sequence[Write[SqliteSession]]) -> list[tuple[Any, BaseException | None]]:
        """(value, error) of each write, once the commit that holds them is on disk.

        Raises:
            sqlite3.Error, StoreError: nothing of the group was kept.
        """
        if self._read_only:
            raise StoreError(f"{self.path} was opened to be read only", "see what wrote to it")
        if self._found() != self._place:
            # What is still open would take the write, and nobody would ever find it.
            raise StoreError(
                f"{self.path} was moved, removed or replaced while it was open",
                "put it back where it was, or start the server again with the file that is to be used",
            )
        # Not at the end of the transaction before: what is committed is acknowledged, whether or not this succeeds.
        writer = self._writer = self._writer or self._connect()
        outcomes: list[tuple[Any, BaseException | None]] = []
        shared = len(group) > 1
        try:
            writer.execute("BEGIN IMMEDIATE")
            for write in group:
                if shared:
                    writer.execute("SAVEPOINT write")
                try:
                    outcomes.append((write.work(SqliteSession(writer, self.path, shared)), None))
                except BaseException as error:
                    # It is the outcome of this write, and of no other.
                    # SQLite gives up the whole transaction by itself after some errors, such as a full disk.
                    if not writer.in_transaction:
                        raise
                    writer.execute("ROLLBACK TO write" if shared else "ROLLBACK")
                    outcomes.append((None, _translation(self.path, error)))
                if shared:
                    writer.execute("RELEASE write")
            if writer.in_transaction:
                writer.execute("COMMIT")
        except sqlite3.DatabaseError:
            self._drop_writer()
            raise
        except BaseException:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            raise
        if any(isinstance(failure, StoreError) for _, failure in outcomes):
            self._drop_writer()
        return outcomes

    def _drop_writer(self) -> None:
        """Closes the connection, which may hold pages that were damaged when it read them, or what could not be
        written; that rolls back."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _closed(self) -> StoreError:
        return StoreError(f"{self.path} is closed", "open it again")

    def cache_file(self) -> str | None:
        return str(self.path.with_name(self.path.name + ".faiss"))

    def _borrow(self) -> sqlite3.Connection:
        try:
            return self._readers.get_nowait()
        except queue.Empty:
            return self._connect()

    def _found(self) -> tuple[int, int] | None:
        """Device and number of the file that lies at our path now; None where there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _connect(self, mode: str = "rw") -> sqlite3.Connection:
        """A connection to a file that is there; `mode` rwc creates it."""
        if self._read_only:
            return open_read_only(self.path, self._lock_timeout)
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode={mode}",
            uri=True,
            timeout=self._lock_timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        # For the schema step that hashes programs.
        connection.create_function("program_sha256", 1, _program_sha256, deterministic=True)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -32000")
        # What a savepoint would bring back: beyond 64 KiB, three elements, it would be written to a file, which takes a
        # quarter of the time of a transaction.
        connection.execute("PRAGMA temp_store = MEMORY")
        # Where the copy beside the writes (`Checkpoints`) does not come along, a commit does it.
        connection.execute(f"PRAGMA wal_autocheckpoint = {4 * LONGEST_LOG}")
        # After one that made it long, such as the removal of many elements. `Checkpoints` sees by it how long it is.
        connection.execute(f"PRAGMA journal_size_limit = {2 * LONGEST_LOG * PAGE}")
        return connection

    def _prepare(self, writer: sqlite3.Connection) -> None:
        """Creates the schema in a new file, or makes sure that an existing one is ours; proves that it can be
        written."""
        self._version(writer)
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("BEGIN IMMEDIATE")
        # Asked again under the lock: another process may have been quicker.
        version = writer.execute("PRAGMA user_version").fetchone()[0]
        for step in MIGRATIONS[version:]:
            for statement in step:
                writer.execute(statement)
        writer.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        writer.execute(f"PRAGMA user_version = {max(version, len(MIGRATIONS))}")
        # A write that changes something is what finds a read-only folder or a full disk now rather than later.
        writer.execute("INSERT OR REPLACE INTO state VALUES ('opened', json_quote(datetime('now')))")
        writer.execute("COMMIT")

    def _version(self, connection: sqlite3.Connection) -> int:
        """The schema of a file of ours; 0 of an empty one.

        Raises:
            StoreError: another program, or a newer release, wrote it.
        """
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if tables and application != APPLICATION_ID:
            raise StoreError(
                f"{self.path} is an SQLite database of another program", "name another file in --store sqlite:///FILE"
            )
        if version > len(MIGRATIONS):
            raise StoreError(
                f"expected schema {len(MIGRATIONS)} of {self.path}, got {version}: a newer release wrote it",
                "use that release, or name another file in --store sqlite:///FILE",
            )
        return version


def open_read_only(path: Path, timeout: float = 10.0) -> sqlite3.Connection:
    """A connection that only reads, also where nothing beside the file can be written.

    Raises:
        sqlite3.Error: it is no database, or it is missing.
        StoreError: what was committed last lies in a log that cannot be read there.
    """
    place = path.absolute()
    for extra in ("", "&immutable=1"):
        connection = sqlite3.connect(
            f"{place.as_uri()}?mode=ro{extra}", uri=True, timeout=timeout, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA schema_version").fetchone()
            return connection
        except sqlite3.OperationalError as error:
            connection.close()
            # SQLite shares what it knows of the log through a file beside it, which it cannot make on a read-only disk.
            if error.sqlite_errorname != "SQLITE_CANTOPEN" or extra or not place.exists():
                raise
            log = place.with_name(place.name + "-wal")
            if log.exists() and log.stat().st_size:
                raise StoreError(
                    f"{place} cannot be read without writing beside it: {log.name} holds its last changes",
                    "copy both files to a folder you can write to",
                ) from error
    raise AssertionError("the second way returned or raised")


def _program_sha256(body: str) -> str | None:
    """The hash of an element's whole program; None where its document cannot be read, which `verify` names."""
    try:
        return sha256_text(from_json(body)["program"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Raises what SQLite says as an error that tells what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translation(path, error) from error


def _translation(path: Path, error: BaseException) -> BaseException:
    """What SQLite says as an error that tells what to do; any other error as it is."""
    if not isinstance(error, sqlite3.Error):
        return error
    code = getattr(error, "sqlite_errorname", "") or ""
    text = f"{path}: {error}"
    if code in CANNOT_WRITE:
        return StoreFullError(f"cannot write {text}", "free disk space; nothing of this write was kept")
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreBusyError(f"{text}", "another process holds the database; end it, or try again")
    if code.startswith("SQLITE_NOTADB"):
        return StoreError(f"{text}", "name an SQLite file, or a new one, in --store sqlite:///FILE")
    if code.startswith("SQLITE_CORRUPT"):
        return StoreError(f"{text}", "restore the file from a backup, or name another in --store sqlite:///FILE")
    if path.is_dir():
        return StoreError(f"{path} is a folder", f"name a file in it: --store sqlite:///{path}/database.sqlite")
    if code.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
        return StoreError(
            f"cannot open or write {text}",
            f"make {path.parent} writable, or name another file in --store sqlite:///FILE",
        )
    return StoreError(f"{text} ({code or type(error).__name__})", "see the server's log")
