"""A database file copied whole: written beside its place, flushed, renamed. Nothing is left of a copy that fails, which
would keep the disk full that it failed on."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from common.errors import StoreError
from database.sqlite_database import CANNOT_WRITE, open_read_only
from database.store import StoreFullError

__all__ = ["copy_database", "partial_of", "told"]

_ENDS = ("", "-journal", "-wal", "-shm")
"""Of the files that SQLite writes for one database."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def partial_of(target: Path) -> Iterator[Path]:
    """`target`.partial, to be written and renamed to `target` in the block. What a run that was killed left of one is
    removed before; where the block raises, what it left."""
    partial = target.with_name(f"{target.name}.partial")
    files = [partial.with_name(partial.name + end) for end in _ENDS]
    for file in files:
        file.unlink(missing_ok=True)
    try:
        yield partial
    except BaseException:
        for file in files:
            with contextlib.suppress(OSError):
                file.unlink()
        raise


def copy_database(source: Path, partial: Path) -> None:
    """Copies `source`, while it is used, to a file that is on disk when this returns and has no log beside it.

    Raises:
        sqlite3.Error, OSError: one cannot be read or the other written; `told` says which.
    """
    with contextlib.closing(open_read_only(source)) as opened:
        # Of one moment, which a read transaction holds: without it each write meanwhile would start the copy anew.
        opened.execute("BEGIN")
        opened.execute("SELECT count(*) FROM sqlite_master").fetchone()
        # The system's own error, where none can be made there: SQLite's does not say which file it means.
        partial.touch()
        with contextlib.closing(sqlite3.connect(partial)) as copy:
            opened.backup(copy, pages=1000)
            copy.execute("PRAGMA journal_mode = DELETE")
    with partial.open("rb+") as handle:
        os.fsync(handle.fileno())


@contextlib.contextmanager
def told(source: Path, target: Path) -> Iterator[None]:
    """Raises what fails between two files, which may be one, as an error that names the file, and the disk that is
    full."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "") or ""
        if code == "SQLITE_IOERR_SHMSIZE":
            raise StoreFullError(
                f"{source} cannot be read: {error}; the disk of {source.parent} is full, and SQLite needs a small file"
                " beside it",
                f"free 1 MB at {source.parent}",
            ) from error
        if code in CANNOT_WRITE:
            raise _full(source, target, str(error)) from error
        raise StoreError(
            f"{source} cannot be copied or read: {error}", "see whether it is a database of ours"
        ) from error
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _full(source, target, os.strerror(error.errno)) from error
        if not target.parent.is_dir():
            raise StoreError(
                f"cannot write {target}: there is no folder {target.parent}", "create it, or name a file elsewhere"
            ) from error
        raise StoreError(
            f"cannot write {target}: {error.strerror}", "name a file in a folder you can write to"
        ) from error


def _full(source: Path, target: Path, said: str) -> StoreFullError:
    folder = target.parent
    free, needed = _megabytes(shutil.disk_usage(folder).free), ""
    if source.exists():
        log = source.with_name(source.name + "-wal")
        size = source.stat().st_size + (log.stat().st_size if log.exists() else 0)
        needed = f"about {_megabytes(size)} are needed, "
    return StoreFullError(
        f"cannot write {target}: {said}; the disk of {folder} is full, or a limit on it or on a file is reached",
        f"free space at {folder} ({needed}{free} are free now), or name a file on another disk",
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
