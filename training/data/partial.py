"""What a long preparation has done so far: files that only grow, and progress.json, which says how much of each counts.

progress.json is replaced after the files are on the disk, so after a kill at any moment it names whole bytes: what lies
behind them is cut off. It holds a hash of each file, which the next start proves.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from common.errors import StoreError
from common.files import read_json, write_json

__all__ = ["PROGRESS", "Partial"]

PROGRESS = "progress.json"
_BLOCK = 1 << 24


class Partial:
    """Files that grow in `folder`, which is theirs.

    Args:
        names: of the files.
        identity: of what is prepared: what was kept of another is dropped.

    Attributes:
        kept: the facts of the last commit, where an earlier start left one; None: the files are empty.
        note: why nothing was kept though something lies there; None where there is nothing to tell.
    """

    def __init__(self, folder: Path, names: Sequence[str], identity: str) -> None:
        self._folder, self._names, self._identity = folder, names, identity
        self._files: dict[str, IO[bytes]] = {}
        self._digests = {name: hashlib.sha256() for name in names}
        self._sizes = dict.fromkeys(names, 0)
        self.note: str | None = None
        self.kept: dict[str, Any] | None = self._proven()

    def __enter__(self) -> Self:
        """Raises: OSError: the files cannot be written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self.kept is None:
            (self._folder / PROGRESS).unlink(missing_ok=True)
        for name in self._names:
            handle = (self._folder / name).open("ab")
            handle.truncate(self._sizes[name])
            self._files[name] = handle
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for handle in self._files.values():
            handle.close()

    def read(self, name: str) -> bytes:
        """The bytes of one file that count."""
        with (self._folder / name).open("rb") as handle:
            return handle.read(self._sizes[name])

    def append(self, name: str, content: bytes) -> None:
        """They count from the next `commit` on."""
        self._files[name].write(content)
        self._digests[name].update(content)
        self._sizes[name] += len(content)

    def flush(self) -> None:
        """Other readers see what was appended.

        Raises:
            OSError: the disk is full.
        """
        for handle in self._files.values():
            handle.flush()

    def commit(self, facts: dict[str, Any]) -> None:
        """From here the next start goes on.

        Raises:
            OSError, StoreError: the disk is full.
        """
        self.flush()
        for handle in self._files.values():
            os.fsync(handle.fileno())
        files = {name: {"bytes": self._sizes[name], "sha256": self._digests[name].hexdigest()} for name in self._names}
        write_json(self._folder / PROGRESS, {"identity": self._identity, "files": files, "facts": facts})

    def _proven(self) -> dict[str, Any] | None:
        if not (self._folder / PROGRESS).is_file():
            return None
        try:
            found = read_json(self._folder / PROGRESS)
            if found["identity"] != self._identity:
                self.note = "what an earlier start kept is of another state of its source"
                return None
            sizes = {name: int(found["files"][name]["bytes"]) for name in self._names}
            digests = {name: self._digest(name, sizes[name]) for name in self._names}
            if any(digests[name].hexdigest() != found["files"][name]["sha256"] for name in self._names):
                raise ValueError("a hash is another")
            facts = dict(found["facts"])
        except (StoreError, OSError, KeyError, TypeError, ValueError):
            self.note = f"what an earlier start kept in {self._folder} is damaged"
            return None
        self._sizes, self._digests = sizes, digests
        return facts

    def _digest(self, name: str, size: int) -> Any:
        digest = hashlib.sha256()
        with (self._folder / name).open("rb") as handle:
            while size > 0 and (block := handle.read(min(size, _BLOCK))):
                digest.update(block)
                size -= len(block)
        if size:
            raise ValueError(f"{name} is too short")
        return digest
