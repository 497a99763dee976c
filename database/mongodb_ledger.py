"""The ledger of a MongoDB write or read: see `database.ledger.Ledger`. Writes are alone, under the store's lease."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pymongo.client_session import ClientSession
from pymongo.database import Database

from common.files import sha256_text
from common.records import Usage
from database.ledger import Event, EventKind
from database.mongodb_documents import ELEMENTS, STATE

__all__ = ["MongoLedger", "adopt_programs"]

_EVENTS = "asi_events"
_USAGE = "asi_usage"


def adopt_programs(database: Database[dict[str, Any]]) -> None:
    """Hashes the programs of elements that were stored without: another program's, or an earlier release's."""
    elements = database[ELEMENTS]
    elements.create_index("asi.program_sha256", sparse=True)
    missing = {"asi": {"$exists": True}, "asi.program_sha256": {"$exists": False}}
    for found in list(elements.find(missing, {"program": 1})):
        sha256 = sha256_text(str(found.get("program") or "none"))
        elements.update_one({"_id": found["_id"]}, {"$set": {"asi.program_sha256": sha256}})


class MongoLedger:
    def __init__(self, database: Database[dict[str, Any]], session: ClientSession | None) -> None:
        self._database = database
        self._session = session

    def put_events(self, time: str, events: Sequence[tuple[EventKind, int | None, dict[str, Any]]]) -> int:
        last = self._last(_EVENTS)
        self._database[_EVENTS].insert_many(
            [
                {"_id": last + place, "time": time, "kind": kind, "index": index, "data": json.dumps(data)}
                for place, (kind, index, data) in enumerate(events, 1)
            ],
            session=self._session,
        )
        return last + len(events)

    def events(self, after: int, limit: int) -> list[Event]:
        found = self._database[_EVENTS].find({"_id": {"$gt": after}}, session=self._session).sort("_id", 1)
        return [
            Event(row["_id"], row["time"], row["kind"], row["index"], json.loads(row["data"]))
            for row in found.limit(limit)
        ]

    def event_span(self) -> tuple[int, int]:
        first = list(self._database[_EVENTS].find({}, {"_id": 1}, session=self._session).sort("_id", 1).limit(1))
        return (first[0]["_id"] if first else 0), self._last(_EVENTS)

    def trim_events(self, through: int) -> None:
        self._database[_EVENTS].delete_many({"_id": {"$lte": through}}, session=self._session)

    def put_program(self, index: int, sha256: str) -> None:
        self._database[ELEMENTS].update_one(
            {"index": index}, {"$set": {"asi.program_sha256": sha256}}, session=self._session
        )

    def drop_programs(self, indices: Sequence[int] | None) -> None:
        """Nothing to do: the hash lies in the element's document."""

    def with_program(self, sha256: str) -> list[int]:
        wanted = {"asi.program_sha256": sha256}
        found = self._database[ELEMENTS].find(wanted, {"_id": 0, "index": 1}, session=self._session).sort("index", 1)
        return [row["index"] for row in found]

    def put_usage(self, records: Sequence[Usage]) -> None:
        last = self._last(_USAGE)
        rows = [{"_id": last + place, "body": record.model_dump_json()} for place, record in enumerate(records, 1)]
        self._database[_USAGE].insert_many(rows, session=self._session)

    def usage(self, after: int, limit: int) -> list[tuple[int, Usage]]:
        found = self._database[_USAGE].find({"_id": {"$gt": after}}, session=self._session).sort("_id", 1)
        return [(row["_id"], Usage.model_validate_json(row["body"])) for row in found.limit(limit)]

    def reserve(self, index: int) -> None:
        state = self._database[STATE]
        found = state.find_one({"_id": "last_index"}, session=self._session)
        last = max(index - 1, 0 if found is None else int(json.loads(found["value"])))
        document = {"_id": "last_index", "value": json.dumps(last)}
        state.replace_one({"_id": "last_index"}, document, upsert=True, session=self._session)

    def strays(self) -> list[str]:
        found = self._database[STATE].find_one({"_id": "candidates"}, session=self._session)
        members = [] if found is None else json.loads(found["value"])
        elements = self._database[ELEMENTS]
        stored = {row["index"] for row in elements.find({"index": {"$in": members}}, {"index": 1})}
        return [f"candidates: element {index} does not exist" for index in members if index not in stored][:20]

    def _last(self, collection: str) -> int:
        newest = self._database[collection].find({}, {"_id": 1}, session=self._session).sort("_id", -1).limit(1)
        return next((row["_id"] for row in newest), 0)
