"""What a write or read does in MongoDB: the queries behind `database.store.Session`.

No question reads more than its answer by an index that docs/database.md names for it. Pages have both ends, and what
would have to be counted is kept: see `mongodb_counts`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from common.records import RunRecord
from database.errors import RefusedError
from database.evaluate_agent.score import Evaluation, Evidence
from database.models import Element
from database.mongodb_counts import child_counts, disagreements
from database.mongodb_documents import (
    ELEMENTS,
    ORDERS,
    SMALL,
    STATE,
    WHOLE,
    condition_of,
    document_of,
    element_of,
    facts_of,
    name_of,
    names_among,
    possible,
    spans,
)
from database.mongodb_draft import ANSWERS, COUNTING, Counting, Totals, change_children
from database.mongodb_ledger import MongoLedger
from database.mongodb_pages import FIRST_PAGE, MongoPages
from database.mongodb_vectors import MongoVectors
from database.store import CLEARED, KEPT_STATE, MAX_INDEX, Facts, NewEntry, Order, Sizes, Where

__all__ = ["MongoSession"]

_EVERYTHING = Where()
_CANDIDATES = "candidates"
_GUESSES = 20
_TOGETHER = 100
"""Elements of a long list that are read at once."""
_USUAL_BYTES = 20_000
"""Of an element."""
_LARGEST = 14 << 20
"""Bytes of an element as JSON: MongoDB's limit is 16 MiB, and vectors and evidence come on top."""


class MongoSession(MongoPages, MongoVectors):
    """See `database.store.Session`."""

    # Elements

    def insert(self, entry: NewEntry, index: int | None = None) -> int:
        # Asked for as well where one is given: what is found beyond the counter is passed over.
        following = self._next_index()
        index = following if index is None else index
        document = document_of(entry, index)
        size = document["asi"]["bytes"] + sum(map(len, document["asi"]["runs"]))
        if size > _LARGEST:
            raise RefusedError(
                f"expected an element of at most {_LARGEST >> 20} MiB with its run, got {size / 2**20:.1f}:"
                " MongoDB keeps no larger document"
            )
        if entry.windows is not None and entry.model is not None:
            document["asi"]["vector"] = self._vector(entry.model, entry.windows)
            document["asi"]["pending"] = False
        self.draft.add(document)
        self.put_state("last_index", max(index, following - 1))
        self.draft.first_free = max(index + 1, self.draft.first_free)
        if entry.sketch is not None:
            self.put_sketch(index, entry.sketch)
        return index

    def _next_index(self) -> int:
        """The counter knows of elements that are gone. What it does not know of was cut off after its document, or is
        another program's."""
        index = int(self.state("last_index") or 0) + 1
        if not 0 < self.draft.first_free <= index:
            found = self._elements.find({"index": {"$gte": index}}, {"_id": 0, "index": 1}, session=self._session)
            for document in found.sort("index", -1).limit(1):
                index = int(document["index"]) + 1
            self.draft.first_free = index
        return index

    def is_free(self, index: int) -> bool:
        if self.draft.document(index) is not None:
            return False
        if index >= self._next_index():
            return True
        shown = {"_id": 0, "index": 1}
        return self._database[ELEMENTS].find_one({"index": index}, shown, session=self._session) is None

    def find_key(self, key: str) -> Facts | None:
        found = None if self._draft is None else self._draft.with_key(key)
        if found is None:
            found = self._database[ELEMENTS].find_one({"asi.key": key}, SMALL, session=self._session)
        return None if found is None else facts_of(found)

    def keys(self, indices: Sequence[int]) -> dict[int, str]:
        known = [index for index in indices if 0 < index <= MAX_INDEX]
        wanted = {"index": {"$in": known}, "asi.key": {"$exists": True}}
        found = self._elements.find(wanted, {"_id": 0, "index": 1, "asi.key": 1}, session=self._session)
        return {document["index"]: document["asi"]["key"] for document in found}

    def facts(
        self, where: Where = _EVERYTHING, order: Order = "index", limit: int | None = None, offset: int = 0
    ) -> list[Facts]:
        if limit == 0 or not possible(where):
            return []
        found = self._one(where) if where.index is not None else self._page(where, order, limit, offset, SMALL)
        if found is None:
            cursor = self._elements.find(condition_of(where, order), SMALL, session=self._session)
            if where.index is None:
                cursor = cursor.sort(ORDERS[order])
            found = list(cursor.skip(min(offset, MAX_INDEX)).limit(limit or 0))
        # A document that another program keeps here is none of ours.
        return [facts_of(document) for document in found if "asi" in document]

    def _one(self, where: Where) -> list[dict[str, Any]] | None:
        """An element that was not sent yet; None where the server is to be asked."""
        assert where.index is not None
        if where != Where(index=where.index):
            return None
        new = None if self._draft is None else self._draft.document(where.index)
        if new is not None:
            return [new]
        found = self._database[ELEMENTS].find_one({"index": where.index}, SMALL, session=self._session)
        return [] if found is None else [found]

    def elements(self, indices: Sequence[int]) -> list[Element]:
        known = [index for index in indices if 0 < index <= MAX_INDEX]
        found = self._elements.find({"index": {"$in": known}}, WHOLE, session=self._session)
        elements = {document["index"]: element_of(document) for document in found}
        return [elements[index] for index in indices if index in elements]

    def each(self, indices: Sequence[int]) -> Iterator[Element]:
        for start in range(0, len(indices), _TOGETHER):
            yield from self.elements(indices[start : start + _TOGETHER])

    def weight_of(self, indices: Sequence[int]) -> int:
        return _USUAL_BYTES * len(indices)

    def bytes_of(self, indices: Sequence[int]) -> dict[int, int]:
        shown = {"_id": 0, "index": 1, "asi.bytes": 1}
        found = self._elements.find({"index": {"$in": list(indices)}}, shown, session=self._session)
        sizes = {document["index"]: document.get("asi", {}).get("bytes") for document in found}
        return {index: size for index, size in sizes.items() if size is not None}

    def ranked(self, order: Order, limit: int | None = None, offset: int = 0) -> list[int]:
        if limit == 0:
            return []
        keys = ORDERS[order]
        # Only what the index holds is asked for: no document is read.
        shown = {"_id": 0, "index": 1} | {name: 1 for name, _ in keys}
        found = self._page(_EVERYTHING, order, limit, offset, shown)
        if found is None:
            cursor = self._elements.find(condition_of(_EVERYTHING, order), shown, session=self._session).sort(keys)
            found = list(cursor.skip(min(offset, MAX_INDEX)).limit(limit or 0))
        return [document["index"] for document in found if "index" in document]

    def sample(self) -> int | None:
        newest = self.ranked("newest", limit=1)
        if not newest:
            return None
        for _ in range(_GUESSES):
            guess = random.randint(1, newest[0])
            if self._elements.find_one({"index": guess}, {"_id": 0, "index": 1}, session=self._session):
                return guess
        if self.counting() is not None:
            # Most of the numbers are gone, and how many are left is not known: the next one above a guess.
            above = self._ascending(random.randrange(newest[0]), 1, {"_id": 0, "index": 1}, {})
            return int(above[0]["index"]) if above else newest[0]
        # Counted off instead.
        found = self.ranked("index", limit=1, offset=random.randrange(max(1, self.count())))
        return found[0] if found else newest[0]

    def count(self, where: Where = _EVERYTHING, limit: int | None = None) -> int:
        if limit == 0 or not possible(where):
            return 0
        if where in (_EVERYTHING, Where(explored=True)):
            if limit is not None:
                now = self.counting()
                if now is not None:
                    return self._some(where, limit, now)
            counts = self.counts
            total = counts.explored if where.explored else counts.records
            return total if limit is None else min(total, limit)
        if limit is None:
            return int(self._elements.count_documents(condition_of(where), session=self._session))
        shown = {"_id": 0, "index": 1}
        found = self._page(where, "index", limit, 0, shown)
        if found is None:
            found = list(self._elements.find(condition_of(where), shown, session=self._session).limit(limit))
        return len(found)

    def _some(self, where: Where, limit: int, now: Counting) -> int:
        """Counts on from where the counting is, no further than `limit`, while the totals are not known."""
        found = now.explored if where.explored else now.records
        for low, high in spans(now.through, int(self.state("last_index") or 0), max(FIRST_PAGE, 2 * limit)):
            if found >= limit:
                break
            shown = {"_id": 0, "index": 1, "parent": 1, "asi.bytes": 1}
            page = self._elements.find({"index": {"$gt": low, "$lte": high}}, shown, session=self._session)
            found += sum("asi" in row and (not where.explored or row.get("parent") is not None) for row in page)
        return min(found, limit)

    def unique_names(self) -> int:
        if self._draft is not None:
            # Which names are new is found out when elements are sent.
            self._draft.send()
        return self.counts.names

    def names_among(self, names: Iterable[str], through: int | None = None) -> set[str]:
        """See `database.mongodb_documents.names_among`."""
        return names_among(self._elements, names, through, self._session)

    def change_elements(self, wanted: dict[str, Any], change: dict[str, Any]) -> int:
        """Changes those that match; returns how many were not so already."""
        return self._changing().update_many(wanted, change, session=self._session).modified_count

    def child_counts(self, indices: Iterable[int] | None = None) -> dict[int, int]:
        if self.counting() is not None:
            given = None if indices is None else list(indices)
            if self._draft is not None:
                self._draft.send()
            return child_counts(self._database, given, self._session)
        wanted: dict[str, Any] = {"asi.children": {"$gt": 0}}
        if indices is not None:
            wanted = {"index": {"$in": list(indices)}}
        found = self._elements.find(wanted, {"_id": 0, "index": 1, "asi.children": 1}, session=self._session)
        counts = {document["index"]: document.get("asi", {}).get("children", 0) for document in found}
        return {index: count for index, count in counts.items() if count}

    def strongest_children(self, parent: int, limit: int) -> list[int]:
        if self.counting() is not None:
            children = [facts.index for facts in self.facts(Where(parent=parent))]
            counts = self.child_counts(children)
            return sorted(children, key=lambda child: (-counts.get(child, 0), child))[:limit]
        shown = {"_id": 0, "index": 1, "asi.children": 1}
        found = self._elements.find({"parent": parent, "index": {"$gt": 0}}, shown, session=self._session)
        order = [("asi.children", -1), ("index", 1)]
        return [document["index"] for document in found.sort(order).limit(limit)]

    def orphans(self) -> list[int]:
        parents = [parent for parent in self._elements.distinct("parent", session=self._session) if parent is not None]
        shown = {"_id": 0, "index": 1}
        known = self._elements.find({"index": {"$in": parents}}, shown, session=self._session)
        lost = set(parents) - {document["index"] for document in known}
        wanted = {"parent": {"$in": list(lost)}, "index": {"$gt": 0}}
        found = self._elements.find(wanted, shown | {"parent": 1}, session=self._session)
        return sorted(document["index"] for document in found)

    def set_parent(self, indices: Sequence[int], parent: int | None) -> None:
        wanted = {"index": {"$in": list(indices)}, "asi": {"$exists": True}}
        found = self._elements.find(wanted, {"_id": 0, "index": 1, "parent": 1}, session=self._session)
        rows = list(found)
        before = [document.get("parent") for document in rows]
        more = Counter({parent: len(before)} if parent is not None else {})
        more.subtract(above for above in before if above is not None)
        through = self.draft.counted_through()
        more_explored = {
            document["index"]: (parent is not None) - (document.get("parent") is not None) for document in rows
        }
        self.draft.add_totals(explored=sum(more_explored.values()))
        if through:
            self.draft.add_counted(explored=sum(more for index, more in more_explored.items() if index <= through))
        changed = {"parent": parent, "updated_at": datetime.now(UTC)}
        self._changing().update_many(wanted, {"$set": changed}, session=self._session)
        change_children(self._database, more, self._session)

    def delete(self, indices: Sequence[int]) -> None:
        if not indices:
            return
        wanted = {"index": {"$in": list(indices)}, "asi": {"$exists": True}}
        shown = {"_id": 0, "index": 1, "name": 1, "parent": 1, "asi.bytes": 1}
        gone = list(self._elements.find(wanted, shown, session=self._session))
        elements = self._changing()
        elements.delete_many({"index": {"$in": list(indices)}}, session=self._session)
        change_children(self._database, _fewer(gone), self._session)
        self.draft.add_totals(**self._less(gone))
        through = self.draft.counted_through()
        if through:
            counted = [document for document in gone if document["index"] <= through]
            self.draft.add_counted(**self._less(counted, through))
        kept = [index for index in self.state(_CANDIDATES) or [] if index not in set(indices)]
        self.put_state(_CANDIDATES, kept)
        self._bump("epoch")

    def _less(self, gone: Sequence[dict[str, Any]], through: int | None = None) -> dict[str, int]:
        """By how much the totals change, of all elements or of those up to the index `through`, now that these are
        gone."""
        names = {name_of(document) for document in gone}
        return {
            "records": -len(gone),
            "bytes": -sum(document["asi"]["bytes"] for document in gone),
            "explored": -sum(document.get("parent") is not None for document in gone),
            "names": -len(names - self.names_among(names, through)),
        }

    def clear(self) -> None:
        before = self.totals
        # First: whoever sees that something is gone, or an index given anew, can see why.
        self._bump(CLEARED)
        self._changing().delete_many({"asi": {"$exists": True}}, session=self._session)
        self._changing(ANSWERS).delete_many({}, session=self._session)
        # Until the totals are there too, nobody is to answer from those before that are being counted.
        kept = ["lease", "totals", COUNTING, *KEPT_STATE]
        self._changing(STATE).delete_many({"_id": {"$nin": kept}}, session=self._session)
        for name in set(self.draft.state()).difference(kept):
            del self.draft.state()[name]
        self.put_state("totals", vars(Totals(events=before.events, trimmed=before.trimmed, usage=before.usage)))
        self.put_state(COUNTING, None)
        self._bump("epoch")

    # What is measured and computed of an element

    def evidence(self, index: int) -> tuple[Evidence, Evaluation | None] | None:
        if not 0 < index <= MAX_INDEX:
            return None
        found = self._elements.find_one(
            {"index": index}, {"_id": 0, "asi.evidence": 1, "asi.evaluation": 1}, session=self._session
        )
        if found is None:
            return None
        evaluation = found["asi"]["evaluation"]
        return (
            Evidence.model_validate_json(found["asi"]["evidence"]),
            None if evaluation is None else Evaluation.model_validate_json(evaluation),
        )

    def set_evaluation(self, index: int, evidence: Evidence, evaluation: Evaluation) -> None:
        self._set(
            index,
            {
                "score": evaluation.score,
                "asi.revision": evaluation.revision,
                "asi.loss": None if evidence.loss is None else evidence.loss.value,
                "asi.benchmark": None if evidence.benchmark is None else evidence.benchmark.value,
                "asi.evidence": evidence.model_dump_json(),
                "asi.evaluation": evaluation.model_dump_json(),
            },
        )

    def set_complete(self, index: int, complete: bool) -> None:
        self._set(index, {"asi.complete": complete})

    def runs(self, index: int) -> list[RunRecord]:
        found = self._elements.find_one({"index": index}, {"_id": 0, "asi.runs": 1}, session=self._session)
        return [] if found is None else [RunRecord.model_validate_json(body) for body in found["asi"]["runs"]]

    def with_fingerprint(self, fingerprint: str) -> list[int]:
        wanted = {"asi.fingerprint": fingerprint}
        found = self._elements.find(wanted, {"_id": 0, "index": 1}, session=self._session).sort("index", 1)
        return [document["index"] for document in found]

    # Candidates

    def candidates(self) -> list[Facts]:
        indices = self.state(_CANDIDATES) or []
        found = self._elements.find({"index": {"$in": indices}}, SMALL, session=self._session)
        return sorted(
            (facts_of(document) for document in found),
            key=lambda facts: (facts.score is None, -(facts.score or 0.0), facts.index),
        )

    def candidate_count(self) -> int:
        """How many are listed, whether or not they exist."""
        return len(self.state(_CANDIDATES) or [])

    def put_candidates(self, indices: Sequence[int]) -> None:
        self.put_state(_CANDIDATES, list(indices))

    # Beside the elements

    @property
    def ledger(self) -> MongoLedger:
        return MongoLedger(self._database, self._session, self._draft, self._known)

    # Upkeep

    def sizes(self) -> Sizes:
        documents = self.counts.bytes
        asked = self._known.sizes
        measured = None if asked is None else asked.latest()
        told = {} if measured is None else measured.said
        return Sizes(
            database=told.get("dataSize"),
            documents=documents,
            storage=told.get("storageSize"),
            index=told.get("indexSize"),
            database_name=self._database.name,
            collection_name=ELEMENTS,
            measured_at=None if measured is None else measured.at,
        )

    def check(self) -> list[str]:
        stages: list[dict[str, Any]] = [
            {"$match": {"index": {"$gt": 0}}},
            {"$group": {"_id": "$index", "count": {"$sum": 1}}},
            {"$match": {"count": {"$gt": 1}}},
        ]
        twice = self._elements.aggregate(stages, session=self._session)
        said = [f"index {row['_id']} is held by {row['count']} documents; remove or renumber one" for row in twice]
        wrong = disagreements(self._database)
        return said + [f"{line}; start the server again, which counts anew" for line in wrong]

    def recount(self) -> None:
        """Nothing to do: see `database.mongodb_counting`."""


def _fewer(gone: Sequence[dict[str, Any]]) -> Counter[int]:
    """By how much the children of the parents of removed elements change."""
    more: Counter[int] = Counter()
    more.subtract(document["parent"] for document in gone if document.get("parent") is not None)
    return more
