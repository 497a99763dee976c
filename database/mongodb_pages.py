"""The part of a MongoDB session that answers with the first few in an order: by index, newest, by benchmark mean.

Each page is asked for with both its ends. MongoDB stops at the limit of a query by itself; not every server that speaks
its protocol does.
"""

from __future__ import annotations

from typing import Any

from database.mongodb_documents import ORDERS
from database.mongodb_state import MongoState
from database.store import MAX_INDEX, Order

__all__ = ["FIRST_PAGE", "MongoPages"]

FIRST_PAGE = 64
_LARGEST = 4096
"""Documents of a page that is asked for so."""


class MongoPages(MongoState):
    def _page(
        self, order: Order, after: int, limit: int | None, offset: int, shown: dict[str, Any]
    ) -> list[dict[str, Any]] | None:
        """The documents at `offset` and after it in this order, of those with an index above `after`; None where that
        is no page: of too many, or in another order."""
        if limit is None or offset + limit > _LARGEST:
            return None
        if order == "index":
            return self._ascending(after, offset + limit, shown)[offset:]
        if order == "newest":
            return self._newest(after, offset + limit, shown)[offset:]
        if order == "benchmark" and not after:
            return self._best(offset + limit, shown)[offset:]
        return None

    def _ascending(self, after: int, wanted: int, shown: dict[str, Any]) -> list[dict[str, Any]]:
        """The first `wanted` documents above `after`, by index."""
        found: list[dict[str, Any]] = []
        last: int | None = None
        low, width = min(after, MAX_INDEX), wanted
        while True:
            ends = {"$gt": low, "$lte": min(MAX_INDEX, low + width)}
            if last is not None and low >= last:
                # The counter may be behind what another program stored.
                ends = {"$gt": low}
            page = self._elements.find({"index": ends}, shown, session=self._session).sort("index", 1)
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

    def _best(self, wanted: int, shown: dict[str, Any]) -> list[dict[str, Any]]:
        """The first `wanted` documents by benchmark mean. What the last of them had the time before is a lower end, for
        as long as that many are above it."""
        floor = self._known.floor(wanted)
        conditions: list[dict[str, Any]] = [] if floor is None else [{"asi.benchmark": {"$gte": floor}}]
        found: list[dict[str, Any]] = []
        for condition in [*conditions, {}]:
            cursor = self._elements.find(condition, shown, session=self._session).sort(ORDERS["benchmark"])
            found = list(cursor.limit(wanted))
            if len(found) == wanted:
                break
        lowest = found[-1].get("asi", {}).get("benchmark") if len(found) == wanted else None
        self._known.note_floor(wanted, lowest)
        return found
