"""The part of a MongoDB session that answers with the first few in an order: by index, newest, by a number;
and with the oldest element without children, and all parents.

Each page is asked for with both its ends. MongoDB stops at the limit of a query by itself; not every server that speaks
its protocol does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from database.mongodb_counts import child_counts
from database.mongodb_documents import OURS, condition_of, in_parts, spans
from database.mongodb_state import MongoState
from database.store import MAX_INDEX, Order, Where

__all__ = ["FIRST_PAGE", "MongoPages"]

FIRST_PAGE = 64
_LARGEST = 4096
"""Documents of a page that is asked for so."""
_DEEPEST = 4 * _LARGEST
"""As `_LARGEST`, of the best, of which a request may ask for 10,000. What is deeper the server passes over by itself:
all of them would come here else."""
_SAMPLE = 400
"""Elements that are looked at to find out from which value on the best begin."""
_PAGED = ("parent", "score", "asi.baseline_key", "asi.complete", "asi.pending")
"""Fields that have an index of this field and the index of the element."""
_RANKED = ("asi.baseline_key",)
"""Fields that have an index of this field and the score."""


class MongoPages(MongoState):
    def _page(
        self, where: Where, order: Order, limit: int | None, offset: int, shown: dict[str, Any]
    ) -> list[dict[str, Any]] | None:
        """The documents at `offset` and after it in this order; None where that is no page: of too many, or by other
        conditions, or in another order."""
        if limit is None or where.index is not None:
            return None
        fixed, wanted = condition_of(replace(where, after=0), "score"), offset + limit
        if wanted > _DEEPEST:
            return None
        if order == "benchmark" and where == Where():
            return self._best("asi.benchmark", {}, wanted, shown)[offset:]
        if order == "score" and not where.after and _one_of(fixed, _RANKED):
            return self._best("score", fixed, wanted, shown)[offset:]
        if wanted > _LARGEST:
            return None
        if order == "index" and (not fixed or _one_of(fixed, _PAGED)):
            return self._ascending(where.after, wanted, shown, fixed)[offset:]
        if order == "newest" and not fixed:
            return self._newest(where.after, wanted, shown)[offset:]
        return None

    def _ascending(self, after: int, wanted: int, shown: dict[str, Any], fixed: dict[str, Any]) -> list[dict[str, Any]]:
        """The first `wanted` documents above `after`, by index, of those that meet `fixed`."""
        found: list[dict[str, Any]] = []
        last: int | None = None
        low, width = min(after, MAX_INDEX), wanted if not fixed else max(FIRST_PAGE, wanted)
        while True:
            ends = {"$gt": low, "$lte": min(MAX_INDEX, low + width)}
            if last is not None and low >= last:
                # The counter may be behind what another program stored.
                ends = {"$gt": low}
            page = self._elements.find(fixed | {"index": ends}, shown, session=self._session).sort("index", 1)
            found += page.limit(wanted - len(found))
            if len(found) >= wanted or "$lte" not in ends:
                return found
            if last is None:
                last = int(self.state("last_index") or 0)
            low, width = ends["$lte"], max(FIRST_PAGE, 4 * width)

    def _newest(self, after: int, wanted: int, shown: dict[str, Any]) -> list[dict[str, Any]]:
        """The last `wanted` documents above `after`, newest first."""
        last, width = int(self.state("last_index") or 0), wanted
        while True:
            low = max(after, last - width)
            page = self._elements.find({"index": {"$gt": low}}, shown, session=self._session).sort("index", -1)
            found = list(page.limit(wanted))
            if len(found) >= wanted or low <= after:
                return found
            width = max(FIRST_PAGE, 4 * width)

    def _best(self, field: str, fixed: dict[str, Any], wanted: int, shown: dict[str, Any]) -> list[dict[str, Any]]:
        """The first `wanted` documents by the number in `field`, highest first, of those that meet `fixed`. They are
        right whatever lower end is tried, where it leaves enough of them."""
        ranked = f"{field} {fixed}"
        found: list[dict[str, Any]] = []
        for floor in chain(self._floors(ranked, field, fixed, wanted), [None]):
            condition = fixed if floor is None else fixed | {field: {"$gte": floor}}
            cursor = self._elements.find(condition, shown, session=self._session).sort([(field, -1), ("index", 1)])
            found = list(cursor.limit(wanted))
            if len(found) == wanted:
                break
        self._known.note_floor(ranked, wanted, _number(found[-1], field) if len(found) == wanted else None)
        return found

    def _floors(self, ranked: str, field: str, fixed: dict[str, Any], wanted: int) -> Iterator[float]:
        """Lower ends of the `wanted` best, one after the other: what the last of them had the time before, and, since
        some of these may be gone, what a sample says."""
        known = self._known.floor(ranked, wanted)
        if known is not None:
            yield known
        last = int(self.state("last_index") or 0)
        if last <= 2 * _SAMPLE:
            return
        values: list[float] = []
        for some in in_parts(random.sample(range(1, last + 1), _SAMPLE)):
            drawn = fixed | {"index": {"$in": some}}
            rows = self._elements.find(drawn, {"_id": 0, "index": 1, field: 1}, session=self._session)
            values += [number for row in rows if (number := _number(row, field)) is not None]
        values.sort(reverse=True)
        # About `last / _SAMPLE` elements are above each of them.
        place = math.ceil(2 * wanted * _SAMPLE / last)
        while place <= len(values):
            yield values[place - 1]
            place *= 4

    def parents(self, indices: Sequence[int] | None = None) -> dict[int, int | None]:
        # Only what an index holds is asked for; a document of another program lacks the last.
        shown = {"_id": 0, "index": 1, "parent": 1, "asi.bytes": 1}
        found: dict[int, int | None] = {}
        if indices is not None:
            for some in in_parts(index for index in indices if 0 < index <= MAX_INDEX):
                page = self._elements.find({"index": {"$in": some}}, shown, session=self._session)
                found.update((row["index"], row.get("parent")) for row in page if "asi" in row)
            return found
        after = 0
        while rows := self._ascending(after, _LARGEST, shown, {}):
            found.update((row["index"], row.get("parent")) for row in rows if "asi" in row)
            after = rows[-1]["index"]
        return found

    def oldest_leaf(self) -> int | None:
        """Looked for first where it was found last."""
        now = self.counting()
        if now is not None:
            return self._counted_leaf(now.through)
        last: int | None = None
        low, high = 0, self._known.leaf
        while True:
            # The counter may be behind what another program stored.
            ends = {"$gt": low, "$lte": high} if last is None or low < last else {"$gt": low}
            wanted = {"asi.children": 0, "index": ends}
            found = self._elements.find(wanted, {"_id": 0, "index": 1}, session=self._session).sort("index", 1)
            for document in found.limit(1):
                self._known.leaf = max(FIRST_PAGE, document["index"])
                return int(document["index"])
            if "$lte" not in ends:
                return None
            if last is None:
                last = int(self.state("last_index") or 0)
            low, high = high, min(MAX_INDEX, 4 * high)

    def _counted_leaf(self, through: int) -> int | None:
        """While elements are counted: of those up to `through`, whose numbers of children are right already."""
        for low, high in spans(0, through, FIRST_PAGE):
            wanted = {"asi.children": 0, "index": {"$gt": low, "$lte": high}}
            found = self._elements.find(wanted, {"_id": 0, "index": 1}, session=self._session).sort("index", 1)
            for document in found.limit(1):
                return int(document["index"])
        # Refused as not known yet, unless the counting has just ended, or this store is only read.
        if not self.counts.records:
            return None
        found = self._elements.find(OURS | {"index": {"$gt": 0}}, {"_id": 0, "index": 1}, session=self._session)
        indices = [int(document["index"]) for document in found]
        above = child_counts(self._database, None, self._session)
        return min((index for index in indices if index not in above), default=None)


def _one_of(fixed: dict[str, Any], fields: tuple[str, ...]) -> bool:
    """Whether the condition is that one of these fields has one value."""
    return len(fixed) == 1 and all(name in fields and not isinstance(value, dict) for name, value in fixed.items())


def _number(document: dict[str, Any], field: str) -> float | None:
    place, _, inner = field.rpartition(".")
    value = (document.get(place) or {}).get(inner) if place else document.get(inner)
    # Another program's score may be no number: nothing is above it.
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
