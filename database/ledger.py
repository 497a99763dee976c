"""What is kept beside the elements: events that others follow, usage of language models, programs by hash.

`Recorded` is a store that writes an event for each change in the transaction of the change itself, so that none is
lost and none is told of what did not happen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, TypeVar, cast

from common.files import sha256_text
from common.records import Baseline, Usage
from database.evaluate_agent.score import Evaluation, Evidence
from database.store import NewEntry, Session, Store

__all__ = ["BACKUP", "REPAIR", "Event", "EventKind", "Ledger", "Recorded"]

T = TypeVar("T")
EventKind = Literal["added", "removed", "cleared", "scored", "parent", "candidates", "baseline"]
_TRIM_EVERY = 1024
REPAIR = "POST /repair puts it right"
BACKUP = "restore a backup"


@dataclass(frozen=True)
class Event:
    """One change. `id` grows by one from event to event and is never given twice."""

    id: int
    time: str
    """UTC, YYYY-MM-DD HH:MM:SS."""
    kind: EventKind
    index: int | None
    """The element it is about; None when it is about several or none."""
    data: dict[str, Any]


class Ledger(Protocol):
    """Part of a `database.store.Session`."""

    def put_events(self, time: str, events: Sequence[tuple[EventKind, int | None, dict[str, Any]]]) -> int:
        """Appends them; returns the id of the last."""
        ...

    def events(self, after: int, limit: int) -> list[Event]:
        """Those that follow the id `after`, oldest first."""
        ...

    def event_span(self) -> tuple[int, int]:
        """The ids of the oldest event kept and of the last one ever; (0, 0) before the first."""
        ...

    def trim_events(self, through: int) -> None:
        """Removes the events up to this id."""
        ...

    def put_program(self, index: int, sha256: str) -> None: ...

    def drop_programs(self, indices: Sequence[int] | None) -> None:
        """Forgets the programs of these elements; of all for None."""
        ...

    def with_program(self, sha256: str) -> list[int]:
        """Elements with exactly this program text, by index."""
        ...

    def program_hashes(self, indices: Sequence[int]) -> dict[int, str]:
        """By element: the hash under which its program is found."""
        ...

    def put_usage(self, records: Sequence[Usage]) -> None: ...

    def usage(self, after: int, limit: int) -> list[tuple[int, Usage]]:
        """(number, record) in the order in which they came, from the number that follows `after`."""
        ...

    def reserve(self, index: int) -> None:
        """Makes the next element's index at least this one."""
        ...

    def strays(self) -> list[str]:
        """What belongs to no element, elements that lack a part, and counts that are wrong; a line each, with what to
        do."""
        ...

    def damages(self) -> list[str]:
        """Events, usage, answers, baselines and small state that cannot be read, and numbers missing among the events
        and the usage; a line each, with what to do."""
        ...

    def baseline_keys(self) -> list[str]:
        """Of all baselines that are stored, in the order in which they were put."""
        ...


class _Recorder:
    """A session that notes its changes. What is not named here is the session's own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._noted: list[tuple[EventKind, int | None, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def insert(self, entry: NewEntry, index: int | None = None) -> int:
        index = self._session.insert(entry, index)
        element = entry.element
        self._session.ledger.put_program(index, sha256_text(element.program))
        self._note("added", index, {"name": element.name, "parent": element.parent})
        return index

    def set_parent(self, indices: Sequence[int], parent: int | None) -> None:
        self._session.set_parent(indices, parent)
        for index in indices:
            self._note("parent", index, {"parent": parent})

    def delete(self, indices: Sequence[int]) -> None:
        gone = set(indices)
        members = [facts.index for facts in self._session.candidates() if facts.index in gone] if gone else []
        self._session.delete(indices)
        self._session.ledger.drop_programs(indices)
        for index in indices:
            self._note("removed", index, {})
        if members:
            self._note("candidates", None, {"added": [], "removed": members})

    def clear(self) -> None:
        self._session.clear()
        self._session.ledger.drop_programs(None)
        self._note("cleared", None, {})

    def set_evaluation(self, index: int, evidence: Evidence, evaluation: Evaluation) -> None:
        self._session.set_evaluation(index, evidence, evaluation)
        self._note("scored", index, {"score": evaluation.score})

    def put_candidates(self, indices: Sequence[int]) -> None:
        before = {facts.index for facts in self._session.candidates()}
        self._session.put_candidates(indices)
        added, removed = sorted(set(indices) - before), sorted(before - set(indices))
        if added or removed:
            self._note("candidates", None, {"added": added, "removed": removed})

    def put_baseline(self, baseline: Baseline) -> None:
        self._session.put_baseline(baseline)
        self._note("baseline", None, {"key": baseline.key, "profile": baseline.profile})

    def _note(self, kind: EventKind, index: int | None, data: dict[str, Any]) -> None:
        self._noted.append((kind, index, data))

    def flush(self, kept: int) -> None:
        """Writes what was noted, and lets go of all but about the newest `kept` events."""
        if not self._noted:
            return
        ledger = self._session.ledger
        last = ledger.put_events(datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"), self._noted)
        if last % _TRIM_EVERY < len(self._noted):
            ledger.trim_events(last - kept)


class Recorded:
    """See `database.store.Store`: `store`, with its changes recorded as events.

    Args:
        kept: how many of the newest events are kept, at least.
    """

    def __init__(self, store: Store, kept: int) -> None:
        self._store = store
        self._kept = kept

    @property
    def snapshots(self) -> bool:
        return self._store.snapshots

    def read(self, work: Callable[[Session], T]) -> T:
        return self._store.read(work)

    def write(self, work: Callable[[Session], T]) -> T:
        return self._store.write(self._recorded(work))

    def submit(self, work: Callable[[Session], T]) -> Future[T]:
        return self._store.submit(self._recorded(work))

    def close(self) -> None:
        self._store.close()

    def cache_file(self) -> str | None:
        return self._store.cache_file()

    def _recorded(self, work: Callable[[Session], T]) -> Callable[[Session], T]:
        def run(session: Session) -> T:
            recorder = _Recorder(session)
            value = work(cast(Session, recorder))
            recorder.flush(self._kept)
            return value

        return run
