"""Elements that are counted beside the writes: what is answered meanwhile is right, what is not known refused."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pymongo
import pytest

from database import repair, tree
from database.errors import RefusedError
from database.invariants import broken
from database.ledger import Recorded
from database.mongodb_counting import step
from database.mongodb_database import MongoStore
from database.store import Facts, Session, UncountedError, Where
from tests.database.db_service import Service
from tests.database.test_mongodb_writes import entry_of, insert_below, opened

pytestmark = pytest.mark.services
Database = pymongo.database.Database[dict[str, Any]]


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Recorded], bool]]:
    """No element is counted but when this is called: the next few; whether more are left."""
    monkeypatch.setattr("database.mongodb_database._COUNTING_SECONDS", -1)
    monkeypatch.setattr("database.mongodb_counting.WIDTH", 6)
    monkeypatch.setattr(MongoStore, "_count", lambda _: False)
    yield lambda store: store.write(step) is None  # type: ignore[arg-type]


def grow(store: Recorded, rng: random.Random) -> None:
    """40 elements in random trees, of few names; a third are gone."""

    def work(session: Session) -> None:
        for number in range(40):
            parent = rng.randrange(number + 1)
            session.insert(entry_of(f"n{rng.randrange(12)}", parent or None))
        repair.remove(session, rng.sample(range(1, 41), 13))

    store.write(work)


def change(session: Session, rng: random.Random) -> None:
    """An element comes, goes or moves."""
    indices = [facts.index for facts in session.facts()]
    choice = rng.randrange(5)
    free = [index for index in range(1, max(indices) + 1) if session.is_free(index)]
    assert not set(free) & set(indices)
    if choice == 0 or (choice == 4 and free):
        # An import may take an index that was left out before.
        index = None if choice == 0 else rng.choice(free)
        session.insert(entry_of(f"n{rng.randrange(12)}", rng.choice([None, *indices])), index)
    elif choice == 1 and len(indices) > 5:
        repair.remove(session, rng.sample(indices, 2))
    else:
        # Below itself it is refused.
        with contextlib.suppress(RefusedError):
            tree.set_parent(session, rng.choice(indices), rng.choice([None, *indices]))


def falsify(database: Database, rng: random.Random) -> None:
    """As another program, or a write that was cut off, leaves what is kept."""
    totals = {"records": 3, "bytes": 5, "names": 70, "explored": 1, "events": 0, "trimmed": 0, "usage": 4}
    database["asi_state"].update_one({"_id": "totals"}, {"$set": {"value": json.dumps(totals)}})
    for index in range(1, 41):
        if rng.random() < 0.5:
            database["data_elements"].update_one({"index": index}, {"$set": {"asi.children": rng.randrange(4)}})


def answered(store: Recorded, question: Callable[[Session], Any]) -> Any:
    """The answer; None where it is not known yet."""
    try:
        return store.read(question)
    except UncountedError as error:
        assert error.retry_after and "being counted" in error.message
        return None


@pytest.mark.parametrize("transactions", [True, False], ids=["transactions", "stand-alone"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_answered_while_elements_are_counted_is_right(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool], transactions: bool, seed: int
) -> None:
    url, database = place
    rng = random.Random(seed)
    store = opened(url, transactions)
    while by_hand(store):
        pass
    grow(store, rng)
    store.close()
    falsify(database, rng)
    store = opened(url, transactions)

    def check(known: bool) -> None:
        facts: list[Facts] = store.read(lambda session: session.facts())
        counts = Counter(one.parent for one in facts if one.parent is not None)
        explored = sum(one.parent is not None for one in facts)
        total = answered(
            store, lambda session: (session.count(), session.unique_names(), session.count(Where(explored=True)))
        )
        assert total == ((len(facts), len({one.name for one in facts}), explored) if known else None)
        leaf = answered(store, lambda session: session.oldest_leaf())
        assert leaf in (() if known else (None,)) or leaf == min(i.index for i in facts if i.index not in counts)
        assert store.read(lambda session: session.child_counts()) == counts
        for limit in (1, 10, 1000):
            assert store.read(lambda session, limit=limit: session.count(limit=limit)) == min(limit, len(facts))  # type: ignore[misc]
            found = store.read(lambda session, limit=limit: session.count(Where(explored=True), limit=limit))  # type: ignore[misc]
            assert found == min(limit, explored)
        for parent in counts:
            children = sorted((one.index for one in facts if one.parent == parent), key=lambda i: (-counts[i], i))
            assert store.read(lambda session, parent=parent: session.strongest_children(parent, 2)) == children[:2]  # type: ignore[misc]

    check(known=False)
    steps = 0
    while True:
        for _ in range(rng.randrange(3)):
            store.write(partial(change, rng=rng))
        check(known=False)
        steps += 1
        if not by_hand(store):
            break
    assert steps > 3
    check(known=True)
    store.write(partial(change, rng=rng))
    check(known=True)
    assert broken(store, 50) == []
    store.close()


def test_another_start_takes_nothing_from_a_process_that_knows(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool]
) -> None:
    url, database = place
    first = opened(url, True)
    while by_hand(first):
        pass
    first.write(partial(insert_below, None))
    assert first.read(lambda session: session.count()) == 1
    second = opened(url, True)
    assert first.read(lambda session: session.count()) == 1
    assert answered(second, lambda session: session.count()) is None
    # A write that was cut off takes it from all.
    database["asi_state"].update_one({"_id": "lease"}, {"$set": {"broken": True}})
    second.write(partial(insert_below, 1))
    assert answered(first, lambda session: session.count()) is None
    while by_hand(first):
        pass
    assert [one.read(lambda session: session.count()) for one in (first, second)] == [2, 2]
    second.write(lambda session: session.clear())
    assert first.read(lambda session: (session.count(), session.oldest_leaf())) == (0, None)
    first.close()
    second.close()


def test_requests_are_answered_while_elements_are_counted(
    place: tuple[str, Database], start: Callable[..., Service]
) -> None:
    url, database = place
    service = start(store=url)
    for parent in (None, 1, 1):
        service.add("x", parent)
    assert service.get("/stats")["total_records"] == 3
    now = {"doubtful": True, "first": False, "width": 1, "through": 0, "records": 0, "bytes": 0, "explored": 0,
           "names": 0, "corrected": 0, "roots": 0}  # fmt: skip

    def count_anew() -> None:
        database["asi_state"].replace_one({"_id": "counting"}, {"value": json.dumps(now)}, upsert=True)

    for path in ("/stats", "/v2/stats", "/health", "/metrics", "/elements/context/1"):
        count_anew()
        answer = service.http.get(path)
        if "stats" in path:
            told = answer.json()
            assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
            assert told["success"] is False and "being counted" in told["detail"] and "fix:" in told["detail"]
        elif path == "/health":
            assert answer.json()["database"] == {"connected": True, "total_records": None}
        elif path == "/metrics":
            assert "asi_database_elements NaN" in answer.text
        else:
            assert [one["index"] for one in answer.json()["data"]["strongest_siblings"]] == [2, 3]
    count_anew()
    # Our client comes again when it is told to.
    assert service.client.stats()["total_records"] == 3
    assert service.stop() == 0
