"""What has to hold in a store, whatever happened to it. Read-only; one line for each thing that is broken, with what to
do.

Elements are read a page at a time; what is held of all of them are their indices, parents and short hashes. A page in
which something is broken is read twice: where reads are no snapshot (MongoDB) another process may have been writing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from common.errors import StoreError
from database.candidate_manager import MERGED
from database.derived import Mend, faults
from database.ledger import BACKUP, REPAIR
from database.scores import BASELINES
from database.store import Session, Store, Where

__all__ = ["broken"]

_PAGE = 200
_WIDE_PAGE = 2000
_LOOK_AGAIN_SECONDS = 0.2
_REMEDY: dict[Mend, str] = {
    "row": REPAIR,
    "completeness": REPAIR,
    "evidence": REPAIR,
    "score": REPAIR,
    "vectors": "POST /repair or /faiss/rebuild has it embedded again",
    "backup": BACKUP,
}


def broken(store: Store, capacity: int) -> list[str]:
    """Every invariant that does not hold.

    Args:
        capacity: largest size of the candidate set.
    """
    found = _twice(store, lambda session: (0, _whole(session, capacity)), _LOOK_AGAIN_SECONDS)[1]
    after = 0
    while True:
        page, lines = _twice(store, _elements(after))
        found += lines
        if not page:
            return found
        after = page


def _twice(
    store: Store, work: Callable[[Session], tuple[int, list[str]]], seconds: float = 0.0
) -> tuple[int, list[str]]:
    """What `work` gives; where others may have been seen writing, without what it does not find `seconds` later."""
    page, lines = store.read(work)
    if lines and not store.snapshots:
        time.sleep(seconds)
        again = set(store.read(work)[1])
        lines = [line for line in lines if line in again]
    return page, lines


def _whole(session: Session, capacity: int) -> list[str]:
    found = [f"storage: {line}" for line in session.check()]
    found += session.ledger.strays()
    found += session.ledger.damages()
    parents: dict[int, int | None] = {}
    newest = 0
    while page := session.facts(Where(after=newest), limit=_WIDE_PAGE):
        parents.update((facts.index, facts.parent) for facts in page)
        newest = page[-1].index
    found += _tree(parents)
    found += _state(session, newest)
    members = len(session.candidates())
    if members > capacity:
        found.append(f"candidates: {members} are in the set, its capacity is {capacity}; {REPAIR}")
    return found


def _state(session: Session, newest: int) -> Iterator[str]:
    counter, merged = (_number(session, name) for name in ("last_index", MERGED))
    if counter < newest:
        yield f"counter: {counter} is below the highest index {newest}, which would be given again; {REPAIR}"
    if not 0 <= merged <= max(counter, newest):
        yield (
            f"candidates: elements up to {merged} are said to be merged, the last index given is {counter}, so that"
            f" nothing new would enter until then; {REPAIR}"
        )
    order, keys = _read(session, BASELINES) or [], session.ledger.baseline_keys()
    if sorted(order) != sorted(keys):
        yield f"baselines: {sorted(order)} are in order, {sorted(keys)} are stored; {REPAIR}"
    rules = _read(session, "rules") or {}
    highest = max([int(rules.get("revision", 0)), *(session.baseline_revision(key) for key in keys)])
    if _number(session, "revision") < highest:
        said = f"revisions: the counter is {_number(session, 'revision')}, below {highest}, which was given"
        yield f"{said}: a change would not be followed by the scores; {REPAIR}"


def _read(session: Session, name: str) -> Any:
    """A piece of small state; None where it cannot be read, which `Ledger.damages` tells."""
    try:
        return session.state(name)
    except (StoreError, ValueError):
        return None


def _number(session: Session, name: str) -> int:
    value = _read(session, name)
    return int(value) if isinstance(value, int | float) else 0


def _tree(parents: dict[int, int | None]) -> Iterator[str]:
    for index, parent in parents.items():
        if parent is not None and parent not in parents:
            yield f"tree: the parent {parent} of element {index} does not exist; POST /repair makes it a root"
    sound: set[int] = set()
    for start in parents:
        path: list[int] = []
        seen: set[int] = set()
        at: int | None = start
        while at is not None and at in parents and at not in sound and at not in seen:
            path.append(at)
            seen.add(at)
            at = parents[at]
        if at is not None and at in seen:
            circle = ", ".join(map(str, path[path.index(at) :][:20]))
            yield (
                f"tree: elements {circle} are their own ancestors; POST /elements/{at}/set-parent with"
                ' {"parent_index": null} makes one of them a root'
            )
        sound.update(path)


def _elements(after: int) -> Callable[[Session], tuple[int, list[str]]]:
    def work(session: Session) -> tuple[int, list[str]]:
        page = session.facts(Where(after=after), limit=_PAGE)
        lines = [f"element {fault.index}: {fault.what}; {_REMEDY[fault.mend]}" for fault in faults(session, page)]
        return (page[-1].index if page else 0), lines

    return work
