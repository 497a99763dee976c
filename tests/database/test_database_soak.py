"""Eight client processes read and write for a while: no index twice or missing, no 5xx, nothing acknowledged lost."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import random
import time
import uuid
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any
from urllib.parse import urlsplit

import pytest

from common.knobs import Database as DatabaseSettings
from database.invariants import broken
from database.store import open_store
from tests.database.db_service import BASELINE, Service, body_of, element_of, mongodb_server, run_of

CLIENTS = 8
READS = (
    "/elements/by-index/{}",
    "/elements/{}/score",
    "/elements/context/{}",
    "/elements/{}/path",
    "/elements/with-score/by-index/{}",
    "/elements/top-k/5",
    "/elements/uct-select",
    "/elements/search-similar?top_k=3&motivation=gate+{}+decays",
    "/candidates/sample-range/1/10/3",
    "/candidates/all",
    "/v2/elements?after={}&limit=20",
    "/v2/events?after={}",
    "/v2/stats",
)


class Client:
    """One process: what it was told is stored, and every answer that was not 200."""

    def __init__(self, url: str, worker: int, seconds: float) -> None:
        self._place = urlsplit(url).netloc
        self._connection = http.client.HTTPConnection(self._place, timeout=60)
        self._worker = worker
        self._until = time.monotonic() + seconds
        self._rng = random.Random(worker)
        self.stored: dict[int, str] = {}
        self.refused: list[tuple[str, int, str]] = []
        self.asked = 0

    def run(self) -> None:
        number = 0
        while time.monotonic() < self._until:
            number += 1
            if self._rng.random() < 0.4 or not self.stored:
                self._write(1000 * self._worker + number, self._rng.random() < 0.3)
            else:
                index = self._rng.choice(list(self.stored))
                found = self._ask("GET", self._rng.choice(READS).format(index))
                if isinstance(found, dict) and set(found) >= {"index", "name", "program"} and found["index"] == index:
                    assert found["name"] == self.stored[index]

    def _write(self, number: int, whole: bool) -> None:
        """An element, or a whole experiment, which is sent twice as if its answer had been lost."""
        parent = self._rng.choice([None, *list(self.stored)[-5:]])
        element = element_of(number, parent).model_copy(update={"name": f"delta_net_{self._worker}_{number}"})
        if not whole:
            body = body_of(element.name, parent, motivation=element.motivation, log="x" * 4000)
            self._keep(self._ask("POST", "/elements", body), element.name)
            return
        run = run_of(element, 3.9 + 0.2 * self._rng.random(), 0.5).model_dump()
        experiment = {"idempotency_key": element.name, "element": element.model_dump(), "run": run}
        for _ in range(2):
            self._keep(self._ask("POST", "/v2/experiments", experiment), element.name)

    def _keep(self, answer: Any, name: str) -> None:
        if answer is not None:
            index = answer["data"]["index"]
            assert self.stored.setdefault(index, name) == name, f"index {index} was given twice"

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        self.asked += 1
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read().decode()
        if answer.status != 200:
            self.refused.append((path, answer.status, text[:300]))
            return None
        return json.loads(text)


def work(url: str, worker: int, seconds: float, told: Queue[tuple[dict[int, str], list[Any], int]]) -> None:
    client = Client(url, worker, seconds)
    client.run()
    told.put((client.stored, client.refused, client.asked))


def soak(service: Service, seconds: float) -> tuple[int, int]:
    """Returns how many requests were answered, and how many elements stored."""
    service.client.put_baseline(BASELINE)
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    clients = [context.Process(target=work, args=(service.url, worker, seconds, told)) for worker in range(CLIENTS)]
    for client in clients:
        client.start()
    found = [told.get(timeout=seconds + 120) for _ in clients]
    for client in clients:
        client.join(30)
    assert [client.exitcode for client in clients] == [0] * CLIENTS
    assert [line for _, refused, _ in found for line in refused] == []
    stored = [item for mine, _, _ in found for item in mine.items()]
    assert sorted(index for index, _ in stored) == list(range(1, len(stored) + 1)), "no index twice, none missing"
    assert service.stop() == 0
    assert "Traceback" not in service.log.read_text()
    store = open_store(DatabaseSettings(store=service.store))
    names = store.read(lambda session: {facts.index: facts.name for facts in session.facts()})
    assert names == dict(stored), "nothing acknowledged is lost, nothing else is there"
    assert broken(store, 50) == []
    store.close()
    return sum(asked for _, _, asked in found), len(stored)


def test_eight_clients_for_a_moment(start: Callable[..., Service]) -> None:
    asked, stored = soak(start(), seconds=2)
    assert asked > 2 * CLIENTS and stored > CLIENTS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_clients_for_minutes(start: Callable[..., Service]) -> None:
    asked, stored = soak(start(), seconds=180)
    print(f"8 clients, 180 s: {asked} requests, {stored} elements, no 5xx, no index twice or missing, nothing lost")
    assert stored > 1000


@pytest.mark.services
@pytest.mark.timeout(600)
def test_eight_clients_over_mongodb(start: Callable[..., Service]) -> None:
    with mongodb_server() as url:
        asked, stored = soak(start(store=f"{url}/test_{uuid.uuid4().hex}"), seconds=30)
    print(f"8 clients, 30 s, MongoDB: {asked} requests, {stored} elements")
    assert asked > 2 * CLIENTS and stored > CLIENTS
