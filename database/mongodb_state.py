"""What every part of a MongoDB session shares: its collections, the small state, answers and baselines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.database import Database

from common.records import Baseline
from database.mongodb_counts import counted
from database.mongodb_documents import ELEMENTS, STATE
from database.mongodb_draft import ANSWERS, COUNTING, GATHERED, Counting, Draft, Totals
from database.mongodb_sizes import ServerSizes
from database.store import UncountedError

__all__ = ["BASELINES", "Known", "MongoState"]

BASELINES = "asi_baselines"
_RANKINGS = 1000


@dataclass
class Known:
    """What a process has seen before, of one store; shared by threads. It is where a process looks first, and makes no
    answer another one, only quick; but for `counted`, which decides whether it answers from what is kept."""

    ranks: dict[str, dict[int, float]] = field(default_factory=dict)
    """By what is ranked, then by a number of elements: a value that so many had at least."""
    leaf: int = 64
    """Up to which index the oldest element without children was found."""
    sizes: ServerSizes | None = None
    counted: bool = False
    """Whether everything was counted since this process opened the store."""
    count: Callable[[], None] | None = None
    """Lets the counting go on, where this process may write."""

    def floor(self, ranked: str, wanted: int) -> float | None:
        """A value that at least `wanted` elements had."""
        # A copy: other threads note theirs.
        known = dict(self.ranks.get(ranked, {}))
        enough = [count for count in known if count >= wanted]
        return known[min(enough)] if enough else None

    def note_floor(self, ranked: str, wanted: int, lowest: float | None) -> None:
        """That the `wanted` best had at least `lowest`; None where there are not so many."""
        if len(self.ranks) >= _RANKINGS:
            self.ranks.clear()
        if lowest is None:
            self.ranks.setdefault(ranked, {}).pop(wanted, None)
        else:
            self.ranks.setdefault(ranked, {})[wanted] = lowest


class MongoState:
    """
    Args:
        session: the transaction, where there is one.
        draft: with it, this session may write.
    """

    def __init__(
        self,
        database: Database[dict[str, Any]],
        session: ClientSession | None = None,
        draft: Draft | None = None,
        known: Known | None = None,
    ) -> None:
        self._database = database
        self._session = session
        self._draft = draft
        self._known = known or Known()

    @property
    def _elements(self) -> Collection[dict[str, Any]]:
        """To read: what was gathered is there then."""
        if self._draft is not None:
            self._draft.send()
        return self._database[ELEMENTS]

    def _changing(self, collection: str = ELEMENTS) -> Collection[dict[str, Any]]:
        """To change directly."""
        draft = self.draft
        draft.send()
        draft.changes += 1
        return self._database[collection]

    @property
    def draft(self) -> Draft:
        if self._draft is None:
            raise TypeError("a session that reads was asked to write")
        return self._draft

    @property
    def database(self) -> Database[dict[str, Any]]:
        return self._database

    @property
    def client_session(self) -> ClientSession | None:
        return self._session

    @property
    def totals(self) -> Totals:
        """Of which the numbers of events and usage are right at any time; for the others see `counts`."""
        return self._draft.totals if self._draft is not None else self._totals(self.state("totals"))

    def _totals(self, kept: dict[str, int] | None) -> Totals:
        # An earlier release, whose store is only read, kept none.
        return counted(self._database) if kept is None else Totals(**kept)

    @property
    def counts(self) -> Totals:
        """The totals.

        Raises:
            UncountedError: they are being counted.
        """
        kept, told = self.states("totals", COUNTING)
        now = self._uncounted(told)
        if now is None:
            return self._totals(kept)
        if self._known.count is None:
            # Only read: nobody may be there to go on with it.
            return counted(self._database, self._totals(kept))
        self._known.count()
        raise UncountedError(
            f"the elements are being counted, {now.through} of {self.state('last_index')} so far, and what was asked"
            " for follows from their number",
            "ask again in a few seconds; elements are found, stored and sampled meanwhile",
        )

    def counting(self) -> Counting | None:
        """How far the counting came; None where what is kept is right."""
        return self._uncounted(self.state(COUNTING))

    def _uncounted(self, told: dict[str, Any] | None) -> Counting | None:
        if told is None:
            if self._draft is None:
                # What a write sees may not be kept.
                self._known.counted = True
            return None
        now = Counting(**told)
        return now if now.doubtful or not self._known.counted else None

    # Small state

    def states(self, *names: str) -> list[Any]:
        """Several at once, in the order asked; None for each that is not there."""
        if self._draft is not None:
            texts = self._draft.state()
        else:
            found = self._database[STATE].find({"_id": {"$in": list(names)}}, session=self._session)
            texts = {row["_id"]: row["value"] for row in found}
        return [json.loads(texts[name]) if name in texts else None for name in names]

    def state(self, name: str) -> Any:
        return self.states(name)[0]

    def put_state(self, name: str, value: Any) -> None:
        if name in GATHERED:
            self.draft.gather_state(name, value)
            return
        text = json.dumps(value)
        self._changing(STATE).replace_one(
            {"_id": name}, {"_id": name, "value": text}, upsert=True, session=self._session
        )
        self.draft.state()[name] = text

    def _bump(self, counter: str) -> int:
        value = int(self.state(counter) or 0) + 1
        self.put_state(counter, value)
        return value

    def answer(self, route: str, key: str) -> dict[str, Any] | None:
        names = _names(route, key)
        found = None if self._draft is None else self._draft.answer(names[0])
        if found is None:
            wanted = names[0] if len(names) == 1 else {"$in": names}
            there = {row["_id"]: row for row in self._database[ANSWERS].find({"_id": wanted}, session=self._session)}
            told = [there[name] for name in names if name in there]
            # One without a route is of a release that had the name alone.
            found = next((row for row in told if "route" not in row or _pair_of(row) == (route, key)), None)
        return None if found is None else json.loads(found["body"])

    def put_answer(self, route: str, key: str, answer: dict[str, Any]) -> None:
        document = {"_id": _names(route, key)[0], "route": route, "key": key, "body": json.dumps(answer)}
        self.draft.put_answer(document)

    def answer_names(self) -> list[tuple[str, str]]:
        if self._draft is not None:
            self._draft.send()
        found = self._database[ANSWERS].find({}, {"route": 1, "key": 1}, session=self._session)
        # One that an earlier release kept may have been kept anew.
        return sorted({_pair_of(row) for row in found})

    def baseline(self, key: str) -> Baseline | None:
        found = self._database[BASELINES].find_one({"_id": key}, session=self._session)
        return None if found is None else Baseline.model_validate_json(found["body"])

    def put_baseline(self, baseline: Baseline) -> None:
        document = {"_id": baseline.key, "body": baseline.model_dump_json(), "revision": self.next_revision()}
        self._changing(BASELINES).replace_one({"_id": baseline.key}, document, upsert=True, session=self._session)

    def baseline_revision(self, key: str) -> int:
        found = self._database[BASELINES].find_one({"_id": key}, {"revision": 1}, session=self._session)
        return 0 if found is None else int(found.get("revision") or 0)

    def next_revision(self) -> int:
        return self._bump("revision")


def _names(route: str, key: str) -> list[str]:
    """What the answer to this route and key is called, and after it what it was called by an earlier release, where
    that may be the name of another: "import" with the key "begun k", and "import begun" with the key "k"."""
    name = f"{route} {key}"
    words = name.split(" ")
    plain = " ".join(words[:2])
    if words[0] == "import" and words[1] != "begun":
        plain = "import"
    # A name that begins with a digit tells how long the route is.
    return [name] if route == plain and not name[0].isdigit() else [f"{len(route)} {name}", name]


def _pair_of(row: dict[str, Any]) -> tuple[str, str]:
    """Route and key of an answer that is kept."""
    route = row.get("route") or _route_of(row["_id"])
    return route, row["key"] if "key" in row else row["_id"][len(route) + 1 :]


def _route_of(name: str) -> str:
    """The route in the name of an answer that an earlier release kept, which wrote it there alone: two words, but for
    "import"."""
    words = name.split(" ")
    return words[0] if words[0] == "import" else " ".join(words[:2])
