"""What is kept of an import under its Idempotency-Key, so that it can be sent again: how it began, and its lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from database import keys
from database.errors import RefusedError, key_used
from database.memory import Memory
from database.models import NewElement, StoredExperiment
from database.store import CLEARED, Session

__all__ = ["HIGHEST_KEPT", "Begun", "Told"]

HIGHEST_KEPT = 2**31
"""Highest index of a file that is kept: the counter has to go on from it."""
_IMPORT, _BEGUN = keys.IMPORTS
_HASH = "request_sha256"


@dataclass(frozen=True)
class Begun:
    """How an import found the store when it began. One that is sent again under its key goes on as it began."""

    keeps: bool
    """It held no element: the indices of the file are kept."""
    above: int
    """Indices up to this one may have been given before."""
    epoch: int | None
    """Grows when something is removed: as long as it has not, an index where nothing is stored was given to nobody."""
    cleared: int | None = None
    """How often everything had been removed when this import, or its repetition, began."""

    @classmethod
    def of(cls, memory: Memory, key: str | None) -> Begun:
        def work(session: Session) -> dict[str, Any]:
            empty = not session.count(limit=1)
            return {"keeps": empty, "above": int(session.state("last_index") or 0), "epoch": session.state("epoch")}

        # Before the note, which a removal takes along: whatever is removed from now on is seen.
        cleared = memory.store.read(lambda session: session.state(CLEARED))
        told = memory.store.read(work) if key is None else memory.once(_BEGUN, key, work)
        return cls(**told, cleared=cleared)

    def refuse_cleared(self, session: Session) -> None:
        """Raises RefusedError where everything was removed since: indices are given anew, so that what is known of the
        lines before would be said of other elements."""
        if session.state(CLEARED) != self.cleared:
            raise RefusedError("all elements were removed while the lines came: send the whole file again")

    @property
    def whole(self) -> bool:
        """Whether the store becomes what the exported one was."""
        return self.keeps and not self.above

    def place(self, session: Session, source: int | None) -> int | None:
        """The index of the file where the store can still give it; None for the next one."""
        if not self.keeps or source is None or not self.above < source <= HIGHEST_KEPT:
            return None
        given = int(session.state("last_index") or 0)
        if source <= given and session.state("epoch") != self.epoch:
            return None
        return source if session.is_free(source) else None


@dataclass(frozen=True)
class Told:
    """What is noted of a line under the key of its import.

    Args:
        key: with the line's number; None notes nothing.
        hash: of the line; None where a repetition may differ.
    """

    key: str | None
    hash: str | None

    def before(self, session: Session) -> dict[str, Any] | None:
        """What was noted when the line came first.

        Raises:
            ConflictError: it was another line.
        """
        found = None if self.key is None else session.answer(_IMPORT, self.key)
        if found is None or self.key is None:
            return None
        if self.hash is not None and found[_HASH] not in (None, self.hash):
            key, _, line = self.key.rpartition(":")
            raise key_used(key, f"an import whose line {line} was another")
        return found

    def keep(self, session: Session, note: dict[str, Any]) -> None:
        if self.key is not None:
            session.put_answer(_IMPORT, self.key, note | {_HASH: self.hash})

    def stored(self, session: Session, wanted: NewElement) -> StoredExperiment | None:
        """The element that was stored when the line came first; None where it did not, or was refused.

        Raises:
            ConflictError: see `before`.
        """
        if self.key is None:
            return None
        note = self.before(session)
        if note is not None:
            return StoredExperiment(index=note["index"], name=note["name"], score=None, created=False)
        # An earlier release kept the key with the element.
        return keys.first_answer(session, f"{keys.OF_IMPORTS}{self.key}", wanted, None)
