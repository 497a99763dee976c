"""Files that survive a kill: written beside, flushed to disk, renamed into place. And files that somebody names, which
may be anything."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from common.errors import StoreError, UsageError

__all__ = [
    "WRITTEN_BY_HAND",
    "NotRegularError",
    "held",
    "put_in_place",
    "read_json",
    "read_regular",
    "remove_abandoned",
    "replacing",
    "sha256_text",
    "write_atomic",
    "write_json",
]

WRITTEN_BY_HAND = 1 << 20
"""Bytes of a text that a person writes and reads: settings, a profile, a program. What is longer is none."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class NotRegularError(OSError):
    """Something lies there, but no file of a bounded size: its reader would wait or never end. `strerror` says what."""


def read_regular(path: Path, limit: int = WRITTEN_BY_HAND) -> bytes:
    """The bytes of a file that somebody named: it may be a pipe, a device, a folder or terabytes.

    Args:
        limit: most bytes that are taken.

    Raises:
        NotRegularError: it is no regular file, or longer.
        OSError: it is missing or cannot be opened.
    """
    # Opening a pipe waits for its writer, unless told not to.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            raise NotRegularError(errno.EINVAL, f"expected a regular file, got {_KINDS.get(kind, 'something else')}")
        with os.fdopen(descriptor, "rb", closefd=False) as handle:
            content = handle.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise NotRegularError(errno.EFBIG, f"expected at most {limit:,} bytes, got more")
    return content


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` in one step when the block ends, and is gone where it raises: a
    reader sees the old content or the new, never a part.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as handle:
            # Says that it is being written for as long as this process lives; not every file system can.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            os.fchmod(handle.fileno(), 0o644)
            put_in_place(Path(temporary), path)
            temporary = None
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}", "free disk space, or name a folder that can be written"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()


def put_in_place(written: Path, path: Path) -> None:
    """Renames a file of the same folder, which is on disk, to `path`; returns when the name is on disk too.

    Raises:
        OSError: it cannot be.
    """
    written.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_abandoned(path: Path, seconds: float = 600.0) -> None:
    """Removes what `replacing` left beside `path` where its process was killed. What cannot be removed stays.

    A living process locks what it writes, but for one of an earlier release: what was written to within `seconds` stays
    as well. Where the file system knows no locks nothing is removed.
    """
    form = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for name in [entry.name for entry in entries if form.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                _remove_unheld(path.parent / name, time.time() - seconds)


def _remove_unheld(file: Path, before: float) -> None:
    """Removes a regular file that was written last `before` (Unix seconds) and that nobody has locked.

    Raises:
        OSError: somebody has, or it cannot be removed.
    """
    # Locks of some network file systems need a file that may be written. Opening a pipe would wait.
    descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(descriptor)
        # It may have been put in its place since its name was read.
        if stat.S_ISREG(found.st_mode) and found.st_mtime < before and found.st_ino == file.lstat().st_ino:
            file.unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds `folder`, which is made where it is missing, against other processes that ask; the kernel lets go of it
    when this one dies. The file `.lock` stays, with the id of the process that held it last.

    Raises:
        UsageError: another process holds it. StoreError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+")
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror}", "name another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read(20)
            named = f" (process {holder})" if holder.isdecimal() else ""
            raise UsageError(
                f"another command that is running{named} writes into {folder}", "wait for it, or name another folder"
            ) from None
        try:
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
        except OSError as error:
            raise StoreError(f"cannot write {folder}: {error.strerror}", "free disk space, or name another") from error
        yield


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces `path` in one step, as `replacing`.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    try:
        data = content.encode() if isinstance(content, str) else content
    except UnicodeEncodeError as error:
        raise StoreError(f"cannot write {path}: {error}", "this is a fault of ours: report it with the text") from error
    with replacing(path) as handle:
        handle.write(data)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as one atomic JSON file. NaN and infinities are refused: a missing number is None."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads one JSON file.

    Raises:
        StoreError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not readable JSON: {error}", f"look at {path}; remove it to start over") from error


def sha256_text(text: str) -> str:
    """SHA-256 of the UTF-8 bytes of `text`, in hex."""
    import hashlib

    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
