"""What is kept beside the documents because it would have to be counted: totals, and numbers of children.

Kept in the transaction of each change, and compared here with the documents, a range of indices at a time: see
`mongodb_counting` for when. On MongoDB a range is read from indexes alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pymongo.client_session import ClientSession
from pymongo.database import Database

from database.mongodb_documents import ELEMENTS, OURS, STATE, in_parts, name_of, spans
from database.mongodb_draft import COUNTING, Totals

__all__ = [
    "EVENTS",
    "USAGE",
    "WIDTH",
    "Range",
    "before_next",
    "child_counts",
    "count_range",
    "counted",
    "disagreements",
    "newest_index",
    "numbered",
]

EVENTS = "asi_events"
USAGE = "asi_usage"
WIDTH = 1000
"""Indices of a range that is counted at once."""
_PAGE = 64
_LOOKS = 5
_LOOK_SECONDS = 0.2
_SHOWN = 20


@dataclass(frozen=True)
class Range:
    """The elements of a range of indices, as their documents have them."""

    records: int
    bytes: int
    explored: int
    names: frozenset[str]
    wrong: dict[int, tuple[int | None, int]]
    """(kept, counted) number of children of every index for which they differ."""
    parents: dict[int, int]
    """By index: the parent, where there is one."""


def before_next(database: Database[dict[str, Any]], low: int, last: int, session: ClientSession | None = None) -> int:
    """The index before that of the next document above `low`; `last` where there is none up to it."""
    for above, high in spans(low, last, WIDTH):
        ends = {"$gt": above, "$lte": high}
        found = database[ELEMENTS].find({"index": ends}, {"_id": 0, "index": 1}, session=session).sort("index", 1)
        for row in found.limit(1):
            return int(row["index"]) - 1
    return last


def count_range(database: Database[dict[str, Any]], low: int, high: int, session: ClientSession | None = None) -> Range:
    """Counts the elements with an index above `low`, or any when that is 0, up to `high`."""
    ends = {"$gt": low, "$lte": high} if low else {"$lte": high}
    shown = {"_id": 0, "index": 1, "name": 1, "parent": 1, "asi.bytes": 1, "asi.children": 1}
    found = database[ELEMENTS].find({"index": ends}, shown, session=session)
    # A document that another program keeps here is none of ours.
    rows = [row for row in found if row.get("asi", {}).get("bytes") is not None]
    right = _grouped(database, {"$gt": low, "$lte": high}, session)
    kept = {row["index"]: row["asi"].get("children") for row in rows}
    parents = {row["index"]: row["parent"] for row in rows if row.get("parent") is not None}
    return Range(
        records=len(rows),
        bytes=sum(row["asi"]["bytes"] for row in rows),
        explored=len(parents),
        names=frozenset(name_of(row) for row in rows),
        wrong={index: (said, right.get(index, 0)) for index, said in kept.items() if said != right.get(index, 0)},
        parents=parents,
    )


def child_counts(
    database: Database[dict[str, Any]], parents: list[int] | None, session: ClientSession | None = None
) -> dict[int, int]:
    """Number of children of each of `parents` (of all, for None) that has any, counted."""
    if parents is None:
        return _grouped(database, {"$gt": 0}, session)
    found: dict[int, int] = {}
    for some in in_parts(parents):
        found |= _grouped(database, {"$in": some}, session)
    return found


def _grouped(
    database: Database[dict[str, Any]], wanted: dict[str, Any], session: ClientSession | None
) -> dict[int, int]:
    """As `child_counts`, of the parents that meet a condition."""
    stages: list[dict[str, Any]] = [
        # A document that another program keeps here is nobody's child.
        {"$match": OURS | {"parent": wanted, "index": {"$gt": 0}}},
        {"$group": {"_id": "$parent", "count": {"$sum": 1}}},
    ]
    return {row["_id"]: row["count"] for row in database[ELEMENTS].aggregate(stages, session=session)}


def _ranges(database: Database[dict[str, Any]]) -> Iterator[Range]:
    """All elements, without their numbers of children being put right."""
    found = database[STATE].find_one({"_id": "last_index"})
    last = newest_index(database, 0 if found is None else int(json.loads(found["value"])))
    low = 0
    while low < last:
        high = min(last, low + WIDTH)
        one = count_range(database, low, high)
        yield one
        low = high if one.records else before_next(database, high, last)


def newest_index(database: Database[dict[str, Any]], known: int) -> int:
    """The highest index of a document; `known`, the last one given, where none is above it."""
    beyond = database[ELEMENTS].find({"index": {"$gt": known}}, {"_id": 0, "index": 1}).sort("index", -1)
    return next((int(row["index"]) for row in beyond.limit(1)), known)


def counted(database: Database[dict[str, Any]], kept: Totals | None = None) -> Totals:
    """The totals as the documents have them, all of which are looked at.

    Args:
        kept: what the store says.
    """
    return _looked_at(database, kept)[0]


def _looked_at(
    database: Database[dict[str, Any]], kept: Totals | None
) -> tuple[Totals, list[tuple[int, tuple[int | None, int]]]]:
    """The totals as the documents have them; and of the first elements whose number of children is not right: index,
    (kept, counted)."""
    totals = replace(numbered(database, kept), records=0, bytes=0, explored=0)
    names: set[str] = set()
    wrong: list[tuple[int, tuple[int | None, int]]] = []
    for one in _ranges(database):
        names |= one.names
        wrong += sorted(one.wrong.items())[: _SHOWN - len(wrong)]
        totals = replace(
            totals,
            records=totals.records + one.records,
            bytes=totals.bytes + one.bytes,
            explored=totals.explored + one.explored,
        )
    return replace(totals, names=len(names)), wrong


def numbered(database: Database[dict[str, Any]], kept: Totals | None) -> Totals:
    """`kept` with the numbers of the last event, the last one let go and the last record of usage put right. They have
    no gaps, so that these are looked for from where they were."""
    if kept is None:
        first = _end(database, EVENTS, 1)
        last = _end(database, EVENTS, -1)
        return Totals(events=last, trimmed=first - 1 if first else last, usage=_end(database, USAGE, -1))
    events = _last_id(database, EVENTS, kept.events, kept.trimmed)
    trimmed = min(kept.trimmed, events)
    if trimmed < events and not _there(database, EVENTS, trimmed, trimmed + 1):
        # Cut off after events were let go of. Where all were, their ids are not given again.
        first = _end(database, EVENTS, 1)
        trimmed = first - 1 if first else events
    return replace(kept, events=events, trimmed=trimmed, usage=_last_id(database, USAGE, kept.usage, 0))


def _last_id(database: Database[dict[str, Any]], collection: str, known: int, lowest: int) -> int:
    """The last number of a collection, near the one that is `known`. Rows may have been taken back, down to `lowest`,
    and those that were sent before it was kept follow it."""
    while known > lowest:
        low = max(lowest, known - _PAGE)
        there = _there(database, collection, low, known)
        known = max(there, default=low)
        if there:
            break
    while there := _there(database, collection, known, known + _PAGE):
        known = max(there)
    return known


def _there(database: Database[dict[str, Any]], collection: str, low: int, high: int) -> list[int]:
    """The numbers above `low` and up to `high` that a collection has."""
    found = database[collection].find({"_id": {"$in": list(range(low + 1, high + 1))}}, {"_id": 1})
    return [int(row["_id"]) for row in found]


def _end(database: Database[dict[str, Any]], collection: str, direction: int) -> int:
    """The lowest (1) or highest (-1) number in a collection; 0 in an empty one."""
    found = database[collection].find({}, {"_id": 1}).sort("_id", direction).limit(1)
    return next((int(row["_id"]) for row in found), 0)


def disagreements(database: Database[dict[str, Any]]) -> list[str]:
    """A line for each kept count that is not what the documents say. Without transactions a write changes one after the
    other: what differs while somebody writes is told only when it does so each time that it is looked at."""
    lines: list[str] | None = None
    for look in range(_LOOKS):
        if look:
            time.sleep(_LOOK_SECONDS)
        before = _lease(database)
        found = _differences(database)
        if not found or (before["until"] == 0.0 and _lease(database) == before):
            return found
        lines = found if lines is None else [line for line in lines if line in found]
    return lines or []


def _lease(database: Database[dict[str, Any]]) -> dict[str, Any]:
    """It has another owner at each write, and no end (0) while nobody writes."""
    return database[STATE].find_one({"_id": "lease"}) or {"until": 0.0}


def _differences(database: Database[dict[str, Any]]) -> list[str]:
    found = database[STATE].find({"_id": {"$in": ["totals", COUNTING]}})
    state = {row["_id"]: json.loads(row["value"]) for row in found}
    if state.get("totals") is None or state.get(COUNTING) is not None:
        # An earlier release kept no counts; those that are being counted are put right at the end of it.
        return []
    kept = Totals(**state["totals"])
    there, wrong = _looked_at(database, kept)
    said = [] if there == kept else [f"totals: {kept} are kept, {there} are there"]
    return said + [f"children: {told} of element {index} are kept, {right} are there" for index, (told, right) in wrong]
