"""What is kept beside the documents because it would have to be counted: totals, and numbers of children.

Kept in the transaction of each change; counted anew, here, at every start, and after a write that was cut off on a
server without transactions. Counting reads indexes only, no documents.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from typing import Any

from pymongo.database import Database

from database.mongodb_documents import BY_NAME, ELEMENTS, OURS, STATE
from database.mongodb_draft import Totals

__all__ = ["EVENTS", "USAGE", "counted", "disagreements", "recount"]

EVENTS = "asi_events"
USAGE = "asi_usage"
_CHUNK = 1000
_LOOKS = 5
_LOOK_SECONDS = 0.2
_SHOWN = 20


def counted(database: Database[dict[str, Any]], kept: Totals | None = None) -> Totals:
    """The totals as the documents have them.

    Args:
        kept: what a store of this release says; one of an earlier release may lack the index.
    """
    explored = {"$cond": [{"$gt": ["$parent", 0]}, 1, 0]}
    named: dict[str, Any] = {"records": {"$sum": 1}, "bytes": {"$sum": "$asi.bytes"}, "explored": {"$sum": explored}}
    together = {name: {"$sum": f"${name}"} for name in named}
    stages: list[dict[str, Any]] = [
        {"$match": OURS},
        {"$group": {"_id": "$name"} | named},
        {"$group": {"_id": None, "names": {"$sum": 1}} | together},
    ]
    options: dict[str, Any] = {} if kept is None else {"hint": BY_NAME}
    found = next(iter(database[ELEMENTS].aggregate(stages, **options)), {})
    first = next(iter(database[EVENTS].find({}, {"_id": 1}).sort("_id", 1).limit(1)), None)
    last = _newest_id(database, EVENTS)
    if first is None and kept is not None:
        # All events were let go of; their ids are not given again.
        last = kept.events
    return Totals(
        **{name: int(found.get(name) or 0) for name in ("records", "bytes", "names", "explored")},
        events=last,
        trimmed=last if first is None else first["_id"] - 1,
        usage=_newest_id(database, USAGE),
    )


def _newest_id(database: Database[dict[str, Any]], collection: str) -> int:
    """The highest number in a collection that only grows; 0 in an empty one."""
    newest = database[collection].find({}, {"_id": 1}).sort("_id", -1).limit(1)
    return next((int(row["_id"]) for row in newest), 0)


def _child_counts(database: Database[dict[str, Any]]) -> dict[int, int]:
    """Number of children of every index that has any, counted."""
    stages: list[dict[str, Any]] = [
        {"$match": OURS | {"parent": {"$gt": 0}}},
        {"$group": {"_id": "$parent", "count": {"$sum": 1}}},
    ]
    return {row["_id"]: row["count"] for row in database[ELEMENTS].aggregate(stages, hint=BY_NAME)}


def _kept_children(database: Database[dict[str, Any]]) -> dict[int, int]:
    """As `_child_counts`, as the documents of these elements say."""
    shown = {"_id": 0, "index": 1, "asi.children": 1}
    # Below 0 are those of which two holders took the same child away.
    found = [row for side in ("$gt", "$lt") for row in database[ELEMENTS].find({"asi.children": {side: 0}}, shown)]
    return {row["index"]: row["asi"]["children"] for row in found}


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
    found = database[STATE].find_one({"_id": "totals"})
    if found is None:
        # An earlier release kept no counts.
        return []
    kept = Totals(**json.loads(found["value"]))
    there = counted(database, kept)
    said = [] if there == kept else [f"totals: {kept} are kept, {there} are there"]
    wrong = sorted(_wrong_children(database).items())[:_SHOWN]
    return said + [f"children: {told} of element {index} are kept, {right} are there" for index, (told, right) in wrong]


def _wrong_children(database: Database[dict[str, Any]]) -> dict[int, tuple[int, int]]:
    """(kept, counted) number of children of every index for which they differ."""
    right, kept = _child_counts(database), _kept_children(database)
    pairs = {index: (kept.get(index, 0), right.get(index, 0)) for index in right.keys() | kept.keys()}
    return {index: (said, there) for index, (said, there) in pairs.items() if said != there}


def recount(database: Database[dict[str, Any]]) -> list[str]:
    """Counts everything anew; returns a line for each kind of thing that was wrong. To be called under the lease."""
    said = []
    state = {row["_id"]: row["value"] for row in database[STATE].find({"_id": {"$in": ["last_index", "totals"]}})}
    kept = Totals(**json.loads(state["totals"])) if "totals" in state else None
    totals = counted(database, kept or Totals())
    if totals != kept:
        _put(database, "totals", vars(totals))
        if kept is not None:
            said.append(f"the totals are {totals} now, they were {kept}")
    # Another program's store has no counter of ours.
    last = json.loads(state.get("last_index", "0"))
    for newest in database[ELEMENTS].find({"index": {"$gt": last}}, {"index": 1}).sort("index", -1).limit(1):
        _put(database, "last_index", int(newest["index"]))
        if kept is not None:
            said.append(f"the last index given is {newest['index']} now, it was {last}")
    wrong: dict[int, list[int]] = defaultdict(list)
    for index, (_, number) in _wrong_children(database).items():
        wrong[number].append(index)
    changed = 0
    for number, indices in wrong.items():
        for start in range(0, len(indices), _CHUNK):
            wanted = {"index": {"$in": indices[start : start + _CHUNK]}, "asi": {"$exists": True}}
            changed += database[ELEMENTS].update_many(wanted, {"$set": {"asi.children": number}}).modified_count
    if changed and kept is not None:
        said.append(f"the number of children of {changed} elements was not right")
    return said


def _put(database: Database[dict[str, Any]], name: str, value: Any) -> None:
    database[STATE].replace_one({"_id": name}, {"_id": name, "value": json.dumps(value)}, upsert=True)
