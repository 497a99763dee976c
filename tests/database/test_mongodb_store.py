"""MongoDB in particular: a store of the published service, plans of the questions, the lease between processes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pymongo
import pytest
from pymongo import monitoring

from common.errors import StoreError
from common.knobs import Database as DatabaseSettings
from database.candidate_file import read_candidate_file
from database.evaluate_agent.score import evidence_of
from database.invariants import broken
from database.models import NewElement
from database.mongodb_database import MongoStore
from database.mongodb_mending import mend
from database.store import NewEntry, Session, Where, open_store
from tests.database.db_service import (
    BASELINE,
    KEYS,
    Service,
    body_of,
    free_port,
    settled,
    start_mongodb,
)

pytestmark = pytest.mark.services
Documents = pymongo.collection.Collection[dict[str, Any]]


@pytest.fixture
def place(place: tuple[str, pymongo.database.Database[dict[str, Any]]]) -> tuple[str, Documents]:
    """A fresh database: (its URL, the collection of elements)."""
    url, database = place
    return url, database["data_elements"]


def entry_of(model: str | None) -> NewEntry:
    """A new element; with the name of an embedding model it has a vector."""
    element = NewElement.model_validate(body_of("x"))
    evidence = evidence_of(element.result.train, element.result.test, None)
    windows = None if model is None else np.ones((1, 4), dtype=np.float32)
    return NewEntry(element, evidence, complete=True, windows=windows, model=model)


def published(index: int, parent: int | None) -> dict[str, Any]:
    """A document as the published service stores it."""
    now = datetime(2025, 7, 1, tzinfo=UTC)
    body = body_of(f"delta_net_{index}", parent, motivation=f"gate {index} decays")
    more = {"index": index, "score": 2.5, "motivation_embedding": [0.5] * 4096, "created_at": now, "updated_at": now}
    return body | more


def test_a_store_of_the_published_service_is_taken_over(
    place: tuple[str, Documents], start: Callable[..., Service], tmp_path: Path
) -> None:
    url, documents = place
    before = [published(index, 1 if index > 1 else None) for index in (1, 2, 3, 7)]
    documents.insert_many([dict(document) for document in before])
    documents.insert_one({"note": "of another program"})
    documents.update_one({"index": 3}, {"$unset": {"summary": "", "log": ""}})
    candidates = tmp_path / "candidates.json"
    candidates.write_text(json.dumps({"candidates": [before[2] | {"created_at": "", "updated_at": ""}, 1, 99, "x"],
                                      "new_data_count": 1, "last_updated": ""}))  # fmt: skip
    service = start(store=url, env={"ASI_DATABASE__CANDIDATE_FILE": str(candidates)})
    assert service.get("/health")["database"]["total_records"] == 4
    element = service.get("/elements/by-index/3")
    assert list(element) == KEYS and element["summary"] == "" and element["parent"] == 1
    assert service.get("/candidates/new-data-count")["data"] == {"new_data_count": 1}
    # Element 2 may have got a score meanwhile, and a place with it.
    assert {item["index"] for item in service.get("/candidates/all")} in ({1, 3}, {1, 2, 3})
    found = service.get("/elements/search-similar", params={"motivation": "gate 7 decays", "top_k": 1})
    assert found[0]["index"] == 7
    score = service.get("/elements/7/score")["data"]["score"]
    assert score is not None and score != 2.5
    assert service.add("next", 7) == 8
    kept = {document["index"]: document for document in documents.find({"index": {"$in": [1, 2, 3, 7]}})}
    for document in before:
        theirs = {name: value for name, value in kept[document["index"]].items() if name in document}
        changed = {"score", "updated_at", *(("summary", "log") if document["index"] == 3 else ())}
        for name in set(document) - changed:
            value = theirs[name].replace(tzinfo=UTC) if isinstance(theirs[name], datetime) else theirs[name]
            assert value == document[name], name
        assert kept[document["index"]]["asi"]["adopted_score"] == 2.5
    assert documents.count_documents({"note": "of another program", "asi": {"$exists": False}}) == 1
    # The reset sequence of existing clients.
    service.delete("/elements/all")
    assert service.add("delta_net") == 1
    service.post("/candidates/1/add")
    assert service.get("/candidates/all")[0]["score"] is not None
    service.stop()


def test_an_element_larger_than_a_document_may_be_is_refused(
    place: tuple[str, Documents], start: Callable[..., Service]
) -> None:
    service = start(store=place[0])
    assert service.add("large", motivation="x" * 10_000_000) == 1
    refused = service.post("/elements", body_of("too large", log="x" * 15_000_000), 400)
    assert "MiB" in refused["detail"]
    assert service.add("next") == 2
    settled(service)
    assert service.stop() == 0


def test_two_documents_of_one_index_are_told(place: tuple[str, Documents]) -> None:
    url, documents = place
    documents.insert_many([published(5, None), published(5, None)])
    with pytest.raises(StoreError, match="index 5 is held by 2 documents"):
        open_store(DatabaseSettings(store=url))


QUESTIONS: dict[str, Callable[[Session], Any]] = {
    "count": lambda session: session.count(),
    "names": lambda session: session.unique_names(),
    "explored": lambda session: session.count(Where(explored=True), limit=20),
    "new": lambda session: session.count(Where(after=5), limit=20),
    "pending": lambda session: session.count(Where(pending=True)),
    "unscored": lambda session: session.count(Where(unscored=True)),
    "incomplete": lambda session: session.facts(Where(incomplete=True), limit=3),
    "one": lambda session: session.facts(Where(index=3), limit=1),
    "first": lambda session: session.facts(limit=1),
    "page": lambda session: session.facts(Where(after=3), limit=5),
    "newest": lambda session: session.facts(order="newest", limit=5),
    "by name": lambda session: session.facts(Where(name="x"), "time"),
    "children": lambda session: session.facts(Where(parent=1)),
    "roots": lambda session: session.facts(Where(roots=True)),
    "best scores": lambda session: session.facts(Where(baseline_key="k"), "score", limit=5),
    "out of date": lambda session: session.facts(Where(baseline_key="k", before_revision=3), "revision", limit=5),
    "elements": lambda session: session.elements([1, 3]),
    "sample": lambda session: session.sample(),
    "top": lambda session: session.ranked("benchmark", limit=3),
    "strongest": lambda session: session.strongest_children(1, 2),
    "child counts": lambda session: session.child_counts([1, 2]),
    "leaf": lambda session: session.oldest_leaf(),
    "key": lambda session: session.find_key("k"),
    "program": lambda session: session.ledger.with_program("k"),
    "fingerprint": lambda session: session.with_fingerprint("k"),
    "vectors": lambda session: (session.vector_state(), session.windows(0, 5)),
    "sketches": lambda session: (session.sketches(0, 5), session.sketch_sequences()),
    "sizes": lambda session: session.bytes_of([1, 3]),
    "events": lambda session: (session.ledger.event_span(), session.ledger.events(2, 5)),
}


def test_no_question_reads_every_document(place: tuple[str, Documents]) -> None:
    """The queries themselves are explained, each as it was sent."""
    url, documents = place
    sent: list[dict[str, Any]] = []

    class Heard(monitoring.CommandListener):
        def started(self, event: monitoring.CommandStartedEvent) -> None:
            if event.command_name in ("find", "aggregate", "distinct", "count"):
                sent.append(dict(event.command))

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

        def failed(self, event: monitoring.CommandFailedEvent) -> None: ...

    before = list(monitoring._LISTENERS.command_listeners)
    monitoring.register(Heard())
    try:
        store = open_store(DatabaseSettings(store=url))
    finally:
        monitoring._LISTENERS.command_listeners[:] = before
    entry = entry_of(None)
    for parent in (None, 1, 1, 2, 2, None):
        child = entry.element.model_copy(update={"parent": parent})
        store.write(lambda session, child=child: session.insert(replace(entry, element=child)))  # type: ignore[misc]
    for name, question in QUESTIONS.items():
        sent.clear()
        store.read(question)
        store.read(question)
        assert sent, name
        for command in sent:
            if command.get("find") in ("asi_state", "asi_events"):
                # Looked up by their names or numbers. The lease, which is renewed meanwhile, looks for its own name.
                named = command["filter"]["_id"]
                assert named == "lease" or set(named) == {"$in"}, (name, command)
                continue
            asked = {key: value for key, value in command.items() if key not in ("lsid", "$db", "$clusterTime")}
            plan = json.dumps(documents.database.command("explain", asked), default=str)
            assert "COLLSCAN" not in plan and "IXSCAN" in plan, (name, asked, plan)
    # Not explained by every server: it may take the index of the first field that has one, and "index" reads all below.
    sent.clear()
    assert store.read(lambda session: session.names_among(["x"], 3)) == {"x"}  # type: ignore[attr-defined]
    fields = list(next(command["query"] for command in sent if "query" in command))
    assert fields.index("name") < fields.index("index")
    store.close()


def test_the_lease_lets_one_write_at_a_time_and_is_prolonged(
    place: tuple[str, Documents], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("database.mongodb_lease.LEASE_SECONDS", 2.0)
    url, _ = place
    one, two = MongoStore(url, 10), MongoStore(url, 10)
    inside, seen = threading.Event(), []

    def slow(session: Session) -> None:
        inside.set()
        time.sleep(4.0)
        seen.append("one")

    first = one.submit(slow)
    assert inside.wait(10)
    two.write(lambda session: seen.append("two"))
    first.result(10)
    assert seen == ["one", "two"], "a write longer than the lease keeps it"
    one.close()
    two.close()


def test_a_holder_that_died_is_waited_for_no_longer_than_its_lease(
    place: tuple[str, Documents], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("database.mongodb_lease.LEASE_SECONDS", 0.5)
    url, documents = place
    store = MongoStore(url, 10)
    lease = {"owner": "somebody who died", "until": time.time() + 0.5}
    documents.database["asi_state"].update_one({"_id": "lease"}, {"$set": lease}, upsert=True)
    # Waited for longer, it would be refused after the store's 10 s.
    store.write(lambda session: session.put_state("x", 1))
    assert time.time() > lease["until"] - 0.1, "the server's clock may be a little ahead"
    store.close()


def test_what_a_holder_left_open_is_ended_with_its_lease(place: tuple[str, Documents]) -> None:
    url, documents = place
    store = MongoStore(url, 10)
    store.write(lambda session: session.put_state("x", 1))
    client = documents.database.client
    if not client.admin.command("hello").get("setName"):
        pytest.skip("a stand-alone server has no transactions")
    # A holder that stands still in the middle of a write, until its lease runs out.
    state = documents.database["asi_state"]
    with client.start_session() as stalled:
        stalled.start_transaction()
        state.update_one({"_id": "x"}, {"$set": {"value": "2"}}, session=stalled)
        lease = {"owner": "stalled", "until": time.time() - 1, "session": stalled.session_id["id"]}
        state.update_one({"_id": "lease"}, {"$set": lease})
        began = time.monotonic()
        store.write(lambda session: session.put_state("x", 3))
        assert time.monotonic() - began < 30, "its transaction, which lives a minute, is not waited for"
        with pytest.raises(pymongo.errors.OperationFailure):
            stalled.commit_transaction()
    assert store.read(lambda session: session.state("x")) == 3
    store.close()


def test_what_a_cut_off_write_left_behind_is_put_right_at_the_next_start(place: tuple[str, Documents]) -> None:
    url, documents = place
    store = MongoStore(url, 10)
    entry = entry_of("m")

    def fill(session: Session) -> None:
        for parent in (None, 1, 2):
            session.insert(replace(entry, element=entry.element.model_copy(update={"parent": parent})))
        session.put_candidates([1, 2, 3])
        session.put_baseline(BASELINE)

    store.write(fill)
    before = store.read(lambda session: session.vector_state())
    store.close()
    # As if killed: after the document of a removed parent was gone, after a new model's name was written, after a
    # baseline was kept.
    documents.delete_one({"index": 2})
    documents.database["asi_state"].update_one({"_id": "model"}, {"$set": {"value": '"n"'}})
    # By itself, as a server with transactions has nothing to mend.
    assert len(mend(documents.database)) == 6
    assert mend(documents.database) == []
    store = MongoStore(url, 10)
    assert [facts.index for facts in store.read(lambda session: session.candidates())] == [1, 3]
    assert store.read(lambda session: session.facts(Where(roots=True)))[-1].index == 3
    assert store.read(lambda session: session.count(Where(pending=True))) == 2
    assert store.read(lambda session: session.state("baselines")) == [BASELINE.key]
    assert store.read(lambda session: session.vector_state()).epoch > before.epoch
    assert broken(store, 50) == []
    store.close()


@pytest.mark.timeout(300)
def test_a_kill_under_load_loses_nothing_and_the_next_start_waits_for_the_lease(
    place: tuple[str, Documents], start: Callable[..., Service]
) -> None:
    url, _ = place
    acknowledged: dict[int, str] = {}
    killed = start(store=url)

    def write(worker: int) -> None:
        for number in range(1000):
            name = f"n{worker}_{number}"
            try:
                answer = killed.http.post("/elements", json=body_of(name))
            except httpx.HTTPError:
                return
            if answer.status_code == 200:
                acknowledged[answer.json()["data"]["index"]] = name

    writers = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 60
    while len(acknowledged) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    for writer in writers:
        writer.join(60)
    service = start(store=url)
    count = service.get("/health")["database"]["total_records"]
    assert service.add("next") == count + 1
    assert service.stop() == 0
    store = MongoStore(url, 30)
    stored = {facts.index: facts.name for facts in store.read(lambda session: session.facts())}
    assert len(acknowledged) >= 20 and acknowledged.items() <= stored.items()
    assert sorted(stored) == list(range(1, count + 2)), "no index twice, none missing"
    assert broken(store, 50) == []
    store.close()


@pytest.mark.timeout(300)
def test_a_server_that_goes_away_is_missed_until_it_is_back(start: Callable[..., Service], tmp_path: Path) -> None:
    port = free_port()
    mongodb = start_mongodb(tmp_path, port)
    try:
        service = start(store=f"mongodb://127.0.0.1:{port}/away")
        for number in range(3):
            service.add(f"n{number}")
        settled(service)
        with httpx.stream("GET", f"{service.url}/v2/events/stream", timeout=60, trust_env=False) as stream:
            mongodb.kill()
            mongodb.wait()
            for method, path, body in (
                ("GET", "/health", None),
                ("GET", "/ready", None),
                ("GET", "/elements/by-index/1", None),
                ("GET", "/v2/export", None),
                ("POST", "/elements", body_of("lost")),
            ):
                refused = service.http.request(method, path, json=body)
                assert refused.status_code == 503, (path, refused.text)
                told = refused.json()
                expected = f"expected a MongoDB server that answers at 127.0.0.1:{port}, got "
                assert told["success"] is False and told["message"].startswith(expected)
                assert "Topology" not in told["message"] and "fix:" in told["detail"]
            mongodb = start_mongodb(tmp_path, port)
            deadline = time.monotonic() + 60
            while (ready := service.http.get("/ready")).status_code != 200:
                assert ready.status_code == 503 and time.monotonic() < deadline, ready.text
                time.sleep(0.5)
            assert service.add("back") == 4
            assert "back" in next(line for line in stream.iter_lines() if line.startswith("data: "))
        assert [service.get(f"/elements/by-index/{index}")["name"] for index in (1, 3, 4)] == ["n0", "n2", "back"]
        settled(service)
        assert service.stop() == 0
        assert "Traceback" not in service.log.read_text()
    finally:
        mongodb.kill()
        mongodb.wait()


def test_a_cluster_has_no_one_address(place: tuple[str, Documents], monkeypatch: pytest.MonkeyPatch) -> None:
    def several(_: object) -> None:
        raise pymongo.errors.InvalidOperation("several")

    monkeypatch.setattr(pymongo.MongoClient, "address", property(several))
    store = open_store(DatabaseSettings(store=place[0]))
    store.close()
    name, at = place[1].database.name, place[0].split("/")[2]
    with pytest.raises(StoreError, match=f"^{name} at {at} is closed"):
        store.write(lambda session: session.count())


@pytest.mark.parametrize("text", ["", "[]", '{"candidates": 3}', "no json"])
def test_a_file_that_is_no_candidate_file_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(StoreError, match="candidate_file"):
        read_candidate_file(file)
