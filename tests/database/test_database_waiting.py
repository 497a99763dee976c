"""Requests that wait, however many, hold no quick answer up: they have threads of their own, or none."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.database.db_service import BASELINE, EmbeddingDouble, Service, element_of, hashed_windows, run_of

MANY = 45
"""More than the server has threads for quick answers."""
QUICK = 3.0
"""Seconds: far below what the others wait for, far above what an answer takes on a busy machine."""
Start = Callable[..., Service]
Ask = Callable[[httpx.Client, int], httpx.Response]


class Gate:
    """Embeds once it is open."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.double = EmbeddingDouble(windows=self.windows)

    def windows(self, text: str) -> list[list[float]]:
        self.opened.wait(30)
        return hashed_windows(text)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()
    made.double.close()


def post_experiment(client: httpx.Client, number: int) -> httpx.Response:
    element = element_of(number, None)
    run = run_of(element, 4.0, 0.5)
    body = {"idempotency_key": f"{number}", "element": element.model_dump(), "run": run.model_dump()}
    return client.post("/v2/experiments", json=body)


def search(client: httpx.Client, number: int) -> httpx.Response:
    return client.get("/elements/search-similar", params={"motivation": f"gate {number}"})


def put_baseline(client: httpx.Client, number: int) -> httpx.Response:
    return client.put(f"/v2/baselines/{number}", json=BASELINE.model_dump() | {"key": f"{number}"})


def answers_meanwhile(service: Service, ask: Ask, release: Callable[[], Any]) -> list[httpx.Response]:
    """The answers to many requests that wait until `release`; before it, reads are answered quickly."""
    with ThreadPoolExecutor(MANY) as pool, httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        try:
            sent: list[Future[httpx.Response]] = [pool.submit(ask, client, number) for number in range(2, MANY + 2)]
            time.sleep(1.0)
            assert not any(future.done() for future in sent), "they wait"
            for path in ("/health", "/elements/by-index/1", "/candidates/all"):
                began = time.monotonic()
                service.get(path, timeout=30)
                assert time.monotonic() - began < QUICK, path
        finally:
            release()
        return [future.result() for future in sent]


def test_experiments_that_wait_for_their_scores_hold_no_thread(start: Start, gate: Gate) -> None:
    service = start(embedding_url=gate.double.url)
    service.add()
    service.client.put_baseline(BASELINE)
    found = answers_meanwhile(service, post_experiment, gate.opened.set)
    assert {answer.status_code for answer in found} == {200}
    data = [answer.json()["data"] for answer in found]
    assert sorted(one["index"] for one in data) == list(range(2, MANY + 2))
    assert all(one["score"] is not None for one in data), "each was answered with the score it waited for"


@pytest.mark.slow
def test_an_experiment_waits_for_its_score_no_longer_than_it_may(start: Start, gate: Gate) -> None:
    service = start(embedding_url=gate.double.url)
    began = time.monotonic()
    with ThreadPoolExecutor(MANY) as pool, httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        found = list(pool.map(lambda number: post_experiment(client, number), range(1, MANY + 1)))
    assert time.monotonic() - began < 12 + QUICK
    assert {answer.status_code for answer in found} == {200}
    assert {answer.json()["data"]["score"] for answer in found} <= {None}


def test_searches_that_wait_to_be_embedded_leave_threads_for_others(start: Start, gate: Gate) -> None:
    service = start(embedding_url=gate.double.url)
    service.add()
    answers_meanwhile(service, search, gate.opened.set)


def test_writes_that_wait_for_a_locked_store_leave_threads_for_others(start: Start, tmp_path: Path) -> None:
    service = start()
    service.add()
    other = sqlite3.connect(tmp_path / "database.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    found = answers_meanwhile(service, put_baseline, lambda: other.execute("ROLLBACK"))
    other.close()
    assert {answer.status_code for answer in found} == {200}
