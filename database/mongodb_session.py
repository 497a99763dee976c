"""What a write or read does in MongoDB: the queries behind `database.store.Session`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from bson import Binary
from pymongo.client_session import ClientSession
from pymongo.database import Database

from common.records import Baseline, RunRecord
from database.errors import RefusedError
from database.evaluate_agent.score import Evaluation, Evidence
from database.models import Element
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
    possible,
)
from database.mongodb_ledger import MongoLedger
from database.store import KEPT_STATE, MAX_INDEX, Facts, NewEntry, Order, Sizes, VectorRow, VectorState, Where

__all__ = ["BASELINES", "MongoSession"]

_ANSWERS = "asi_answers"
BASELINES = "asi_baselines"
_EVERYTHING = Where()
_CANDIDATES = "candidates"
_GUESSES = 20
_LARGEST = 14 << 20
"""Bytes of an element as JSON: MongoDB's limit is 16 MiB, and vectors and evidence come on top."""


class MongoSession:
    """See `database.store.Session`."""

    def __init__(self, database: Database[dict[str, Any]], session: ClientSession | None = None) -> None:
        self._database = database
        self._elements = database[ELEMENTS]
        self._session = session

    # Elements

    def insert(self, entry: NewEntry) -> int:
        # The counter knows of elements that are gone. What it does not know of was cut off after its document, or is
        # another program's.
        index = int(self.state("last_index") or 0) + 1
        while self._elements.count_documents({"index": index}, session=self._session, limit=1):
            index += 1
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
        self._elements.insert_one(document, session=self._session)
        self.put_state("last_index", index)
        if entry.sketch is not None:
            self.put_sketch(index, entry.sketch)
        return index

    def find_key(self, key: str) -> Facts | None:
        found = self._elements.find_one({"asi.key": key}, SMALL, session=self._session)
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
        found = self._elements.find(condition_of(where, order), SMALL, session=self._session)
        if where.index is None:
            found = found.sort(ORDERS[order])
        page = found.skip(min(offset, MAX_INDEX)).limit(limit or 0)
        # A document that another program keeps here is none of ours.
        return [facts_of(document) for document in page if "asi" in document]

    def elements(self, indices: Sequence[int]) -> list[Element]:
        known = [index for index in indices if 0 < index <= MAX_INDEX]
        found = self._elements.find({"index": {"$in": known}}, WHOLE, session=self._session)
        elements = {document["index"]: element_of(document) for document in found}
        return [elements[index] for index in indices if index in elements]

    def ranked(self, order: Order, limit: int | None = None, offset: int = 0) -> list[int]:
        if limit == 0:
            return []
        keys = ORDERS[order]
        # Only what the index holds is asked for: no document is read.
        shown = {"_id": 0, "index": 1} | {name: 1 for name, _ in keys}
        found = self._elements.find(condition_of(_EVERYTHING, order), shown, session=self._session).sort(keys)
        page = found.skip(min(offset, MAX_INDEX)).limit(limit or 0)
        return [document["index"] for document in page if "index" in document]

    def sample(self) -> int | None:
        newest = self.ranked("newest", limit=1)
        if not newest:
            return None
        for _ in range(_GUESSES):
            guess = random.randint(1, newest[0])
            if self._elements.find_one({"index": guess}, {"_id": 0, "index": 1}, session=self._session):
                return guess
        # Most of the numbers are gone: counted off instead.
        return self.ranked("index", limit=1, offset=random.randrange(self.count()))[0]

    def count(self, where: Where = _EVERYTHING, limit: int | None = None) -> int:
        if limit == 0 or not possible(where):
            return 0
        options = {} if limit is None else {"limit": limit}
        return int(self._elements.count_documents(condition_of(where), session=self._session, **options))

    def unique_names(self) -> int:
        return len(self._elements.distinct("name", {"name": {"$gte": ""}}, session=self._session))

    def child_counts(self, indices: Iterable[int] | None = None) -> dict[int, int]:
        match: dict[str, Any] = {"$gt": 0} if indices is None else {"$in": list(indices)}
        stages: list[dict[str, Any]] = [
            {"$match": {"parent": match}},
            {"$group": {"_id": "$parent", "count": {"$sum": 1}}},
        ]
        return {row["_id"]: row["count"] for row in self._elements.aggregate(stages, session=self._session)}

    def strongest_children(self, parent: int, limit: int) -> list[int]:
        shown = {"_id": 0, "index": 1, "parent": 1}
        found = self._elements.find({"parent": parent}, shown, session=self._session)
        children = [document["index"] for document in found]
        counts = self.child_counts(children)
        return sorted(children, key=lambda child: (-counts.get(child, 0), child))[:limit]

    def oldest_leaf(self) -> int | None:
        parents = set(self._elements.distinct("parent", session=self._session))
        known = self._elements.find({"index": {"$gt": 0}}, {"_id": 0, "index": 1}, session=self._session)
        for found in known.sort("index", 1):
            if found["index"] not in parents:
                return int(found["index"])
        return None

    def orphans(self) -> list[int]:
        parents = [parent for parent in self._elements.distinct("parent", session=self._session) if parent is not None]
        shown = {"_id": 0, "index": 1}
        known = self._elements.find({"index": {"$in": parents}}, shown, session=self._session)
        lost = set(parents) - {document["index"] for document in known}
        found = self._elements.find({"parent": {"$in": list(lost)}}, shown | {"parent": 1}, session=self._session)
        return sorted(document["index"] for document in found)

    def set_parent(self, indices: Sequence[int], parent: int | None) -> None:
        self._elements.update_many(
            {"index": {"$in": list(indices)}},
            {"$set": {"parent": parent, "updated_at": datetime.now(UTC)}},
            session=self._session,
        )

    def delete(self, indices: Sequence[int]) -> None:
        if not indices:
            return
        self._elements.delete_many({"index": {"$in": list(indices)}}, session=self._session)
        kept = [index for index in self.state(_CANDIDATES) or [] if index not in set(indices)]
        self.put_state(_CANDIDATES, kept)
        self._bump("epoch")

    def clear(self) -> None:
        self._elements.delete_many({"asi": {"$exists": True}}, session=self._session)
        self._database[_ANSWERS].delete_many({}, session=self._session)
        self._database[STATE].delete_many({"_id": {"$nin": ["lease", *KEPT_STATE]}}, session=self._session)
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

    # Novelty

    def put_windows(self, index: int, model: str, windows: np.ndarray) -> None:
        replaced = self._elements.count_documents(
            {"index": index, "asi.vector": {"$exists": True}}, session=self._session, limit=1
        )
        if replaced:
            self._bump("epoch")
        self._set(index, {"asi.vector": self._vector(model, windows), "asi.pending": False})

    def windows(self, after: int, limit: int) -> list[VectorRow]:
        condition = {"asi.vector.model": self.state("model"), "asi.vector.sequence": {"$gt": after}}
        found = self._elements.find(condition, {"_id": 0, "index": 1, "asi.vector": 1}, session=self._session)
        rows = []
        for document in found.sort("asi.vector.sequence", 1).limit(limit):
            vector = document["asi"]["vector"]
            block = np.frombuffer(vector["windows"], dtype="<f4").reshape(-1, vector["dimension"])
            rows.append(VectorRow(vector["sequence"], document["index"], block))
        return rows

    def vector_state(self) -> VectorState:
        model = self.state("model")
        last = list(
            self._elements.find(
                {"asi.vector.model": model}, {"_id": 0, "asi.vector.sequence": 1}, session=self._session
            )
            .sort("asi.vector.sequence", -1)
            .limit(1)
        )
        sequence = last[0]["asi"]["vector"]["sequence"] if model is not None and last else 0
        return VectorState(int(self.state("epoch") or 0), sequence, model)

    def vector_sequences(self) -> np.ndarray:
        condition = {"asi.vector.model": self.state("model"), "asi.vector.sequence": {"$gt": 0}}
        shown = {"_id": 0, "asi.vector.sequence": 1}
        found = self._elements.find(condition, shown, session=self._session).sort("asi.vector.sequence", 1)
        return np.array([document["asi"]["vector"]["sequence"] for document in found], dtype=np.int64)

    def outdate_vectors(self) -> None:
        """Makes whoever holds the vectors in memory see which are gone."""
        self._bump("epoch")

    def put_sketch(self, index: int, sketch: bytes) -> None:
        wanted = {"index": index, "asi.sketch_sequence": {"$exists": False}}
        if self._elements.count_documents(wanted, session=self._session, limit=1):
            fields = {"asi.sketch": Binary(sketch), "asi.sketch_sequence": self._bump("sketches")}
            self._elements.update_one(wanted, {"$set": fields}, session=self._session)

    def sketches(self, after: int, limit: int) -> list[tuple[int, int, bytes]]:
        found = self._elements.find(
            {"asi.sketch_sequence": {"$gt": after}},
            {"_id": 0, "index": 1, "asi.sketch": 1, "asi.sketch_sequence": 1},
            session=self._session,
        )
        return [
            (row["asi"]["sketch_sequence"], row["index"], bytes(row["asi"]["sketch"]))
            for row in found.sort("asi.sketch_sequence", 1).limit(limit)
        ]

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

    # Small state

    def state(self, name: str) -> Any:
        found = self._database[STATE].find_one({"_id": name}, session=self._session)
        return None if found is None else json.loads(found["value"])

    def put_state(self, name: str, value: Any) -> None:
        self._database[STATE].replace_one(
            {"_id": name}, {"_id": name, "value": json.dumps(value)}, upsert=True, session=self._session
        )

    def answer(self, route: str, key: str) -> dict[str, Any] | None:
        found = self._database[_ANSWERS].find_one({"_id": f"{route} {key}"}, session=self._session)
        return None if found is None else json.loads(found["body"])

    def put_answer(self, route: str, key: str, answer: dict[str, Any]) -> None:
        name = f"{route} {key}"
        document = {"_id": name, "body": json.dumps(answer)}
        self._database[_ANSWERS].replace_one({"_id": name}, document, upsert=True, session=self._session)

    def baseline(self, key: str) -> Baseline | None:
        found = self._database[BASELINES].find_one({"_id": key}, session=self._session)
        return None if found is None else Baseline.model_validate_json(found["body"])

    def put_baseline(self, baseline: Baseline) -> None:
        document = {"_id": baseline.key, "body": baseline.model_dump_json(), "revision": self.next_revision()}
        self._database[BASELINES].replace_one({"_id": baseline.key}, document, upsert=True, session=self._session)

    def baseline_revision(self, key: str) -> int:
        found = self._database[BASELINES].find_one({"_id": key}, {"revision": 1}, session=self._session)
        return 0 if found is None else int(found.get("revision") or 0)

    def next_revision(self) -> int:
        return self._bump("revision")

    # Beside the elements

    @property
    def ledger(self) -> MongoLedger:
        return MongoLedger(self._database, self._session)

    # Upkeep

    def sizes(self) -> Sizes:
        stages = [{"$group": {"_id": None, "bytes": {"$sum": "$asi.bytes"}}}]
        rows = list(self._elements.aggregate(stages, session=self._session))
        documents = int(rows[0]["bytes"]) if rows else 0
        stats = self._database.command("dbStats")
        return Sizes(
            database=int(stats.get("dataSize") or documents),
            documents=documents,
            storage=int(stats.get("storageSize") or documents),
            index=int(stats.get("indexSize") or 0),
            database_name=self._database.name,
            collection_name=ELEMENTS,
        )

    def check(self) -> list[str]:
        stages: list[dict[str, Any]] = [
            {"$match": {"index": {"$gt": 0}}},
            {"$group": {"_id": "$index", "count": {"$sum": 1}}},
            {"$match": {"count": {"$gt": 1}}},
        ]
        twice = self._elements.aggregate(stages, session=self._session)
        return [f"index {row['_id']} is held by {row['count']} documents" for row in twice]

    def _set(self, index: int, fields: dict[str, Any]) -> None:
        fields["updated_at"] = datetime.now(UTC)
        self._elements.update_one({"index": index}, {"$set": fields}, session=self._session)

    def _vector(self, model: str, windows: np.ndarray) -> dict[str, Any]:
        current = self.state("model")
        if current != model:
            # Vectors of two models are not comparable: all others are pending from now on.
            self.put_state("model", model)
            self._elements.update_many(
                {"asi": {"$exists": True}}, {"$set": {"asi.pending": True}}, session=self._session
            )
            if current is not None:
                self._bump("epoch")
        block = np.ascontiguousarray(windows, dtype="<f4")
        return {
            "sequence": self._bump("sequence"),
            "model": model,
            "dimension": block.shape[1],
            "windows": Binary(block.tobytes()),
        }

    def _bump(self, counter: str) -> int:
        value = int(self.state(counter) or 0) + 1
        self.put_state(counter, value)
        return value
