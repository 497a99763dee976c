"""The ledger of a MongoDB write or read: see `database.ledger.Ledger`. Ids of events and numbers of records of usage
have no gaps, so that a page is asked for by them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from common.records import Usage
from database.ledger import Event, EventKind
from database.mongodb_counts import EVENTS, USAGE
from database.mongodb_documents import ELEMENTS
from database.mongodb_state import MongoState

__all__ = ["MongoLedger"]


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
        return [f"candidates: element {index} does not exist" for index in members if index not in stored][:20]

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
