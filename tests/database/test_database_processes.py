"""Several servers over one store, written to at once: one candidate set, by the published rules; every index once."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from common.knobs import Database as DatabaseSettings
from database.invariants import broken
from database.store import open_store
from tests.database.candidate_model import CandidateModel, Design
from tests.database.db_service import BASELINE, Service, body_of, mongodb_server, settled
from tests.database.test_database_writes import SMALL, Load


@pytest.fixture(params=["sqlite", pytest.param("mongodb", marks=pytest.mark.services)])
def kind(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Where the servers' store is; {} for the file of the test."""
    if request.param == "sqlite":
        yield {}
        return
    with mongodb_server() as url:
        yield {"store": f"{url}/test_{uuid.uuid4().hex}"}


@pytest.mark.timeout(600)
def test_servers_that_share_a_store_agree_on_the_candidates(
    start: Callable[..., Service], kind: dict[str, str]
) -> None:
    env = {f"ASI_DATABASE__{name}": value for name, value in SMALL.items()}
    servers = [start(env=env, **kind) for _ in range(2)]
    servers[0].client.put_baseline(BASELINE)
    known: dict[str, Design] = {}
    loads = [Load(server.url, f"{at}_{worker}", known) for at, server in enumerate(servers) for worker in range(2)]
    writers = [threading.Thread(target=load.run) for load in loads]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 60
    while min(len(load.stored) for load in loads) < 12:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for load in loads:
        load.stop.set()
    for writer in writers:
        writer.join(30)
    for server in servers:
        settled(server)
    sets = [[element["index"] for element in server.get("/candidates/all")] for server in servers]
    waiting = [server.get("/candidates/new-data-count")["data"] for server in servers]
    ranked = [[element["index"] for element in server.get("/elements/top-k/20")] for server in servers]
    near = [
        {element["index"] for element in server.get("/elements/search-similar?motivation=gate+7&top_k=20")}
        for server in servers
    ]
    assert sets[0] == sets[1] and waiting[0] == waiting[1] and ranked[0] == ranked[1]
    acknowledged = {index: name for load in loads for index, name in load.stored.items()}
    assert len(acknowledged) == sum(len(load.stored) for load in loads), "no index was given twice"
    assert [server.stop() for server in servers] == [0, 0]
    capacity, cold_start, batch = map(int, SMALL.values())
    model = CandidateModel(capacity, cold_start, batch, lambda _, name: known[name], {BASELINE.key: BASELINE})
    store = open_store(DatabaseSettings(store=servers[0].store))
    while events := store.read(lambda session: session.ledger.events(model.seen, 1000)):
        model.follow(events)
    stored = store.read(lambda session: {facts.index: facts.name for facts in session.facts()})
    assert broken(store, capacity) == []
    store.close()
    assert model.given == list(range(1, len(model.given) + 1)), "none is missing"
    assert acknowledged.items() <= stored.items() and near[0] <= set(stored) and near[1] <= set(stored)
    assert model.merged > 0 and sets[0] == model.ranked()


@pytest.mark.timeout(300)
def test_one_key_sent_to_two_servers_at_once_stores_once(start: Callable[..., Service], kind: dict[str, str]) -> None:
    servers = [start(**kind) for _ in range(2)]

    def send(number: int) -> int:
        body, key = body_of(f"n{number // 2}"), {"Idempotency-Key": f"k{number // 2}"}
        return int(servers[number % 2].post("/elements", body, headers=key)["data"]["index"])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(send, range(40)))
    assert [found[at] for at in range(0, 40, 2)] == [found[at] for at in range(1, 40, 2)]
    assert sorted(found[::2]) == list(range(1, 21))
    assert {server.get("/health")["database"]["total_records"] for server in servers} == {20}


@pytest.mark.timeout(300)
def test_a_listener_of_one_server_hears_what_another_writes(
    start: Callable[..., Service], kind: dict[str, str]
) -> None:
    writing, heard = start(**kind), start(**kind)
    began = threading.Event()
    found: list[str] = []

    def listen() -> None:
        with httpx.stream("GET", f"{heard.url}/v2/events/stream", timeout=60, trust_env=False) as answer:
            began.set()
            for line in answer.iter_lines():
                if line.startswith("data: ") and "name" in json.loads(line[6:])["data"]:
                    found.append(json.loads(line[6:])["data"]["name"])
                    if len(found) == 2:
                        return

    listener = threading.Thread(target=listen)
    listener.start()
    assert began.wait(30)
    for name in ("first", "second"):
        writing.add(name)
    listener.join(60)
    assert found == ["first", "second"]
