"""The ledger of a MongoDB write or read: see `database.ledger.Ledger`. Ids of events and numbers of records of usage
have no gaps, so that a page is asked for by them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.errors import first_line
from common.records import Baseline, Usage
from database.ledger import BACKUP, REPAIR, Event, EventKind
from database.mongodb_counts import EVENTS, USAGE
from database.mongodb_documents import ELEMENTS, OURS, STATE, in_parts
from database.mongodb_draft import ANSWERS
from database.mongodb_state import BASELINES, MongoState

__all__ = ["MongoLedger"]

_PAGE = 1000
_SHOWN = 20
_Reader = Callable[[dict[str, Any]], object]


class MongoLedger(MongoState):
    def put_events(self, time: str, events: Sequence[tuple[EventKind, int | None, dict[str, Any]]]) -> int:
        last = self.draft.totals.events
        self.draft.add_rows(
            EVENTS,
            [
                {"_id": last + place, "time": time, "kind": kind, "index": index, "data": json.dumps(data)}
                for place, (kind, index, data) in enumerate(events, 1)
            ],
            followed=True,
        )
        self.draft.add_totals(events=len(events))
        return last + len(events)

    def events(self, after: int, limit: int) -> list[Event]:
        totals = self.totals
        found = self._numbered(EVENTS, max(after, totals.trimmed), totals.events, limit)
        return [Event(row["_id"], row["time"], row["kind"], row["index"], json.loads(row["data"])) for row in found]

    def event_span(self) -> tuple[int, int]:
        totals = self.totals
        return (totals.trimmed + 1 if totals.trimmed < totals.events else 0), totals.events

    def trim_events(self, through: int) -> None:
        trimmed = self.draft.totals.trimmed
        if through > trimmed:
            self._changing(EVENTS).delete_many({"_id": {"$lte": through}}, session=self._session)
            self.draft.add_totals(trimmed=through - trimmed)

    def put_program(self, index: int, sha256: str) -> None:
        """Nothing to do: the hash lies in the element's document from the beginning."""

    def drop_programs(self, indices: Sequence[int] | None) -> None:
        """As `put_program`."""

    def with_program(self, sha256: str) -> list[int]:
        wanted = {"asi.program_sha256": sha256}
        found = self._elements.find(wanted, {"_id": 0, "index": 1}, session=self._session).sort("index", 1)
        return [row["index"] for row in found]

    def program_hashes(self, indices: Sequence[int]) -> dict[int, str]:
        shown = {"_id": 0, "index": 1, "asi.program_sha256": 1}
        found = {}
        for some in in_parts(indices):
            for row in self._elements.find({"index": {"$in": some}, **OURS}, shown, session=self._session):
                found[row["index"]] = row["asi"].get("program_sha256", "")
        return found

    def put_usage(self, records: Sequence[Usage]) -> None:
        last = self.draft.totals.usage
        rows = [{"_id": last + place, "body": record.model_dump_json()} for place, record in enumerate(records, 1)]
        self.draft.add_rows(USAGE, rows)
        self.draft.add_totals(usage=len(rows))

    def usage(self, after: int, limit: int) -> list[tuple[int, Usage]]:
        found = self._numbered(USAGE, after, self.totals.usage, limit)
        return [(row["_id"], Usage.model_validate_json(row["body"])) for row in found]

    def reserve(self, index: int) -> None:
        last = max(index - 1, int(self.state("last_index") or 0))
        self.put_state("last_index", last)

    def strays(self) -> list[str]:
        members = self.state("candidates") or []
        found = self._database[ELEMENTS].find({"index": {"$in": members}}, {"index": 1}, session=self._session)
        stored = {row["index"] for row in found}
        gone = [index for index in members if index not in stored][:_SHOWN]
        return [f"candidates: element {index} does not exist; {REPAIR}" for index in gone]

    def baseline_keys(self) -> list[str]:
        found = self._database[BASELINES].find({}, {"revision": 1}, session=self._session)
        return [row["_id"] for row in sorted(found, key=lambda row: (row.get("revision") or 0, row["_id"]))]

    def damages(self) -> list[str]:
        totals = self.totals
        return [
            *self._damaged(EVENTS, "events", totals.trimmed, totals.events, lambda row: json.loads(row["data"])),
            *self._damaged(USAGE, "usage", 0, totals.usage, lambda row: Usage.model_validate_json(row["body"])),
            *self._unreadable(ANSWERS, "answers", lambda row: json.loads(row["body"])),
            *self._unreadable(BASELINES, "baselines", lambda row: Baseline.model_validate_json(row["body"])),
            *self._unreadable(STATE, "state", lambda row: json.loads(row["value"]) if "value" in row else None),
        ]

    def _damaged(self, collection: str, named: str, first: int, last: int, read: _Reader) -> Iterator[str]:
        """Of rows numbered from above `first` to `last`: those that are missing, and that cannot be read."""
        while first < last:
            through = min(last, first + _PAGE)
            there = {row["_id"]: row for row in self._numbered(collection, first, through, _PAGE)}
            for number in range(first + 1, through + 1):
                wrong = "it is missing" if number not in there else _why_unreadable(read, there[number])
                if wrong is not None:
                    yield f"{named}: number {number}: {wrong}; {BACKUP}"
            first = through

    def _unreadable(self, collection: str, named: str, read: _Reader) -> Iterator[str]:
        for row in self._database[collection].find({}, session=self._session):
            wrong = _why_unreadable(read, row)
            if wrong is not None:
                yield f"{named}: {row['_id']}: {wrong}; {BACKUP}"

    def _numbered(self, collection: str, after: int, last: int, limit: int) -> Iterator[dict[str, Any]]:
        """The first `limit` of the rows numbered above `after`; `last` is the highest number."""
        if self._draft is not None and after < last:
            self._draft.send()
        left = limit
        while left > 0 and after < last:
            through = min(last, after + left)
            wanted = {"_id": {"$in": list(range(after + 1, through + 1))}}
            for row in self._database[collection].find(wanted, session=self._session).sort("_id", 1):
                yield row
                left -= 1
            after = through


def _why_unreadable(read: _Reader, row: dict[str, Any]) -> str | None:
    """None where it can be read."""
    try:
        read(row)
    except (ValueError, TypeError, KeyError) as error:
        return f"it cannot be read: {first_line(error)[:200]}"
    return None
