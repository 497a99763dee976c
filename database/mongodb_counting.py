"""Counting a store anew: at every start, since another program may have changed the documents, and after a write that
was cut off on a server without transactions.

It goes on beside the writes, one range of indices in each, by any process that has the store open. The state says up to
where it came and the sums so far, which whoever removes or moves an element of that part keeps right. What follows from
the totals is not answered until it is done (see `MongoState.counts`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace

from database.mongodb_counts import WIDTH, Range, before_next, count_range, newest_index, numbered
from database.mongodb_documents import ELEMENTS, in_parts
from database.mongodb_draft import COUNTING, Counting, Totals
from database.mongodb_session import MongoSession

__all__ = ["begin", "once_more", "step"]


def begin(session: MongoSession, doubtful: bool) -> list[str]:
    """Has everything counted from the beginning, or a count that goes on be ended; returns a line for each number that
    was wrong.

    Args:
        doubtful: what is kept may be wrong, also what was counted so far: no process answers from it until everything
            is counted from the beginning.
    """
    said = []
    kept, before, last = session.states("totals", COUNTING, "last_index")
    totals = numbered(session.database, None if kept is None else Totals(**kept))
    if kept is not None and asdict(totals) != kept:
        said.append(f"the totals are {totals} now, they were {Totals(**kept)}")
    session.put_state("totals", asdict(totals))
    # Another program's store has no counter of ours.
    newest = newest_index(session.database, int(last or 0))
    if newest != int(last or 0):
        session.put_state("last_index", newest)
        if kept is not None:
            said.append(f"the last index given is {newest} now, it was {last or 0}")
    doubtful = doubtful or kept is None
    if doubtful or before is None:
        # Else a count would never end where starts follow each other sooner.
        session.put_state(COUNTING, asdict(Counting(doubtful=doubtful, first=kept is None, seen=asdict(totals))))
    return said


def once_more(session: MongoSession) -> None:
    """Has everything counted once more, where nobody does so already; who has counted answers meanwhile."""
    if session.state(COUNTING) is None:
        now = Counting(doubtful=False, first=False, seen=asdict(session.draft.totals))
        session.put_state(COUNTING, asdict(now))


def step(session: MongoSession) -> list[str] | None:
    """Counts the next range; a line for each kind of thing that was wrong once everything is counted, None before."""
    # What the writes before it in its group added is counted with the rest, or was to the part that is counted.
    session.draft.send()
    told = session.state(COUNTING)
    if told is None:
        return []
    now = Counting(**told)
    kept = asdict(session.draft.totals)
    if now.seen != kept:
        # An earlier release changed elements, perhaps of those that were counted.
        now = replace(now, seen=kept, through=0, records=0, bytes=0, explored=0, names=0)
    last = int(session.state("last_index") or 0)
    through = min(last, now.through + WIDTH)
    found = count_range(session.database, now.through, through, session.client_session)
    if not found.records:
        # More may be missing in a row than can be gone through.
        through = before_next(session.database, through, last, session.client_session)
    if now.doubtful:
        moved = _make_roots(session, found)
        found = replace(found, explored=found.explored - moved)
        now = replace(now, roots=now.roots + moved)
    now = replace(
        now,
        # Roots that were made moved them.
        seen=asdict(session.draft.totals),
        through=through,
        records=now.records + found.records,
        bytes=now.bytes + found.bytes,
        explored=now.explored + found.explored,
        names=now.names + _new_names(session, found, now.through),
        corrected=now.corrected + _correct_children(session, found),
    )
    if through < last:
        session.put_state(COUNTING, asdict(now))
        return None
    return list(_finish(session, now))


def _finish(session: MongoSession, now: Counting) -> Iterator[str]:
    kept = session.draft.totals
    totals = replace(kept, records=now.records, bytes=now.bytes, names=now.names, explored=now.explored)
    session.put_state("totals", asdict(totals))
    session.put_state(COUNTING, None)
    if totals != kept and not now.first:
        yield f"the totals are {totals} now, they were {kept}"
    if now.corrected and not now.first:
        yield f"the number of children of {now.corrected} elements was not right"
    if now.roots:
        yield f"{now.roots} elements whose parent does not exist are roots now"


def _new_names(session: MongoSession, found: Range, through: int) -> int:
    """How many names of a range no element up to `through`, before it, has."""
    if not through or not found.names:
        return len(found.names)
    return len(found.names.difference(session.names_among(found.names, through)))


def _correct_children(session: MongoSession, found: Range) -> int:
    wrong: dict[int, list[int]] = defaultdict(list)
    for index, (_, number) in found.wrong.items():
        wrong[number].append(index)
    changed = 0
    for number, indices in wrong.items():
        for some in in_parts(indices):
            wanted = {"index": {"$in": some}, "asi": {"$exists": True}}
            changed += session.change_elements(wanted, {"$set": {"asi.children": number}})
    return changed


def _make_roots(session: MongoSession, found: Range) -> int:
    """Elements of a range whose parent does not exist become roots: cut off while everything was being removed."""
    parents = sorted(set(found.parents.values()))
    known: set[int] = set()
    for some in in_parts(parents):
        there = session.database[ELEMENTS].find(
            {"index": {"$in": some}}, {"_id": 0, "index": 1}, session=session.client_session
        )
        known.update(row["index"] for row in there)
    lost = [index for index, parent in found.parents.items() if parent not in known]
    if lost:
        session.set_parent(lost, None)
    return len(lost)
