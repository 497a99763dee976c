"""Writes to MongoDB: groups of which each write is kept or refused alone, kills at any point, counts that stay right;
with transactions and, as on a stand-alone server, without."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import pymongo
import pytest
from pymongo import monitoring

from common.errors import StoreError
from common.knobs import Database as DatabaseSettings
from common.process import REPOSITORY
from common.records import Usage
from database import repair, tree
from database.candidate_manager import Candidates
from database.errors import NotFoundError, RefusedError
from database.evaluate_agent.score import evidence_of
from database.invariants import broken
from database.ledger import Recorded
from database.models import NewElement
from database.mongodb_database import MongoStore
from database.scores import Scores
from database.store import NewEntry, Order, Session, Where
from tests.database.db_service import body_of

pytestmark = pytest.mark.services
SHORT_LEASE = 1.0
WRITER = f"""
import random, sys, threading
import database.mongodb_database, database.mongodb_lease
database.mongodb_lease.LEASE_SECONDS = database.mongodb_database.LEASE_SECONDS = {SHORT_LEASE}
from tests.database.test_mongodb_writes import opened, insert, insert_and_delete
store = opened(sys.argv[1], sys.argv[2] == "True")
lock = threading.Lock()
def run(worker):
    rng = random.Random(worker)
    for number in range(100_000):
        work = insert_and_delete if number % 5 == 4 else insert
        name = f"n{{worker}}_{{number}}"
        index = store.write(lambda session: work(session, name, rng))
        with lock:
            print(index, name, flush=True)
for worker in range(6):
    threading.Thread(target=run, args=(worker,), daemon=True).start()
print("started", flush=True)
threading.Event().wait()
"""


@pytest.fixture
def url(server: str) -> str:
    return f"{server}/test_{uuid.uuid4().hex}"


@pytest.fixture(params=[True, False], ids=["transactions", "stand-alone"])
def transactions(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def opened(url: str, transactions: bool) -> Recorded:
    return Recorded(MongoStore(url, 30, transactions=transactions), 1000)


def entry_of(name: str, parent: int | None = None, key: str | None = None) -> NewEntry:
    element = NewElement.model_validate(body_of(name, parent))
    evidence = evidence_of(element.result.train, element.result.test, None)
    return NewEntry(element, evidence, complete=True, key=key)


def insert(session: Session, name: str, rng: random.Random) -> int:
    """A new element, below one that is there."""
    parent = session.sample()
    return session.insert(entry_of(name, parent if rng.random() < 0.8 else None))


def insert_below(parent: int | None, session: Session) -> int:
    return session.insert(entry_of("x", parent))


def insert_and_delete(session: Session, name: str, rng: random.Random) -> int:
    """A new element; another one goes, of those whose name says so."""
    gone = session.facts(Where(name="goes"), limit=1)
    repair.remove(session, [facts.index for facts in gone])
    session.insert(entry_of("goes", session.sample()))
    return insert(session, name, rng)


def unfit(session: Session) -> int:
    """No text of MongoDB: what the driver makes of the whole group fails."""
    entry = entry_of("unfit")
    return session.insert(replace(entry, element=entry.element.model_copy(update={"log": "\ud800"})))


def together(store: Recorded, works: Sequence[Any]) -> list[Future[Any]]:
    """Submits writes so that they wait at the same time."""
    inside, go = threading.Event(), threading.Event()

    def hold(_: Session) -> None:
        inside.set()
        assert go.wait(30)

    first = store.submit(hold)
    assert inside.wait(30)
    futures = [store.submit(work) for work in works]
    go.set()
    first.result(30)
    return futures


def test_each_write_of_a_group_is_kept_or_refused_alone(url: str, transactions: bool) -> None:
    store = opened(url, transactions)

    def add(name: str, parent: int | None = None) -> Any:
        return lambda session: session.insert(entry_of(name, parent))

    def refused(session: Session) -> None:
        session.insert(entry_of("refused"))
        raise RefusedError("not this one")

    def keyed(session: Session) -> int:
        known = session.find_key("k")
        return session.insert(entry_of("keyed", key="k")) if known is None else known.index

    def absent(session: Session) -> None:
        tree.facts_of(session, 99)

    sound = [add("a"), refused, add("b", 1), keyed, keyed, absent, add("c", 2)]
    for works, last in ((sound, 4), ([add("d", 1), unfit, add("e", 4)], 6)):
        futures = together(store, works)
        for work, future in zip(works, futures, strict=True):
            wrong = {refused: RefusedError, absent: NotFoundError, unfit: UnicodeError}.get(work)
            if wrong is None:
                assert future.exception(60) is None
            else:
                assert isinstance(future.exception(60), wrong), future.exception(60)
        indices = [future.result() for work, future in zip(works, futures, strict=True) if not future.exception()]
        assert indices == ([1, 2, 3, 3, 4] if last == 4 else [5, 6])
    assert [facts.name for facts in store.read(lambda session: session.facts())] == ["a", "b", "keyed", "c", "d", "e"]
    assert store.read(lambda session: (session.count(), session.unique_names())) == (6, 6)
    assert store.read(lambda session: session.child_counts()) == {1: 2, 2: 1, 4: 1}
    added = [event.index for event in store.read(lambda session: session.ledger.events(0, 100))]
    assert added == [1, 2, 3, 4, 5, 6]
    assert broken(store, 50) == []
    store.close()


def test_a_group_shares_its_requests(url: str, transactions: bool) -> None:
    names: list[str] = []

    class Heard(monitoring.CommandListener):
        def started(self, event: monitoring.CommandStartedEvent) -> None:
            names.append(event.command_name)

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

        def failed(self, event: monitoring.CommandFailedEvent) -> None: ...

    before = list(monitoring._LISTENERS.command_listeners)
    monitoring.register(Heard())
    try:
        store = opened(url, transactions)
    finally:
        monitoring._LISTENERS.command_listeners[:] = before

    def count(number: int) -> int:
        futures = together(store, [lambda session: session.insert(entry_of("x", None)) for _ in range(number)])
        for future in futures:
            future.result(60)
        store.read(lambda session: session.count())
        found = len(names)
        names.clear()
        return found

    count(1)
    assert count(20) <= count(1) + 2, "their number does not grow with the writes"
    store.close()


def test_a_write_waits_for_the_journal(url: str, transactions: bool) -> None:
    """As it is asked of the server: a server that is killed cannot show it, as the system's memory outlives it."""
    sent: list[tuple[str, dict[str, Any]]] = []

    class Heard(monitoring.CommandListener):
        def started(self, event: monitoring.CommandStartedEvent) -> None:
            command = dict(event.command)
            target = str(command.get(event.command_name, ""))
            if event.command_name in ("insert", "update", "delete", "findAndModify", "commitTransaction", "bulkWrite"):
                lease = "lease" in str(command.get("updates", command.get("query", "")))
                if (not lease and "txnNumber" not in command) or event.command_name == "commitTransaction":
                    sent.append((f"{event.command_name} {target}", command.get("writeConcern", {})))

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

        def failed(self, event: monitoring.CommandFailedEvent) -> None: ...

    before = list(monitoring._LISTENERS.command_listeners)
    monitoring.register(Heard())
    try:
        store = opened(url, transactions)
    finally:
        monitoring._LISTENERS.command_listeners[:] = before
    sent.clear()
    store.write(lambda session: session.insert(entry_of("a")))
    store.close()
    assert sent and {concern.get("j") for _, concern in sent} == {True}, sent
    assert not transactions or [concern for name, concern in sent if "commit" in name] == [{"w": "majority", "j": True}]


def test_a_write_that_fails_in_its_middle_leaves_nothing_wrong(url: str, transactions: bool) -> None:
    store = opened(url, transactions)
    for parent in (None, 1, 1, 2):
        store.write(partial(insert_below, parent))

    def fails(session: Session) -> None:
        session.insert(entry_of("y", 2))
        repair.remove(session, [2])
        raise RefusedError("too late")

    with pytest.raises(RefusedError):
        store.write(fails)
    store.write(lambda session: session.put_state("x", 1))
    stored = store.read(lambda session: session.count())
    assert stored == 4, "one came and one went, or none"
    assert bool(store.read(lambda session: session.facts(Where(index=2)))) == transactions
    assert broken(store, 50) == []
    store.close()


def test_counts_follow_every_change(url: str, transactions: bool) -> None:
    store = opened(url, transactions)
    rng = random.Random(3)

    def step(session: Session) -> None:
        indices = [facts.index for facts in session.facts()]
        choice = rng.randrange(6)
        if choice < 3 or len(indices) < 4:
            session.insert(entry_of(f"n{rng.randrange(6)}", rng.choice([None, *indices])))
        elif choice == 3:
            repair.remove(session, rng.sample(indices, 2))
        elif choice == 4:
            parent = rng.choice([None, *indices])
            # Below itself it is refused.
            with contextlib.suppress(RefusedError):
                tree.set_parent(session, rng.choice(indices), parent)
        elif rng.random() < 0.1:
            session.clear()

    for _ in range(60):
        store.write(step)
        facts = store.read(lambda session: session.facts())
        counts: dict[int, int] = {}
        for one in facts:
            if one.parent is not None:
                counts[one.parent] = counts.get(one.parent, 0) + 1

        def ask(session: Session) -> tuple[Any, ...]:
            explored = session.count(Where(explored=True), limit=1000)
            return session.count(), session.unique_names(), explored, session.child_counts(), session.oldest_leaf()

        expected = (len(facts), len({one.name for one in facts}), sum(one.parent is not None for one in facts), counts)
        leaf = min((one.index for one in facts if one.index not in counts), default=None)
        assert store.read(ask) == (*expected, leaf)
    assert broken(store, 50) == []
    store.close()


ORDERS: list[Order] = ["index", "newest", "benchmark"]


def ranked(store: Recorded, order: Order, limit: int | None = None, offset: int = 0) -> list[int]:
    return store.read(lambda session: session.ranked(order, limit, offset))


def listed(store: Recorded, where: Where, order: Order, limit: int | None) -> list[int]:
    return [facts.index for facts in store.read(lambda session: session.facts(where, order, limit))]


def delete(indices: list[int], session: Session) -> None:
    session.delete(indices)


@pytest.mark.parametrize("sample", [400, 20], ids=["few", "many for a sample"])
def test_the_first_in_every_order_are_those_of_the_whole_order(
    url: str, sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("database.mongodb_pages._SAMPLE", sample)
    store = opened(url, True)
    rng = random.Random(5)

    def fill(session: Session) -> None:
        for _ in range(150):
            cell = rng.choice(["0.1", "0.2", "0.35", "nan", f"{rng.random():.3f}"])
            element = NewElement.model_validate(body_of("x", result={"train": "s,1\nx,4", "test": f"m,a\nx,{cell}"}))
            session.insert(NewEntry(element, evidence_of(element.result.train, element.result.test, None), True))

    for _ in range(3):
        store.write(fill)
        # Gaps, at the end too, and the best ones go.
        gone = {*ranked(store, "benchmark", 5), *ranked(store, "newest", 70)[:66], *range(20, 90)}
        store.write(partial(delete, sorted(gone)))
        for _ in range(2):
            for order in ORDERS:
                whole = ranked(store, order)
                assert len(whole) == store.read(lambda session: session.count())
                for limit, offset in ((1, 0), (10, 0), (5, 40), (300, 0), (3, 1000)):
                    part = ranked(store, order, limit, offset)
                    assert part == whole[offset : offset + limit], (order, limit, offset)
            after = store.read(lambda session: [facts.index for facts in session.facts(Where(after=15), limit=100)])
            assert after == [index for index in ranked(store, "index") if index > 15][:100]
            for where, order in ((Where(published=True), "index"), (Where(pending=True, after=100), "index"),
                                 (Where(unscored=True), "index"), (Where(published=True), "score")):  # fmt: skip
                whole = listed(store, where, order, None)
                for limit in (1, 7, 90):
                    assert listed(store, where, order, limit) == whole[:limit], (where, order, limit)
    store.close()


def test_a_rank_deeper_than_any_is_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(url, True)
    for parent in (None, 1, 1):
        store.write(partial(insert_below, parent))
    for offset in (3, 20_000, 2**31, 2**62, 2**63 - 3, 10**19):
        assert store.read(lambda session, offset=offset: session.ranked("benchmark", 6, offset)) == []  # type: ignore[misc]
    assert store.read(lambda session: session.ranked("benchmark", 30_000)) == [1, 2, 3]
    # Those before it do not come here, to be thrown away.
    monkeypatch.setattr("database.mongodb_pages._DEEPEST", 2)
    assert store.read(lambda session: session.ranked("benchmark", 1, 2)) == [3]
    store.close()


def test_the_best_are_found_where_others_are_no_number(place: tuple[str, Any]) -> None:
    url, database = place
    store = opened(url, True)
    for _ in range(5):
        store.write(partial(insert_below, None))
    for index, value in enumerate((0.5, float("nan"), float("nan"), 0.7, float("nan")), 1):
        database["data_elements"].update_one({"index": index}, {"$set": {"asi.benchmark": value}})
    for _ in range(2):
        # What the last of them had the time before is no lower end.
        assert ranked(store, "benchmark", 3) == [4, 1, 2]
    store.close()


def test_a_number_beyond_the_counter_is_not_given_again(url: str) -> None:
    store = opened(url, False)
    store.write(lambda session: session.insert(entry_of("x")))
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(url)
    # As if cut off before the counter was sent.
    client.get_default_database()["asi_state"].update_one({"_id": "last_index"}, {"$set": {"value": "0"}})
    client.close()
    assert store.write(lambda session: session.insert(entry_of("y"))) == 2
    assert store.read(lambda session: session.ranked("newest", limit=1)) == [2]
    store.close()


def test_counts_that_do_not_agree_are_told_and_put_right_at_the_next_start(url: str, transactions: bool) -> None:
    store = opened(url, transactions)
    for parent in (None, 1, 1, 2):
        store.write(partial(insert_below, parent))
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(url)
    database = client.get_default_database()
    # Another program took one away, and an earlier release kept no number of children.
    database["data_elements"].delete_one({"index": 3})
    database["data_elements"].update_one({"index": 2}, {"$unset": {"asi.children": ""}})
    client.close()
    told = store.read(lambda session: session.check())
    assert [line.partition(":")[0] for line in told] == ["totals", "children", "children"], told
    store.close()
    store = opened(url, transactions)
    assert broken(store, 50) == []
    assert store.read(lambda session: (session.count(), session.child_counts())) == (3, {1: 1, 2: 1})
    store.close()
    reading = MongoStore(url, read_only=True)
    assert reading.read(lambda session: session.count()) == 3
    with pytest.raises(StoreError, match="read only"):
        reading.write(lambda session: session.put_state("x", 1))
    reading.close()


@pytest.mark.timeout(600)
def test_kills_at_any_point_lose_nothing_and_the_counts_are_right_after(
    url: str, transactions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("database.mongodb_lease.LEASE_SECONDS", SHORT_LEASE)
    acknowledged: dict[int, str] = {}
    rng = random.Random(11)
    store = opened(url, transactions)
    for again in (True, False, True, False, False, True):
        argv = [sys.executable, "-c", WRITER, url, str(transactions)]
        writer = subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        assert writer.stdout is not None
        assert writer.stdout.readline() == "started\n"
        time.sleep(0.3 + rng.random())
        writer.kill()
        for line in writer.stdout:
            if line.endswith("\n"):
                index, name = line.split()
                acknowledged[int(index)] = name
        writer.wait()
        writer.stdout.close()
        if again:
            store.close()
            store = opened(url, transactions)
        else:
            # Another server that was there all the time.
            store.write(lambda session: session.put_state("x", 1))
        assert broken(store, 50) == []
        stored = {facts.index: facts.name for facts in store.read(lambda session: session.facts())}
        assert acknowledged.items() <= stored.items()
        first, last = store.read(lambda session: session.ledger.event_span())
        events = store.read(lambda session: session.ledger.events(0, 10_000))
        assert [event.id for event in events] == list(range(first, last + 1))
    store.close()
    assert len(acknowledged) >= 20, json.dumps(acknowledged)


def test_what_was_sent_of_a_group_that_failed_is_there_once(url: str) -> None:
    store = opened(url, False)
    store.write(partial(insert_below, None))
    usage = Usage(role="planner", model="m", calls=1)

    def used(session: Session) -> int:
        session.ledger.put_usage([usage])
        return session.insert(entry_of("used", 1))

    def answered(session: Session) -> None:
        # It is sent last, and no text of MongoDB.
        session.put_answer("POST /x", "\ud800", {})

    futures = together(store, [used, answered, partial(insert_below, 1)])
    assert isinstance(futures[1].exception(30), UnicodeError)
    assert [futures[0].result(30), futures[2].result(30)] == [2, 3]
    assert [number for number, _ in store.read(lambda session: session.ledger.usage(0, 10))] == [1]
    events = store.read(lambda session: session.ledger.events(0, 100))
    assert [(event.kind, event.index) for event in events] == [("added", 1), ("added", 2), ("added", 3)]
    assert broken(store, 50) == []
    store.close()


def test_a_write_that_changed_something_directly_fails_alone_with_the_one_that_is_unfit(url: str) -> None:
    store = opened(url, False)
    store.write(partial(insert_below, None))

    def direct(session: Session) -> None:
        session.put_state("x", 1)

    futures = together(store, [partial(insert_below, 1), direct, partial(insert_below, 1), unfit])
    errors = [future.exception(30) for future in futures]
    assert errors[0] is None and errors[2] is None
    assert isinstance(errors[1], UnicodeError) and isinstance(errors[3], UnicodeError)
    assert store.read(lambda session: session.count()) == 3
    assert broken(store, 50) == []
    store.close()


def test_a_candidate_that_is_refused_changed_nothing(url: str) -> None:
    store = opened(url, False)
    scores = Scores()
    store.write(scores.begin)
    settings = DatabaseSettings(store=url, candidate_capacity=1)
    candidates = Candidates(settings, scores)
    for parent in (None, 1):
        store.write(partial(insert_below, parent))
    store.write(lambda session: candidates.add(session, 1))
    before = store.read(lambda session: session.vector_state().epoch)
    with pytest.raises(RefusedError, match="not above its lowest"):
        store.write(lambda session: candidates.add(session, 2))
    store.write(lambda session: session.put_state("x", 1))
    # Mending, after a write that was refused in its middle, makes whoever holds the vectors look again.
    assert store.read(lambda session: session.vector_state().epoch) == before
    store.close()


def test_a_mark_of_a_stand_alone_server_is_mended_where_there_are_transactions(url: str) -> None:
    store = opened(url, False)
    store.write(partial(insert_below, None))
    store.write(lambda session: session.put_candidates([1]))
    store.close()
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(url)
    database = client.get_default_database()

    def cut_off(**lease: Any) -> None:
        """As after a removal that was cut off, without a transaction around it."""
        database["asi_state"].update_one({"_id": "candidates"}, {"$set": {"value": "[1, 99]"}})
        database["asi_state"].update_one({"_id": "lease"}, {"$set": lease})

    cut_off(broken=True)
    store = opened(url, True)
    assert store.read(lambda session: session.state("candidates")) == [1], "at the start"
    cut_off(broken=True)
    store.write(lambda session: session.put_state("x", 1))
    assert store.read(lambda session: session.state("candidates")) == [1], "at the next write"
    cut_off(owner="killed", session=None, until=time.time() - 60)
    store.write(lambda session: session.put_state("x", 1))
    assert store.read(lambda session: session.state("candidates")) == [1], "a holder that had no transactions"
    store.close()
    client.close()


def test_the_oldest_leaf_is_found_at_the_highest_indices(url: str) -> None:
    store = opened(url, True)
    high = 2**62
    store.write(lambda session: session.ledger.reserve(high))
    assert store.write(partial(insert_below, None)) == high
    assert store.read(lambda session: session.oldest_leaf()) == high
    assert store.write(partial(insert_below, high)) == high + 1
    assert store.read(lambda session: session.oldest_leaf()) == high + 1
    assert store.read(lambda session: session.ranked("benchmark", limit=1)) == [high]
    store.close()
    store = opened(url, True)
    assert store.read(lambda session: session.count()) == 2 and broken(store, 50) == []
    store.close()
