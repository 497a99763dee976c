"""Between documents of MongoDB and what a session answers: fields, orders, conditions."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar

from pymongo.client_session import ClientSession
from pymongo.collection import Collection

from common.files import sha256_text
from database.models import Element
from database.store import MAX_INDEX, Facts, NewEntry, Order, Where

__all__ = [
    "ELEMENTS",
    "INDEXES",
    "ORDERS",
    "OURS",
    "SMALL",
    "STATE",
    "WHOLE",
    "condition_of",
    "document_of",
    "element_of",
    "facts_of",
    "in_parts",
    "name_of",
    "names_among",
    "possible",
    "spans",
]

ELEMENTS = "data_elements"
STATE = "asi_state"
INDEXES: list[tuple[str, list[tuple[str, int]], bool]] = [
    # Names are counted from it alone.
    ("elements_by_name", [("name", 1), ("time", 1), ("index", 1), ("parent", 1), ("asi.bytes", 1)], False),
    # As is everything else that is kept, from it, and from parent and index.
    ("elements_counted", [("index", 1), ("name", 1), ("parent", 1), ("asi.bytes", 1), ("asi.children", 1)], False),
    ("elements_below", [("parent", 1), ("index", 1), ("asi.bytes", 1)], False),
    ("elements_strongest", [("parent", 1), ("asi.children", -1), ("index", 1)], False),
    ("elements_leaf", [("asi.children", 1), ("index", 1)], False),
    ("asi.benchmark_-1_index_1", [("asi.benchmark", -1), ("index", 1)], False),
    ("score_-1_index_1", [("score", -1), ("index", 1)], False),
    ("asi.complete_1_index_1", [("asi.complete", 1), ("index", 1)], False),
    ("asi.pending_1_index_1", [("asi.pending", 1), ("index", 1)], False),
    ("asi.baseline_key_1_index_1", [("asi.baseline_key", 1), ("index", 1)], False),
    ("asi.baseline_key_1_score_-1_index_1", [("asi.baseline_key", 1), ("score", -1), ("index", 1)], False),
    ("asi.baseline_key_1_asi.revision_1_index_1", [("asi.baseline_key", 1), ("asi.revision", 1), ("index", 1)], False),
    ("asi.vector.model_1_asi.vector.sequence_1", [("asi.vector.model", 1), ("asi.vector.sequence", 1)], False),
    ("asi.sketch_sequence_1", [("asi.sketch_sequence", 1)], True),
    ("asi.fingerprint_1", [("asi.fingerprint", 1)], True),
    ("asi.program_sha256_1", [("asi.program_sha256", 1)], True),
]
"""Name, fields, and whether it leaves out what lacks the field; besides the unique ones of index and asi.key."""
OURS: dict[str, Any] = {"asi.bytes": {"$gte": 0}}
"""Which documents are elements: not those of another program."""
ORDERS: dict[Order, list[tuple[str, int]]] = {
    "index": [("index", 1)],
    "newest": [("index", -1)],
    "time": [("time", 1), ("index", 1)],
    "benchmark": [("asi.benchmark", -1), ("index", 1)],
    "score": [("score", -1), ("index", 1)],
    "revision": [("asi.revision", 1), ("index", 1)],
}
SMALL = {
    "_id": 0,
    "index": 1,
    "name": 1,
    "time": 1,
    "parent": 1,
    "summary": 1,
    "score": 1,
    "asi.loss": 1,
    "asi.benchmark": 1,
    "asi.complete": 1,
    "asi.baseline_key": 1,
    "asi.pending": 1,
    "asi.revision": 1,
}
WHOLE = {"_id": 0, **dict.fromkeys(Element.model_fields, 1)}
_PART = 50
T = TypeVar("T")
_TEXTS = ("time", "name", "program", "motivation", "analysis", "cognition", "log", "summary")
_BY_VALUE = ("time", "benchmark", "score", "revision")


def document_of(entry: NewEntry, index: int) -> dict[str, Any]:
    """The document of a new element: the published fields, and ours under `asi`."""
    now = datetime.now(UTC)
    body = entry.element.model_dump()
    evidence = entry.evidence
    extra: dict[str, Any] = {
        "loss": None if evidence.loss is None else evidence.loss.value,
        "benchmark": None if evidence.benchmark is None else evidence.benchmark.value,
        "complete": entry.complete,
        "baseline_key": evidence.baseline_key,
        "pending": True,
        "bytes": len(json.dumps(body)),
        "evidence": evidence.model_dump_json(),
        "evaluation": None,
        "runs": [] if entry.run is None else [entry.run.model_dump_json()],
        "fingerprint": None if entry.run is None else entry.run.fingerprint,
        "revision": None,
        "children": 0,
        "program_sha256": sha256_text(entry.element.program),
    }
    if entry.key is not None:
        extra["key"] = entry.key
    return {**body, "index": index, "score": None, "created_at": now, "updated_at": now, "asi": extra}


def name_of(document: dict[str, Any]) -> str:
    return str(document.get("name") or "")


def names_among(
    elements: Collection[dict[str, Any]],
    names: Iterable[str],
    through: int | None = None,
    session: ClientSession | None = None,
) -> set[str]:
    """Those of `names` that an element has; of those up to the index `through`, where it is given."""
    wanted = set(names)
    ours = OURS | ({} if through is None else {"index": {"$lte": through}})
    found: set[str] = set()
    for some in in_parts(sorted(wanted)):
        stored: list[Any] = list(some)
        for name in some:
            # Another program may have stored a number.
            with contextlib.suppress(ValueError):
                stored.append(float(name))
        found.update(map(str, elements.distinct("name", ours | {"name": {"$in": stored}}, session=session)))
    # Also found where it is missing.
    if "" in wanted and elements.find_one(ours | {"name": None}, {"_id": 0, "index": 1}, session=session) is not None:
        found.add("")
    return found & wanted


def element_of(document: dict[str, Any]) -> Element:
    """The element in a document, which another program may have stored: a text that is missing is empty."""
    result = document.get("result")
    result = result if isinstance(result, dict) else {}
    texts: dict[str, Any] = {name: str(document.get(name) or "") for name in _TEXTS}
    csvs = {name: str(result.get(name) or "") for name in ("train", "test")}
    return Element.model_validate(
        texts | {"result": csvs, "parent": document.get("parent"), "index": document["index"]}
    )


def in_parts(values: Iterable[T]) -> Iterator[list[T]]:
    """Parts of a list to be asked for with `$in`: a server may compare each document with each of them."""
    rest = list(values)
    for start in range(0, len(rest), _PART):
        yield rest[start : start + _PART]


def spans(after: int, through: int, width: int) -> Iterator[tuple[int, int]]:
    """(low, high] from `after` to `through`, growing, so that a range with few numbers in it takes few steps. A page is
    asked for with both its ends: not every server stops at the limit of a query."""
    while after < through:
        high = min(through, after + width)
        yield after, high
        after, width = high, 4 * width


def possible(where: Where) -> bool:
    """Whether an element may meet all conditions together; a filter has one for each field."""
    if (where.roots and where.parent is not None) or (where.published and where.baseline_key is not None):
        return False
    if where.index is not None and where.index <= where.after:
        return False
    return all(number is None or 0 < number <= MAX_INDEX for number in (where.index, where.parent))


def condition_of(where: Where, order: Order = "index") -> dict[str, Any]:
    """The filter: as few fields as can be, since a server may use one index only."""
    condition: dict[str, Any] = {}
    if where.name is not None:
        condition["name"] = where.name
    if where.parent is not None:
        condition["parent"] = where.parent
    if where.roots:
        condition["parent"] = None
    if where.explored:
        condition["parent"] = {"$gt": 0}
    if where.before_revision is not None:
        condition["asi.revision"] = {"$lt": where.before_revision}
    if where.incomplete:
        condition["asi.complete"] = False
    if where.pending:
        condition["asi.pending"] = True
    if where.unscored:
        condition["score"] = None
    if where.published:
        condition["asi.baseline_key"] = None
    if where.baseline_key is not None:
        condition["asi.baseline_key"] = where.baseline_key
    if where.index is not None:
        condition["index"] = where.index
    elif where.after or not (condition or order in _BY_VALUE) or _by_absence(where, order):
        condition["index"] = {"$gt": min(where.after, MAX_INDEX)}
    return condition


def _by_absence(where: Where, order: Order) -> bool:
    """Whether documents of another program, which lack all that is ours, would be found as well."""
    absent = where.roots or where.unscored or where.published
    return absent and where.before_revision is None and order not in _BY_VALUE


def facts_of(document: dict[str, Any]) -> Facts:
    ours = document["asi"]
    return Facts(
        index=document["index"],
        name=name_of(document),
        time=str(document.get("time") or ""),
        parent=document.get("parent"),
        summary=str(document.get("summary") or ""),
        loss=ours["loss"],
        benchmark=ours["benchmark"],
        complete=ours["complete"],
        baseline_key=ours["baseline_key"],
        score=document.get("score"),
        pending=ours["pending"],
        revision=ours.get("revision"),
    )
