"""Opening a MongoDB store: its indexes, and what another program or an earlier release stored, made ours."""

from __future__ import annotations

from typing import Any

from pymongo import errors as mongo_errors
from pymongo.database import Database

from common.errors import StoreError
from common.files import sha256_text
from database.evaluate_agent.score import evidence_of, parse_table
from database.models import NewElement
from database.mongodb_documents import ELEMENTS, INDEXES, document_of, element_of
from database.mongodb_session import MongoSession
from database.store import NewEntry

__all__ = ["adopt", "create_indexes"]


def create_indexes(database: Database[dict[str, Any]], shown: str) -> None:
    """Creates those that are missing; an earlier release's, which no question uses, stay.

    Raises:
        StoreError: two documents have one index, or none.
    """
    elements = database[ELEMENTS]
    try:
        elements.create_index("index", unique=True)
    except mongo_errors.OperationFailure as error:
        # 11000: the index cannot be built, since a number is held twice.
        if error.code != 11000:
            raise
        twice = ", ".join(MongoSession(database).check()[:10])
        twice = twice or "several documents have no index, or one that is no number above 0, and only one may"
        raise StoreError(
            f"{shown}: {twice}", f"remove or renumber all but one of them in {ELEMENTS}, then start again"
        ) from error
    elements.create_index("asi.key", unique=True, sparse=True)
    for name, fields, sparse in INDEXES:
        options: dict[str, Any] = {"sparse": True} if sparse else {}
        elements.create_index(fields, name=name, **options)


def adopt(database: Database[dict[str, Any]]) -> None:
    """Adds what we keep to documents that another program, or an earlier release, stored; nothing of theirs is changed,
    and the score they gave is kept beside the one that is computed now.

    Both kinds are found by an index in which they are the ones without a value.
    """
    elements = database[ELEMENTS]
    for found in elements.find({"asi.complete": None, "asi": {"$exists": False}, "index": {"$type": "number"}}):
        element = element_of(found)
        entry = NewEntry(
            element=NewElement.model_validate(element.model_dump(exclude={"index"})),
            evidence=evidence_of(element.result.train, element.result.test, None),
            complete=parse_table(element.result.train).complete and parse_table(element.result.test).complete,
        )
        ours = document_of(entry, element.index)["asi"] | {"adopted_score": found.get("score")}
        elements.update_one({"_id": found["_id"], "asi": {"$exists": False}}, {"$set": {"asi": ours}})
    earlier = {"asi.children": None, "asi": {"$exists": True}}
    unrevised = earlier | {"asi.revision": {"$exists": False}}
    elements.update_many(unrevised | {"asi.evaluation": None}, {"$set": {"asi.revision": None}})
    elements.update_many(unrevised, {"$set": {"asi.revision": 0}})
    # Sketches without a place in their order are made again.
    elements.update_many(
        earlier | {"asi.sketch": {"$exists": True}, "asi.sketch_sequence": {"$exists": False}},
        {"$set": {"asi.pending": True}},
    )
    for found in list(elements.find(earlier | {"asi.program_sha256": {"$exists": False}}, {"program": 1})):
        sha256 = sha256_text(str(found.get("program") or "none"))
        elements.update_one({"_id": found["_id"]}, {"$set": {"asi.program_sha256": sha256}})
    elements.update_many(earlier, {"$set": {"asi.children": 0}})
