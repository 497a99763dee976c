"""What the writes of one group share in MongoDB: the small state, read once, and what they add, sent together.

A new element alone would be half a dozen requests, each with its wait for the journal: its document, its parent's
number of children, its events, the counters. They are gathered here and sent in one request of each kind, before
anything else reads or changes the elements, and at the end of the group.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import bson
from bson.errors import BSONError
from pymongo import ReplaceOne
from pymongo.client_session import ClientSession
from pymongo.database import Database
from pymongo.errors import BulkWriteError, PyMongoError

from database.mongodb_documents import ELEMENTS, STATE, names_among

__all__ = ["ANSWERS", "COUNTING", "GATHERED", "Counting", "Draft", "SendError", "Totals", "change_children"]

ANSWERS = "asi_answers"
COUNTING = "counting"
GATHERED = ("last_index", "totals", COUNTING)
"""Small state that is sent with the elements, at the end; all other is sent when it is put."""


class SendError(Exception):
    """What was gathered could not be kept: a matter of the whole group, not of the write that happened to send it. Its
    cause is the driver's error."""


@dataclass(frozen=True)
class Totals:
    """What would have to be counted: elements, their bytes, names and how many have a parent; the ids of the last event
    and of the last one that was let go; the number of the last record of usage."""

    records: int = 0
    bytes: int = 0
    names: int = 0
    explored: int = 0
    events: int = 0
    trimmed: int = 0
    usage: int = 0


@dataclass(frozen=True)
class Counting:
    """How far the elements were counted: up to which index, and what there is up to it. Kept while it goes on."""

    doubtful: bool
    """Nobody may answer from what is kept until it is done."""
    first: bool
    """Nothing was kept before, so that nothing can be said to have been wrong."""
    seen: dict[str, int]
    """The totals that are kept, as those who know of the counting left them. An earlier release moves these alone."""
    through: int = 0
    records: int = 0
    bytes: int = 0
    explored: int = 0
    names: int = 0
    corrected: int = 0
    """Elements whose number of children was not right."""
    roots: int = 0
    """Elements whose parent did not exist."""


@dataclass
class _Gathered:
    """What was not sent yet."""

    documents: dict[int, dict[str, Any]] = field(default_factory=dict)
    """New elements by index. They are replaced, never changed in place."""
    children: Counter[int] = field(default_factory=Counter)
    """How many more children elements get."""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    """Of collections that only grow, by name."""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    state: set[str] = field(default_factory=set)
    """Names of the small state that changed."""
    size: int = 0
    """About how many bytes of documents."""

    def copy(self) -> _Gathered:
        rows = defaultdict(list, {name: list(rows) for name, rows in self.rows.items()})
        answers, state = dict(self.answers), set(self.state)
        return replace(
            self, documents=dict(self.documents), children=self.children.copy(), rows=rows, answers=answers, state=state
        )


class Draft:
    """Of one group of writes, in one transaction where the server has them. Used by one thread, under the lease."""

    def __init__(self, database: Database[dict[str, Any]], session: ClientSession | None = None) -> None:
        self._database = database
        self._session = session
        self._state: dict[str, str] | None = None
        self._gathered = _Gathered()
        self._gatherings = 0
        self._sendings = 0
        self.changes = 0
        """Changes that were made directly, beside what is gathered."""
        self.changed_by: set[int] = set()
        """Positions in the group of the writes that made such changes."""
        self._sent: dict[str, list[Any]] = defaultdict(list)
        """By collection: the `_id` of each document that this draft made, and no other: of elements, of what only grows
        and of answers."""
        self._followed: set[str] = set()
        """Collections of which somebody reads on from the last number that he has read."""
        self._unclear = False
        """Whether it is not known what was kept of a request."""
        self.size = 0
        """About how many bytes were gathered so far."""
        self.first_free = 0
        """An index from which on all are known to be free; 0 before it was looked for."""

    # Small state

    def state(self) -> dict[str, str]:
        """All small state, as JSON by name: nobody else writes meanwhile."""
        if self._state is None:
            found = self._database[STATE].find({}, {"value": 1}, session=self._session)
            self._state = {row["_id"]: row["value"] for row in found if "value" in row}
        return self._state

    def gather_state(self, name: str, value: Any) -> None:
        self.state()[name] = json.dumps(value)
        self._gathered.state.add(name)
        self._gatherings += 1

    @property
    def totals(self) -> Totals:
        return Totals(**json.loads(self.state().get("totals", "{}")))

    def add_totals(self, **more: int) -> None:
        """Adds to the totals named."""
        self.gather_state("totals", _sum(asdict(self.totals), more))
        kept = json.loads(self.state().get(COUNTING, "null"))
        if kept is not None:
            self.gather_state(COUNTING, kept | {"seen": _sum(kept["seen"], more)})

    def counted_through(self) -> int:
        """Up to which index elements were counted anew so far; 0 where nothing is being counted."""
        kept = json.loads(self.state().get(COUNTING, "null"))
        return 0 if kept is None else int(kept["through"])

    def add_counted(self, **more: int) -> None:
        """Adds to what was counted anew so far."""
        kept = json.loads(self.state()[COUNTING])
        self.gather_state(COUNTING, _sum(kept, more))

    # What is new

    def document(self, index: int) -> dict[str, Any] | None:
        """A new element that was not sent yet."""
        return self._gathered.documents.get(index)

    def with_key(self, key: str) -> dict[str, Any] | None:
        return next((one for one in self._gathered.documents.values() if one["asi"].get("key") == key), None)

    def add(self, document: dict[str, Any]) -> None:
        """Takes a new element."""
        self._gathered.documents[document["index"]] = document
        parent, size = document["parent"], document["asi"]["bytes"]
        if parent is not None:
            above = self.document(parent)
            if above is None:
                self._gathered.children[parent] += 1
            else:
                self.edit(parent, {"asi.children": above["asi"]["children"] + 1})
        self._gathered.size += size
        self.size += size
        more = {"records": 1, "bytes": size, "explored": int(parent is not None)}
        self.add_totals(**more)
        if document["index"] <= self.counted_through():
            self.add_counted(**more)

    def edit(self, index: int, fields: dict[str, Any]) -> None:
        """Changes a new element, by fields of it or, "asi.x", of ours."""
        document = dict(self._gathered.documents[index])
        for name, value in fields.items():
            place, _, inner = name.rpartition(".")
            if place:
                document[place] = document[place] | {inner: value}
            else:
                document[name] = value
        self._gathered.documents[index] = document
        self._gatherings += 1

    def add_rows(self, collection: str, rows: Iterable[dict[str, Any]], followed: bool = False) -> None:
        """
        Args:
            followed: somebody reads on from the last number that he has read, so that none that he may have read is
                given to another row.
        """
        self._gathered.rows[collection] += rows
        if followed:
            self._followed.add(collection)
        self._gatherings += 1

    def answer(self, name: str) -> dict[str, Any] | None:
        return self._gathered.answers.get(name)

    def put_answer(self, document: dict[str, Any]) -> None:
        self._gathered.answers[document["_id"]] = document
        self._gatherings += 1

    # Keeping it, or not

    def mark(self) -> _Mark:
        return _Mark(self._gathered.copy(), dict(self.state()), self._gatherings, self._sendings, self.changes)

    def forget_since(self, mark: _Mark) -> bool:
        """Lets go of what was gathered since `mark`; whether that is all that happened since. Else something was sent
        or changed already."""
        if self.changes == mark.changes and self._gatherings == mark.gatherings:
            return True
        if self.changes != mark.changes or self._sendings != mark.sendings:
            return False
        self._gathered, self._state, self._gatherings = mark.gathered, mark.state, mark.gatherings
        return True

    def send(self) -> None:
        """Sends what was gathered.

        Raises:
            SendError: the server did not keep it, or only a part of it.
        """
        now = self._gathered
        if not (now.documents or now.rows or now.answers or now.state or now.children):
            return
        gatherings = self._gatherings
        try:
            self._send_elements(list(now.documents.values()), now.children)
            for collection, rows in now.rows.items():
                if rows:
                    self._insert(collection, rows)
            self._send_answers(list(now.answers.values()))
            # Last, that counting has ended: without a transaction somebody may read between two of them.
            names = sorted(now.state, key=lambda name: (name == COUNTING, name))
            self._replace(STATE, [{"_id": name, "value": self.state()[name]} for name in names])
        except (PyMongoError, BSONError, UnicodeError, OverflowError) as error:
            raise SendError(str(error)) from error
        self._gathered = _Gathered()
        self._sendings += 1
        # The totals are there: whoever follows may have read them.
        for collection in self._followed:
            self._sent.pop(collection, None)
        # That names were counted is not the doing of the write that happened to send them.
        self._gatherings = gatherings

    def _send_elements(self, documents: list[dict[str, Any]], children: Counter[int]) -> None:
        if documents:
            names = {document["name"] for document in documents}
            elements = self._database[ELEMENTS]
            known = names_among(elements, names, session=self._session)
            self.add_totals(names=len(names - known))
            through = self.counted_through()
            names = {document["name"] for document in documents if document["index"] <= through}
            if names:
                self.add_counted(names=len(names - names_among(elements, names, through, self._session)))
            self._insert(ELEMENTS, documents)
        change_children(self._database, children, self._session)

    def _insert(self, collection: str, documents: list[dict[str, Any]]) -> None:
        made = documents
        try:
            self._database[collection].insert_many(documents, session=self._session)
        except BulkWriteError as error:
            # One after the other, up to the first that was refused: a number may be that of another holder's row.
            made = documents[: error.details["nInserted"]]
            raise
        except PyMongoError:
            made, self._unclear = [], True
            raise
        except (BSONError, UnicodeError, OverflowError):
            made = []
            raise
        finally:
            self._sent[collection] += [document["_id"] for document in made]

    def _send_answers(self, answers: list[dict[str, Any]]) -> None:
        # One that is no document is refused here, before any is sent.
        for answer in answers:
            bson.encode(answer)
        made: dict[int, Any] = {}
        try:
            made = self._replace(ANSWERS, answers)
        except BulkWriteError as error:
            made = {one["index"]: one["_id"] for one in error.details["upserted"]}
            raise
        except PyMongoError:
            self._unclear = True
            raise
        finally:
            self._sent[ANSWERS] += made.values()

    def take_back(self) -> bool:
        """Removes what was sent and nobody was told of: nothing of it may be there twice when it is sent again. To be
        called while the lease is held, so that no other process can have answered from it. Returns False, with nothing
        removed, where it is not known what was kept.

        An answer goes before what it speaks of: a repetition that finds it is told that this was kept. Rows that are
        followed stay once they could be read, and are there twice then.
        """
        if self._unclear:
            return False
        for collection in sorted(self._sent, key=lambda name: name != ANSWERS):
            self._database[collection].delete_many({"_id": {"$in": self._sent[collection]}})
        return True

    def _replace(self, collection: str, documents: list[dict[str, Any]]) -> dict[int, Any]:
        """By position: the `_id` of each that was not there."""
        if not documents:
            return {}
        requests = [ReplaceOne({"_id": document["_id"]}, document, upsert=True) for document in documents]
        return self._database[collection].bulk_write(requests, session=self._session).upserted_ids or {}


@dataclass(frozen=True)
class _Mark:
    gathered: _Gathered
    state: dict[str, str]
    gatherings: int
    sendings: int
    changes: int


def _sum(before: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return before | {name: before[name] + number for name, number in more.items()}


def change_children(
    database: Database[dict[str, Any]], more: Counter[int], session: ClientSession | None = None
) -> None:
    """Adds to the kept number of children of elements, by index; what is no element of ours is passed over."""
    by_number: dict[int, list[int]] = defaultdict(list)
    for index, number in more.items():
        if number:
            by_number[number].append(index)
    for number, indices in by_number.items():
        wanted = {"index": {"$in": indices}, "asi": {"$exists": True}}
        database[ELEMENTS].update_many(wanted, {"$inc": {"asi.children": number}}, session=session)
