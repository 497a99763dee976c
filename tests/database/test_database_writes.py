"""Writes that share a commit: each is kept or refused alone, on disk before it is answered, whatever ends it all."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.errors import StoreError
from common.knobs import Database as DatabaseSettings
from database import keys
from database.errors import ConflictError
from database.evaluate_agent.score import evidence_of
from database.invariants import broken
from database.models import NewElement, PostedElement
from database.sqlite_database import SqliteStore
from database.sqlite_schema import MIGRATIONS
from database.store import NewEntry, Session, Where, open_store
from tests.database.candidate_model import CandidateModel, Design
from tests.database.db_service import (
    BASELINE,
    RETRY_SECONDS,
    EmbeddingDouble,
    Service,
    body_of,
    element_of,
    run_of,
)


def entry_of(name: str, parent: int | None = None) -> NewEntry:
    element = NewElement.model_validate(body_of(name, parent))
    return NewEntry(element, evidence_of(element.result.train, element.result.test, None), complete=True)


def test_a_request_is_the_same_though_an_earlier_release_kept_its_time_as_it_came(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "a.sqlite"))
    body = body_of("x", time="2025-07-01T14:00:00+02:00")
    before = NewElement.model_validate(body)
    entry = replace(entry_of("x"), element=before, key="elements:k")

    def first(session: Session) -> None:
        session.insert(entry)
        keys.keep_body(session, "elements:k", "the hash of then")

    store.write(first)
    again = PostedElement.model_validate(body).stored()
    assert again.time == "2025-07-01 12:00:00" != before.time

    def answer(wanted: NewElement) -> Callable[[Session], Any]:
        return lambda session: keys.first_answer(session, "elements:k", wanted, "the hash of now")

    assert store.read(answer(again)).index == 1
    for change in ({"log": "another"}, {"time": "2025-07-01 14:00:00"}, {"parent": 1}):
        with pytest.raises(ConflictError, match="another body"):
            store.read(answer(again.model_copy(update=change)))
    store.close()


def commits(file: Path) -> list[str]:
    """Names of the stored elements, read by another connection."""
    with sqlite3.connect(file) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM elements ORDER BY idx")]


def test_writes_that_wait_together_share_one_commit_and_fail_alone(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "a.sqlite"))
    began, go = threading.Event(), threading.Event()

    def hold(session: Session) -> int:
        began.set()
        assert go.wait(10)
        return session.insert(entry_of("first"))

    def broken(session: Session) -> int:
        session.insert(entry_of("broken"))
        raise ValueError("told to fail")

    first = store.submit(hold)
    assert began.wait(10)
    # They queue up behind the first; none is answered, and none is seen, before the commit that holds it.
    rest = [store.submit(lambda session, n=n: session.insert(entry_of(f"n{n}"))) for n in range(3)]
    failing = store.submit(broken)
    last = store.submit(lambda session: session.insert(entry_of("last", 2)))
    assert not first.done() and commits(tmp_path / "a.sqlite") == []
    go.set()
    assert [first.result(10), *(future.result(10) for future in rest), last.result(10)] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="told to fail"):
        failing.result(10)
    assert commits(tmp_path / "a.sqlite") == ["first", "n0", "n1", "n2", "last"]
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.write(lambda session: session.count())


def test_a_write_waits_for_the_disk(tmp_path: Path) -> None:
    """A kill cannot show it, since what was written stays in the system's memory: SQLite says what a commit waits
    for."""
    store = SqliteStore(str(tmp_path / "a.sqlite"))

    def asked(session: Session) -> list[Any]:
        names = ("journal_mode", "synchronous")
        return [session._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]  # type: ignore[attr-defined]

    assert store.write(asked) == ["wal", 2], "2 is FULL: the log is synchronised with each commit"
    store.close()


def test_what_is_committed_is_acknowledged_once_where_the_next_connection_fails(tmp_path: Path) -> None:
    file, moved = tmp_path / "a.sqlite", tmp_path / "moved.sqlite"
    store = SqliteStore(str(file))
    began, go = threading.Event(), threading.Event()
    done: list[str] = []

    def hold(session: Session) -> None:
        began.set()
        assert go.wait(10)

    def count(session: Session) -> int:
        done.append("counted")
        return session.insert(entry_of("counted"))

    def move(session: Session) -> None:
        done.append("moved")
        file.rename(moved)
        raise StoreError("a page is damaged", "told to fail, so that the connection is not used again")

    first = store.submit(hold)
    assert began.wait(10)
    together = [store.submit(count), store.submit(move)]
    go.set()
    first.result(10)
    assert together[0].result(10) == 1
    with pytest.raises(StoreError, match="a page is damaged"):
        together[1].result(10)
    assert done == ["counted", "moved"]
    # Nothing is written to a file that nobody would find; when it is back, writes go on.
    with pytest.raises(StoreError, match="was moved"):
        store.write(count)
    moved.rename(file)
    assert store.write(count) == 2 and commits(file) == ["counted", "counted"]
    store.close()


def test_a_write_that_fills_the_disk_takes_no_other_along(start: Callable[..., Service]) -> None:
    service = start(limit_file_bytes=3_000_000)
    small = [body_of(f"small{number}") for number in range(12)]
    big = body_of("big", log="x" * 4_000_000)

    def post(body: dict[str, object]) -> int:
        return service.http.post("/elements", json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(post, [*small[:6], big, *small[6:]]))
    assert statuses[6] == 507 and statuses[:6] + statuses[7:] == [200] * 12
    assert service.get("/health")["database"]["total_records"] == 12
    assert service.get("/stats")["unique_names"] == 12


def test_an_insert_does_not_wait_for_its_embedding(service: Service, embedding: EmbeddingDouble) -> None:
    service.add("first")
    service.get("/elements/search-similar?motivation=a")
    embedding.broken = True
    began = time.monotonic()
    for number in range(5):
        service.add(f"n{number}", motivation=f"gate {number}")
    assert time.monotonic() - began < 5
    assert service.client.stats()["pending_embeddings"] == 5
    embedding.broken = False
    time.sleep(max(0.0, embedding.failed_at + RETRY_SECONDS + 0.1 - time.monotonic()))  # the server rests
    answer = service.http.get("/elements/search-similar", params={"motivation": "gate 3", "top_k": 1})
    assert answer.headers["Pending-Embeddings"] == "0" and answer.json()[0]["name"] == "n3"


def test_the_background_settles_what_nobody_asks_for(service: Service) -> None:
    for number in range(3):
        service.add(f"n{number}", motivation=f"gate {number}")
    deadline = time.monotonic() + 20
    while service.client.stats()["unscored"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    details = service.client.score_details(3)
    assert details["evidence"]["novelty"]["motivation_index"] in (1, 2)
    assert details["revision"] > 0


def test_a_changed_baseline_is_followed_in_the_background(service: Service) -> None:
    client = service.client
    client.put_baseline(BASELINE)
    for number in range(1, 9):
        service.add_experiment(number, None, 3.9, 0.5)
    client.add_candidate(1)
    before = {element.index: element.score for element in client.all_elements().elements}
    changed = BASELINE.model_copy(update={"loss": 3.9})
    client.put_baseline(changed)
    # What is asked for is right at once; what is not, soon.
    now, candidate = client.scored(8), client.candidates()[0]
    assert now is not None and now.score != before[8] and candidate.score != before[1]
    deadline = time.monotonic() + 20
    while client.stats()["stale_scores"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    after = {element.index: element.score for element in client.all_elements().elements}
    assert all(after[index] != before[index] for index in before)
    assert client.score_details(3)["loss_term"] == pytest.approx(0.5)
    client.put_baseline(BASELINE)


def test_a_store_of_the_first_schema_is_migrated(tmp_path: Path) -> None:
    file = tmp_path / "old.sqlite"
    connection = sqlite3.connect(file)
    for statement in MIGRATIONS[0]:
        connection.execute(statement)
    for index, name, parent in ((1, "a", None), (2, "b", 1), (3, "b", 1), (5, "c", 3)):
        entry = entry_of(name, parent)
        connection.execute(
            "INSERT INTO elements VALUES (?, ?, 't', ?, '', 4.5, 0.4, 1, NULL, 1.5, 1, NULL, 100)",
            (index, name, parent),
        )
        body = entry.element.model_dump_json(exclude={"parent"})
        connection.execute(
            "INSERT INTO documents VALUES (?, ?, ?, NULL)", (index, body, entry.evidence.model_dump_json())
        )
        connection.execute("INSERT INTO sketches VALUES (?, ?)", (index, bytes(512)))
    connection.execute("INSERT INTO state VALUES ('last_index', '5')")
    connection.execute(f"PRAGMA application_id = {0x41534931}")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    store, fresh = SqliteStore(str(file)), SqliteStore(str(tmp_path / "new.sqlite"))
    assert schema(file) == schema(tmp_path / "new.sqlite")
    assert store.read(lambda session: session.child_counts()) == {1: 2, 3: 1}
    assert store.read(lambda session: (session.count(), session.unique_names())) == (4, 3)
    assert store.read(lambda session: session.sketches(0, 9))[-1][:2] == (4, 5)
    assert [element.name for element in store.read(lambda session: session.elements([5]))] == ["c"]
    known = store.read(lambda session: session.evidence(5))
    assert known is not None and known[0].benchmark is not None
    assert store.write(lambda session: session.insert(entry_of("d", 5))) == 6
    assert [facts.index for facts in store.read(lambda session: session.facts(Where(parent=5)))] == [6]
    store.close()
    fresh.close()


def schema(file: Path) -> list[tuple[str, ...]]:
    with sqlite3.connect(file) as connection:
        return connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY type, name").fetchall()


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("SELECT e.idx FROM elements e ORDER BY e.benchmark DESC, e.idx LIMIT 5", "elements_benchmark"),
        ("SELECT idx FROM elements WHERE children = 0 ORDER BY idx LIMIT 1", "elements_leaf"),
        ("SELECT idx FROM elements WHERE parent = 3 ORDER BY children DESC, idx LIMIT 2", "elements_strongest"),
        ("SELECT * FROM elements e WHERE e.parent = 3 ORDER BY e.idx", "elements_parent"),
        ("SELECT * FROM elements e WHERE e.name = 'a' ORDER BY e.time, e.idx", "elements_name"),
        ("SELECT * FROM elements e WHERE e.pending = 1 ORDER BY e.idx LIMIT 9", "elements_pending"),
        ("SELECT * FROM elements e WHERE e.baseline_key IS NULL AND e.revision < 3 LIMIT 9", "elements_revision"),
        (
            "SELECT * FROM elements e WHERE e.baseline_key = 'k' ORDER BY e.score DESC, e.idx LIMIT 9",
            "elements_baseline",
        ),
        ("SELECT idx, model, dimension, windows FROM vectors WHERE idx IN (1, 2)", "sqlite_autoindex_vectors_1"),
        ("SELECT idx, sha256 FROM programs WHERE idx IN (1, 2)", "INTEGER PRIMARY KEY"),
        ("SELECT MAX(sequence) FROM vectors WHERE model = 'm'", "vectors_model"),
    ],
)
def test_questions_are_answered_from_an_index(tmp_path: Path, query: str, index: str) -> None:
    SqliteStore(str(tmp_path / "a.sqlite")).close()
    with sqlite3.connect(tmp_path / "a.sqlite") as connection:
        plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}"))
    assert index in plan and "TEMP B-TREE" not in plan, plan


SMALL = {"CANDIDATE_CAPACITY": "6", "COLD_START": "4", "UPDATE_BATCH": "3"}


class Load:
    """One client that adds children and experiments and removes some of its own, and what it was told."""

    def __init__(self, url: str, name: str, known: dict[str, Design]) -> None:
        self._url, self._name, self._known = url, name, known
        self._rng = random.Random(name)
        self.stored: dict[int, str] = {}
        self.removed: set[int] = set()
        self.unsure: set[int] = set()
        """A removal was sent, and not answered."""
        self.stop = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=20, trust_env=False) as http:
            number = 0
            while not self.stop.is_set():
                number += 1
                try:
                    if self.stored and self._rng.random() < 0.15:
                        self._remove(http, self._rng.choice(list(self.stored)))
                    else:
                        self._add(http, f"delta_net_{self._name}_{number}", self._rng.random() < 0.5)
                except httpx.HTTPError:
                    return

    def _add(self, http: httpx.Client, name: str, experiment: bool) -> None:
        parent = self._rng.choice([None, *self.stored])
        body = element_of(self._rng.randrange(1000), parent).model_dump() | {"name": name, "log": "x" * 8000}
        self._known[name] = Design(4.5, 0.4)
        if not experiment:
            answer = http.post("/elements", json=body)
        else:
            loss, benchmark = self._rng.uniform(3.4, 4.6), self._rng.uniform(0.1, 0.7)
            self._known[name] = Design(loss, benchmark, BASELINE.key)
            run = run_of(NewElement.model_validate(body), loss, benchmark).model_dump()
            answer = http.post("/v2/experiments", json={"idempotency_key": name, "element": body, "run": run})
        if answer.status_code == 200:
            self.stored[answer.json()["data"]["index"]] = name

    def _remove(self, http: httpx.Client, index: int) -> None:
        del self.stored[index]
        self.unsure.add(index)
        if http.delete(f"/elements/by-index/{index}").status_code == 200:
            self.unsure.discard(index)
            self.removed.add(index)


def kill_at_random_moments(start: Callable[..., Service], kills: int, seed: int) -> None:
    """Kills the server under load again and again. Each time everything acknowledged is there, each index was given
    once, every invariant holds, and the candidate set is the one that follows from the events."""
    rng = random.Random(seed)
    env = {f"ASI_DATABASE__{name}": value for name, value in SMALL.items()}
    capacity, cold_start, batch = map(int, SMALL.values())
    known: dict[str, Design] = {}
    model = CandidateModel(capacity, cold_start, batch, lambda _, name: known[name], {BASELINE.key: BASELINE})
    acknowledged: dict[int, str] = {}
    removed: set[int] = set()
    merges = 0
    for round_ in range(kills):
        service = start(env=env)
        service.client.put_baseline(BASELINE)
        loads = [Load(service.url, f"{seed}_{round_}_{worker}", known) for worker in range(4)]
        writers = [threading.Thread(target=load.run) for load in loads]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + 20
        while sum(len(load.stored) for load in loads) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        service.kill()
        for load, writer in zip(loads, writers, strict=True):
            load.stop.set()
            writer.join(20)
            acknowledged |= load.stored
            removed |= load.removed
            for index in load.removed | load.unsure:
                acknowledged.pop(index, None)
        assert any(load.stored for load in loads)
        before, merged = model.seen, model.merged
        store = open_store(DatabaseSettings(store=service.store))
        assert broken(store, capacity) == []
        while events := store.read(lambda session: session.ledger.events(model.seen, 1000)):
            model.follow(events)
        stored = store.read(lambda session: {facts.index: facts.name for facts in session.facts()})
        members = store.read(lambda session: {facts.index for facts in session.candidates()})
        through = store.read(lambda session: session.state("merged_through"))
        store.close()
        assert model.seen > before and model.given == list(range(1, len(model.given) + 1)), "no gap, no index twice"
        assert acknowledged.items() <= stored.items() and not removed & set(stored)
        assert stored.keys() == model.stored.keys()
        assert (members, through or 0) == (model.members, model.merged)
        merges += model.merged > merged
    assert merges and members, "what is to be seen has happened"
    print(
        f"{kills} kills under load: {len(acknowledged)} acknowledged elements, all there, {len(removed)} removals, all"
        f" done; candidates merged before {merges} of them, each set as the events say; every invariant holds"
    )


def test_a_few_kills_under_load_lose_nothing(start: Callable[..., Service]) -> None:
    kill_at_random_moments(start, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_under_load_lose_nothing(start: Callable[..., Service]) -> None:
    kill_at_random_moments(start, kills=50, seed=2)
