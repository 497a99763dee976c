"""The part of a MongoDB session about novelty: vectors of motivations, sketches of programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from bson import Binary

from common.files import sha256_text
from database.models import Element
from database.mongodb_documents import OURS, in_parts, spans
from database.mongodb_state import MongoState
from database.store import VectorRow, VectorState, windows_in

__all__ = ["MongoVectors"]


class MongoVectors(MongoState):
    """See `database.store.Session`."""

    def use_model(self, model: str) -> None:
        current = self.state("model")
        if current == model:
            return
        self.put_state("model", model)
        self._changing().update_many({"asi": {"$exists": True}}, {"$set": {"asi.pending": True}}, session=self._session)
        if current is not None:
            self._bump("epoch")

    def put_windows(self, index: int, model: str, windows: np.ndarray) -> None:
        wanted = {"index": index, "asi.vector": {"$exists": True}}
        if self._elements.find_one(wanted, {"_id": 1}, session=self._session):
            self._bump("epoch")
        self._set(index, {"asi.vector": self._vector(model, windows), "asi.pending": False})

    def windows(self, after: int, limit: int) -> list[VectorRow]:
        model, last = self.states("model", "sequence")
        condition = {"asi.vector.model": model}
        shown = {"_id": 0, "index": 1, "asi.vector": 1}
        rows = []
        for document in self._following("asi.vector.sequence", after, int(last or 0), limit, condition, shown):
            vector = document["asi"]["vector"]
            block = np.frombuffer(vector["windows"], dtype="<f4").reshape(-1, vector["dimension"])
            rows.append(VectorRow(vector["sequence"], document["index"], block))
        return rows

    def vector_state(self) -> VectorState:
        """The counter of the sequence may be ahead of what is stored, never behind it."""
        epoch, sequence, model = self.states("epoch", "sequence", "model")
        return VectorState(int(epoch or 0), 0 if model is None else int(sequence or 0), model)

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
        if self._elements.find_one(wanted, {"_id": 1}, session=self._session):
            fields = {"asi.sketch": Binary(sketch), "asi.sketch_sequence": self._bump("sketches")}
            self._changing().update_one(wanted, {"$set": fields}, session=self._session)

    def sketches(self, after: int, limit: int) -> list[tuple[int, int, bytes]]:
        shown = {"_id": 0, "index": 1, "asi.sketch": 1, "asi.sketch_sequence": 1}
        last = int(self.state("sketches") or 0)
        return [
            (row["asi"]["sketch_sequence"], row["index"], bytes(row["asi"]["sketch"]))
            for row in self._following("asi.sketch_sequence", after, last, limit, {}, shown)
        ]

    def sketch_sequences(self) -> np.ndarray:
        shown = {"_id": 0, "asi.sketch_sequence": 1}
        found = self._elements.find({"asi.sketch_sequence": {"$gt": 0}}, shown, session=self._session)
        return np.array([document["asi"]["sketch_sequence"] for document in found], dtype=np.int64)

    def windows_of(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        model = self.state("model")
        found = {}
        for document in self._of(indices, "asi.vector"):
            vector = document["asi"].get("vector")
            if vector is not None and vector.get("model") == model:
                found[document["index"]] = windows_in(vector.get("windows") or b"", vector.get("dimension") or 0)
        return found

    def sketches_of(self, indices: Sequence[int]) -> dict[int, bytes]:
        return {
            document["index"]: bytes(document["asi"]["sketch"])
            for document in self._of(indices, "asi.sketch", "asi.sketch_sequence")
            if {"sketch", "sketch_sequence"} <= set(document["asi"])
        }

    def unsettle(self, indices: Sequence[int]) -> None:
        gone = dict.fromkeys(("asi.vector", "asi.sketch", "asi.sketch_sequence"), "")
        for some in in_parts(indices):
            change = {"$unset": gone, "$set": {"asi.pending": True}}
            self._changing().update_many({"index": {"$in": some}, **OURS}, change, session=self._session)
        if indices:
            self._bump("epoch")

    def derive(self, element: Element) -> None:
        self._set(element.index, {"asi.program_sha256": sha256_text(element.program)})

    def _of(self, indices: Sequence[int], *fields: str) -> Iterator[dict[str, Any]]:
        shown = {"_id": 0, "index": 1, **dict.fromkeys(fields, 1)}
        for some in in_parts(indices):
            yield from self._elements.find({"index": {"$in": some}, **OURS}, shown, session=self._session)

    def _following(
        self, field: str, after: int, last: int, limit: int, condition: dict[str, Any], shown: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """The first `limit` documents whose number in `field` follows `after`; none is above `last`."""
        left = limit
        for low, high in spans(after, last, limit):
            wanted = condition | {field: {"$gt": low, "$lte": high}}
            found = list(self._elements.find(wanted, shown, session=self._session).sort(field, 1).limit(left))
            yield from found
            left -= len(found)
            if not left:
                return

    def _set(self, index: int, fields: dict[str, Any]) -> None:
        fields["updated_at"] = datetime.now(UTC)
        if self.draft.document(index) is not None:
            self.draft.edit(index, fields)
        else:
            self._changing().update_one({"index": index}, {"$set": fields}, session=self._session)

    def _vector(self, model: str, windows: np.ndarray) -> dict[str, Any]:
        self.use_model(model)
        block = np.ascontiguousarray(windows, dtype="<f4")
        return {
            "sequence": self._bump("sequence"),
            "model": model,
            "dimension": block.shape[1],
            "windows": Binary(block.tobytes()),
        }
