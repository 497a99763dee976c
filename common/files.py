"""Files that survive a kill: written beside, flushed to disk, renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from common.errors import StoreError

__all__ = ["read_json", "replacing", "sha256_text", "write_atomic", "write_json"]


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
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        temporary = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}", "free disk space or choose another --data-dir"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()


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
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is not readable JSON: {error}", f"look at {path}; remove it to start over") from error


def sha256_text(text: str) -> str:
    """SHA-256 of the UTF-8 bytes of `text`, in hex."""
    import hashlib

    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
