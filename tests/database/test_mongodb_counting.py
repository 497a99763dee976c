"""Elements that are counted beside the writes: what is answered meanwhile is right, what is not known refused."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import pymongo
import pytest

from common.knobs import Database as DatabaseSettings
from database import repair, tree
from database.candidate_manager import Candidates
from database.errors import RefusedError
from database.invariants import broken
from database.ledger import Recorded
from database.mongodb_counting import step
from database.mongodb_counts import Range, count_range
from database.mongodb_database import MongoStore
from database.mongodb_documents import document_of
from database.mongodb_draft import Draft
from database.scores import Scores
from database.store import MAX_INDEX, Facts, Session, UncountedError, Where
from tests.database.db_service import Service
from tests.database.test_mongodb_writes import entry_of, insert_below, opened

pytestmark = pytest.mark.services
COUNT = MongoStore._count
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


@pytest.mark.parametrize("transactions", [True, False], ids=["transactions", "stand-alone"])
def test_another_start_takes_nothing_from_a_process_that_knows(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool], transactions: bool
) -> None:
    url, database = place
    first = opened(url, transactions)
    while by_hand(first):
        pass
    first.write(partial(insert_below, None))
    assert first.read(lambda session: session.count()) == 1
    second = opened(url, transactions)
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


@pytest.mark.parametrize("transactions", [True, False], ids=["transactions", "stand-alone"])
def test_starts_that_follow_each_other_let_a_count_end(
    place: tuple[str, Database],
    by_hand: Callable[[Recorded], bool],
    transactions: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, database = place
    store = opened(url, transactions)
    for _ in range(20):
        store.write(partial(insert_below, None))
    steps = 0
    while by_hand(store):
        store.close()
        store = opened(url, transactions)
        steps += 1
        assert steps < 10
    assert store.read(lambda session: session.count()) == 20
    store.close()
    # What another program changed behind a count that went on is found by one more.
    store = opened(url, transactions)
    assert by_hand(store)
    store.close()
    database["data_elements"].delete_one({"index": 2})
    monkeypatch.setattr(MongoStore, "_count", COUNT)
    store = opened(url, transactions)
    until = time.monotonic() + 30
    while answered(store, lambda session: session.count()) != 19 and time.monotonic() < until:
        time.sleep(0.05)
    assert store.read(lambda session: session.count()) == 19
    store.close()


def test_what_an_earlier_release_writes_has_elements_counted_again(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = place
    store = opened(url, True)
    for _ in range(20):
        store.write(partial(insert_below, None))
    assert by_hand(store) and by_hand(store)

    def add_totals(draft: Draft, **more: int) -> None:
        before = asdict(draft.totals)
        draft.gather_state("totals", before | {name: before[name] + number for name, number in more.items()})

    with monkeypatch.context() as earlier:
        earlier.setattr(Draft, "add_totals", add_totals)
        earlier.setattr(Draft, "counted_through", lambda _: 0)
        store.write(lambda session: repair.remove(session, [1, 2, 3]))
    # A write of this release hides nothing of it.
    store.write(partial(insert_below, None))
    while by_hand(store):
        pass
    assert store.read(lambda session: (session.count(), session.unique_names(), len(session.facts()))) == (18, 1, 18)
    assert store.read(lambda session: session.check()) == []
    store.close()


def test_names_of_another_program_are_counted_as_they_are_read(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool]
) -> None:
    url, database = place
    names = [{}, {"name": None}, {"name": ""}, {"name": 7}, {"name": "7"}, {"name": 7.5}, {"name": "x"}]
    result = {"train": "", "test": ""}
    for index in range(1, 29):
        other = {"index": index, "time": "t", "result": result, "program": "p", "motivation": "m"}
        database["data_elements"].insert_one(other | names[index % len(names)])
    store = opened(url, True)
    assert by_hand(store)
    store.write(lambda session: session.insert(entry_of("7")))

    def counted() -> tuple[int, int]:
        facts = store.read(lambda session: session.facts())
        return store.read(lambda session: session.unique_names()), len({one.name for one in facts})

    while by_hand(store):
        pass
    assert counted() == (4, 4)
    # Those of one name go one after the other, so that the name is there until the last has gone.
    for index in range(1, 30):
        store.write(lambda session, index=index: repair.remove(session, [index]))  # type: ignore[misc]
        assert len(set(counted())) == 1
    assert store.read(lambda session: session.check()) == []
    store.close()


def test_a_document_of_another_program_is_no_child(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool]
) -> None:
    url, database = place
    store = opened(url, False)
    store.write(partial(insert_below, None))
    database["data_elements"].insert_one({"index": 2, "parent": 1, "name": "theirs"})
    assert store.read(lambda session: session.child_counts()) == {}
    while by_hand(store):
        pass
    assert store.read(lambda session: (session.child_counts(), session.oldest_leaf())) == ({}, 1)
    store.close()


def test_a_store_that_is_only_read_answers_while_elements_are_counted(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool]
) -> None:
    url, _ = place
    store = opened(url, True)
    for parent in (None, 1, 1, 2, 3, 4, 5, 6):
        store.write(partial(insert_below, parent))
    assert by_hand(store)
    store.close()
    reader = MongoStore(url, 10, read_only=True)
    assert reader.read(lambda session: session.count()) == 8
    # Of those that were counted each has children.
    assert reader.read(lambda session: session.oldest_leaf()) == 7
    reader.close()


@pytest.mark.parametrize("transactions", [True, False], ids=["transactions", "stand-alone"])
def test_the_few_that_are_left_are_sampled_and_removed_while_they_are_counted(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool], transactions: bool
) -> None:
    url, _ = place
    store = opened(url, transactions)

    def sparse(session: Session) -> None:
        for after in (5000, 10_000, 15_000):
            session.insert(entry_of("x"))
            session.ledger.reserve(after)

    store.write(sparse)
    there = {facts.index for facts in store.read(lambda session: session.facts())}
    drawn = [store.read(lambda session: session.sample()) for _ in range(40)]
    assert set(drawn) <= there and len(set(drawn)) > 1
    assert answered(store, lambda session: session.count()) is None

    def remove_all(session: Session) -> int:
        count = session.count(limit=MAX_INDEX)
        session.clear()
        return count

    assert store.write(remove_all) == 3
    assert store.read(lambda session: (session.count(limit=MAX_INDEX), session.facts())) == (0, [])
    store.close()


def test_what_was_counted_is_not_counted_again_for_a_question(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool]
) -> None:
    url, database = place
    store = opened(url, True)
    for parent in (None, 1, *[None] * 30):
        store.write(partial(insert_below, parent))
    assert by_hand(store)
    # Seen by this: what is said to have been counted is not looked for.
    told = json.loads(database["asi_state"].find_one({"_id": "counting"})["value"])  # type: ignore[index]
    assert (told["records"], told["explored"]) == (6, 1)
    value = json.dumps(told | {"records": 106, "explored": 101})
    database["asi_state"].update_one({"_id": "counting"}, {"$set": {"value": value}})
    explored = Where(explored=True)
    assert store.read(lambda session: (session.count(limit=1000), session.count(explored, 1000))) == (132, 101)
    store.close()


def test_an_end_of_counting_that_was_not_kept_is_none(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool]
) -> None:
    url, database = place
    store = opened(url, True)
    while by_hand(store):
        pass
    store.write(partial(insert_below, None))
    store.close()
    database["data_elements"].delete_one({"index": 1})
    store = opened(url, True)

    def undone(session: Session) -> None:
        assert step(session) is not None  # type: ignore[arg-type]
        assert session.count() == 0
        raise RefusedError("not kept")

    with pytest.raises(RefusedError):
        store.write(undone)
    assert answered(store, lambda session: session.count()) is None
    store.close()


def test_repair_is_refused_while_elements_are_counted_and_leaves_the_counting_as_it_is(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, database = place
    store = opened(url, False)
    scores = Scores()
    candidates = Candidates(DatabaseSettings(store=url), scores)
    store.write(scores.begin)
    for _ in range(20):
        store.write(partial(insert_below, None))
    assert by_hand(store)
    before = database["asi_state"].find_one({"_id": "counting"})
    with pytest.raises(UncountedError):
        repair.repair(store, scores, candidates)
    # Counting may begin after the first look at it, too.
    with monkeypatch.context() as patched, pytest.raises(UncountedError):
        patched.setattr(MongoStore, "read", lambda _, __: (0, []))
        repair.repair(store, scores, candidates)
    store.write(lambda _: None)
    assert database["asi_state"].find_one({"_id": "counting"}) == before
    while by_hand(store):
        pass
    assert repair.repair(store, scores, candidates)["elements"] == 20
    store.close()


def test_indices_that_are_missing_make_no_range_wide(
    place: tuple[str, Database], by_hand: Callable[[Recorded], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, database = place
    store = opened(url, True)
    store.write(partial(insert_below, None))
    store.close()
    far = 10**12
    for first, last in ((50, 90), (far, far + 40)):
        database["data_elements"].insert_many([document_of(entry_of("x", 1), i) for i in range(first, last)])
    # To be counted in few steps, but each of few elements.
    monkeypatch.setattr("database.mongodb_counts.WIDTH", 6)
    read = []
    real = count_range

    def noted(*args: Any) -> Range:
        found = real(*args)
        read.append(found.records)
        return found

    monkeypatch.setattr("database.mongodb_counting.count_range", noted)
    store = opened(url, True)
    while by_hand(store):
        pass
    assert max(read) <= 6 and len(read) < 30, read
    assert store.read(lambda session: (session.count(), session.child_counts())) == (81, {1: 80})
    assert store.read(lambda session: session.check()) == []
    store.close()


def test_requests_are_answered_while_elements_are_counted(
    place: tuple[str, Database], start: Callable[..., Service]
) -> None:
    url, database = place
    service = start(store=url)
    for parent in (None, 1, 1):
        service.add("x", parent)
    assert service.get("/stats")["total_records"] == 3
    now = {"doubtful": True, "first": False, "seen": {}, "through": 0, "records": 0, "bytes": 0, "explored": 0,
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
    count_anew()
    assert service.delete("/elements/all")["data"] == {"deleted_count": 3}
    assert service.client.stats()["total_records"] == 0
    assert service.stop() == 0
