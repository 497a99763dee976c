"""Lines of an import that come before what they need: held until it is stored, in a file beyond a few megabytes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from common.errors import StoreError

__all__ = ["Held", "Place", "Waiting"]

_IN_MEMORY = 8 << 20
_NAMED = 20


@dataclass(frozen=True)
class Place:
    """Where a line lies in the file of what is held: bytes."""

    start: int
    length: int


@dataclass(frozen=True)
class Held:
    """An element whose parent has not come yet. `source` and `parent` are indices of the import's file."""

    line: int
    source: int | None
    parent: int
    place: Place


class Waiting:
    """Elements by the parent they wait for. A few numbers of each are in memory, its text is not."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by `close`
        self._below: dict[int, list[Held]] = {}
        self._above: dict[int, int] = {}
        """The parent of each that has an index."""

    def __contains__(self, source: int) -> bool:
        return source in self._above

    def hold(self, line: int, source: int | None, parent: int, value: dict[str, Any]) -> None:
        """Raises StoreError where it cannot be kept."""
        self._below.setdefault(parent, []).append(Held(line, source, parent, self.put(value)))
        if source is not None:
            self._above[source] = parent

    def released(self, parent: int) -> list[Held]:
        """Those that waited for this parent, in the order of their lines; they wait no longer."""
        found = self._below.pop(parent, [])
        for held in found:
            if held.source is not None:
                del self._above[held.source]
        return found

    def put(self, value: dict[str, Any]) -> Place:
        """Keeps any line.

        Raises:
            StoreError: it cannot be kept.
        """
        data = json.dumps(value).encode()
        try:
            start = self._file.seek(0, 2)
            self._file.write(data)
        except OSError as error:
            raise StoreError(
                f"the lines of the import that come before their parents cannot be kept: {error.strerror}",
                f"free space in {tempfile.gettempdir()}, or send parents before their children",
            ) from error
        return Place(start, len(data))

    def read(self, place: Place) -> dict[str, Any]:
        self._file.seek(place.start)
        value: dict[str, Any] = json.loads(self._file.read(place.length))
        return value

    def hopeless(self, refused: Collection[int]) -> Iterator[tuple[int, str]]:
        """(line, reason) of each that still waits, now that nothing more comes.

        Args:
            refused: indices of the elements that came and were refused.
        """
        circles = self._circles()
        for parent, below in self._below.items():
            for held in below:
                circle = circles.get(held.source or 0)
                if parent == held.source:
                    yield held.line, "it is its own parent"
                elif circle is not None:
                    shown = ", ".join(map(str, circle[:_NAMED])) + (", ..." if len(circle) > _NAMED else "")
                    yield held.line, f"its parent {parent} descends from it: a cycle of {shown}"
                elif parent in self._above or parent in refused:
                    yield held.line, f"its parent {parent} was refused"
                else:
                    yield held.line, f"its parent {str(parent)[:40]} is no element of the file"

    def _circles(self) -> dict[int, list[int]]:
        """The cycle of each element that is its own ancestor."""
        found: dict[int, list[int]] = {}
        seen: set[int] = set()
        for start in self._above:
            steps: dict[int, int] = {}
            at = start
            while at in self._above and at not in seen:
                seen.add(at)
                steps[at] = len(steps)
                at = self._above[at]
            if at in steps:
                circle = list(steps)[steps[at] :]
                found |= dict.fromkeys(circle, circle)
        return found

    def close(self) -> None:
        self._file.close()
