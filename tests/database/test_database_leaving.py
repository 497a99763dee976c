"""Clients that leave in the middle, or keep a connection and do nothing: no error of the server, nothing in its way."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.database.db_service import BASELINE, EmbeddingDouble, Service, hashed_windows, settled

STREAM = b"GET /v2/events/stream?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n"
EXPORT = b"GET /v2/export HTTP/1.1\r\nHost: localhost\r\n\r\n"
CUT = b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n" + b'{"element": {}}\n{"candid'
CHUNKED = b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n" + b'{"x'


@contextlib.contextmanager
def asked(service: Service, request: bytes) -> Iterator[socket.socket]:
    """A connection on which `request` was sent, and of whose answer hardly anything fits on the way."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect((urlsplit(service.url).hostname, urlsplit(service.url).port))
        connection.sendall(request)
        yield connection


def test_whoever_leaves_leaves_no_error_behind(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start()
    for number in range(20):
        service.add(f"n{number}")
    rng = random.Random(1)
    writes = [b"POST /elements", b"POST /v2/experiments", b"PUT /v2/baselines/x", b"POST /v2/usage", b"POST /v2/import"]
    requests = [STREAM] * 40 + [EXPORT] * 10 + [write + ending for write in writes for ending in (CUT, CHUNKED)]
    rng.shuffle(requests)
    for number, request in enumerate(requests):
        with asked(service, request) as connection:
            # Before the answer, at its first bytes, and within.
            if request in (STREAM, EXPORT) and rng.random() < 0.5:
                connection.recv(rng.choice([1, 300]))
            time.sleep(0.01 * rng.random())
        if number % 20 == 19:
            service.delete("/elements/all")
            service.add(f"again {number}")
    assert service.stop() == 0
    log = (tmp_path / "server.log").read_text()
    assert "Traceback" not in log and " ERROR " not in log, log[-3000:]


def test_a_stop_cuts_off_those_who_keep_it_waiting(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start()
    for number in range(3):
        service.add(f"n{number}", log="x" * 3_000_000)
    with asked(service, STREAM), asked(service, EXPORT) as reader, asked(service, b"POST /elements" + CUT):
        reader.recv(1)
        assert service.stop() == 0
    log = (tmp_path / "server.log").read_text()
    assert "Traceback" not in log, log[-3000:]
    assert log.count("is cut off: the server stops") == 2, log[-3000:]


def test_a_stop_waits_for_no_embedding_and_the_next_start_goes_on(
    start: Callable[..., Service], tmp_path: Path, embedding: EmbeddingDouble
) -> None:
    over = threading.Event()

    def never(text: str) -> list[list[float]]:
        over.wait(30)
        return hashed_windows(text)

    slow = EmbeddingDouble(never)
    service = start(embedding_url=slow.url)
    service.client.put_baseline(BASELINE)
    for number in range(20):
        service.add(f"n{number}")
    with ThreadPoolExecutor(2) as pool:
        # Both wait: one for its score, one for what is pending.
        experiment = pool.submit(service.add_experiment, 1, None, 4.0, 0.5)
        search = pool.submit(service.http.get, "/elements/search-similar?motivation=x")
        while service.get("/health")["database"]["total_records"] < 21:
            time.sleep(0.01)
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(30) == 0
        assert time.monotonic() - began < 5, "the grace of a stop is 5 s, an embedding is waited for 12 s"
        assert experiment.result()["score"] is None
        answer = search.result()
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert "the server stops" in answer.json()["message"]
    assert " ERROR " not in (tmp_path / "server.log").read_text()
    over.set()
    slow.close()
    again = start(embedding_url=embedding.url)
    settled(again)
    assert again.client.stats()["unscored"] == 0
    assert again.stop() == 0
    assert "Traceback" not in (tmp_path / "server.log").read_text()


def children(process: int) -> dict[str, str]:
    """The processes that it started, with their command lines."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    found = [child for task in tasks for child in (task / "children").read_text().split()]
    return {child: Path(f"/proc/{child}/cmdline").read_text() for child in found}


@pytest.mark.slow
def test_an_embedding_server_of_its_own_is_started_when_it_is_needed_and_ended_with_it(
    start: Callable[..., Service],
) -> None:
    service = start(embedding_url="")
    for path in ("/health", "/ready", "/stats", "/v2/stats", "/elements/top-k/5", "/candidates/all", "/faiss/stats"):
        service.get(path)
    time.sleep(1)
    assert children(service.process.pid) == {}, "nothing is to be embedded"
    service.add("a")
    deadline = time.monotonic() + 30
    while "common/embedding_server.py" not in " ".join((started := children(service.process.pid)).values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (child,) = started
    assert service.stop() == 0
    assert not Path(f"/proc/{child}").exists()


def test_what_vanishes_between_two_looks_of_a_read_is_no_error(service: Service) -> None:
    """Where reads are no snapshot, an element may be deleted between the moment it is chosen and the one it is read."""
    over = threading.Event()

    def churn(number: int) -> None:
        while not over.is_set():
            for _ in range(3):
                service.add(f"n{number}")
            service.delete(f"/elements/by-name/n{number}")

    asked = ("/elements/sample", "/elements/uct-select", "/elements/context/1", "/elements/2/path")
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(churn, number) for number in range(2)]
        try:
            # SQLite's reads are snapshots.
            seconds = 1 if service.store.startswith("sqlite") else 3
            until, statuses = time.monotonic() + seconds, set[int]()
            while time.monotonic() < until:
                statuses |= {service.http.get(path).status_code for path in asked}
        finally:
            over.set()
        for writer in writers:
            writer.result()
    assert statuses <= {200, 404}, statuses
