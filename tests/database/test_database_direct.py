"""The short way of a stored result, one write an answer, and the log that is copied beside the writes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from common.embeddings import EmbeddingClient
from common.knobs import Database as DatabaseSettings
from common.settings import Settings
from database import sqlite_checkpoint, sqlite_database
from database.memory import Memory
from database.mongodb_api import create_app
from database.sqlite_database import SqliteStore
from database.store import Session, open_store
from tests.database.db_service import Service, body_of
from tests.database.test_database_writes import entry_of


def test_a_mistake_on_the_short_way_is_an_envelope_and_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite")
    with EmbeddingClient(Settings()) as embedder:
        memory = Memory(open_store(settings), embedder, settings)

        def fails(*_: Any) -> None:
            raise RuntimeError("never seen")

        monkeypatch.setattr(memory, "submit", fails)
        app = create_app(memory, 1, threading.Event())

        async def ask() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                failed = await client.post("/elements", json=body_of("a"), headers={"X-Request-ID": "mine"})
                return [failed, await client.get("/metrics")]

        with caplog.at_level(logging.INFO):
            failed, metrics = asyncio.run(ask())
        memory.close()
    assert failed.status_code == 500 and failed.headers["connection"] == "close"
    assert failed.headers.get_list("x-request-id") == ["mine"]
    assert failed.json() | {"detail": ""} == {
        "success": False,
        "message": "the server made a mistake",
        "detail": "",
    }
    assert "mine" in failed.json()["detail"] and "never seen" not in failed.text
    assert "never seen" in caplog.text, "with its traceback"
    assert 'requests_total{method="POST",route="/elements",status="500"} 1.0' in metrics.text
    with pytest.raises(RuntimeError, match="never seen"):
        asyncio.run(_posted(app))


async def _posted(app: Any) -> None:
    """The server, too, hears of the mistake."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        await client.post("/elements", json=body_of("a"))


def test_the_short_way_refuses_as_every_route_does(start: Callable[..., Service]) -> None:
    service = start(env={"ASI_DATABASE__MAX_BODY_MB": "1", "ASI_DATABASE__CORS_ORIGINS": '["http://page.example"]'})
    longer = body_of("long") | {"log": "x" * (1 << 20)}
    assert service.post("/elements", longer, 413)["success"] is False

    def pieces() -> Any:
        # No length is sent with it.
        yield b'{"name": "'
        for _ in range(40):
            yield b"x" * 32_768

    told = service.http.post("/elements", content=pieces(), headers={"Content-Type": "application/json"})
    assert told.status_code == 413 and told.json()["detail"].startswith("expected a body of at most 1 MiB")
    assert service.http.post("/elements", content=b"[1]").status_code == 422
    assert service.http.post("/elements", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 422
    assert service.http.post("/elements", json=body_of("a", parent=7)).status_code == 400
    foreign = service.http.post("/elements", json=body_of("a"), headers={"Origin": "http://other.example"})
    assert foreign.status_code == 403 and service.get("/stats")["total_records"] == 0
    known = service.http.post("/elements", json=body_of("a"), headers={"Origin": "http://page.example"})
    assert known.status_code == 200 and known.headers["access-control-allow-origin"] == "http://page.example"
    assert known.headers["x-content-type-options"] == "nosniff" and known.headers["x-request-id"]
    assert service.http.request("OPTIONS", "/elements").status_code == 405
    assert service.http.head("/elements").status_code == 405


def test_an_answer_is_one_packet(service: Service) -> None:
    place = urlsplit(service.url)
    with socket.create_connection((place.hostname or "", place.port or 0), timeout=10) as connection:
        for _ in range(20):
            connection.sendall(b"GET /candidates/stats HTTP/1.1\r\nHost: localhost\r\n\r\n")
            first = connection.recv(1 << 16)
            head, _, body = first.partition(b"\r\n\r\n")
            assert body.endswith(b"}") and f"content-length: {len(body)}".encode() in head.lower()


def _in_the_file(file: Path) -> int:
    """Elements that the file holds without its log; 0 as well while it lacks the tables."""
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?immutable=1", uri=True)) as connection:
        tables = connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'elements'").fetchone()[0]
        return int(connection.execute("SELECT COUNT(*) FROM elements").fetchone()[0]) if tables else 0


def test_the_log_is_copied_beside_the_writes_and_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_checkpoint, "LONGEST_LOG", 100)
    monkeypatch.setattr(sqlite_checkpoint, "_EVERY", 0.05)
    file = tmp_path / "a.sqlite"
    store = SqliteStore(str(file))
    entry = entry_of("x" * 20_000)
    written, log = 0, file.with_name("a.sqlite-wal")
    deadline = time.monotonic() + 60
    # A page is 4 KiB: so many elements make many logs of 100 pages.
    while written < 400:
        store.write(lambda session: session.insert(entry))
        written += 1
        time.sleep(0.002)
    assert log.stat().st_size < 400 * 20_000 / 2, "it began anew"
    while _in_the_file(file) < written and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _in_the_file(file) == written, "copied without another write"
    store.close()
    assert not log.exists()


def test_a_log_that_gets_long_at_once_is_copied_beside_the_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 400
    for module in (sqlite_checkpoint, sqlite_database):
        monkeypatch.setattr(module, "LONGEST_LOG", longest)
    monkeypatch.setattr(sqlite_checkpoint, "_EVERY", 60.0)
    log = tmp_path / "a.sqlite-wal"
    store = SqliteStore(str(tmp_path / "a.sqlite"))
    entry = entry_of("x" * 20_000)
    sizes = []
    for _ in range(250):
        store.write(lambda session: session.insert(entry))
        sizes.append(log.stat().st_size)
        time.sleep(0.004)
    assert 2 * longest * 4096 < max(sizes) < 4 * longest * 4096, "else a commit copies it"
    # How often it began anew stands in its head.
    assert int.from_bytes(log.read_bytes()[12:16], "big") >= 2
    store.close()


def test_the_log_begins_anew_though_reads_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sqlite_checkpoint, sqlite_database):
        monkeypatch.setattr(module, "LONGEST_LOG", 50)
    monkeypatch.setattr(sqlite_checkpoint, "_EVERY", 0.03)
    file = tmp_path / "a.sqlite"
    store = SqliteStore(str(file))
    entry = entry_of("x" * 20_000)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            store.read(lambda session: (session.count(), time.sleep(0.01)))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(400):
        store.write(lambda session: session.insert(entry))
        time.sleep(0.004)
    done.set()
    for reader in readers:
        reader.join()
    # What is written is three times as much: each name is in two indexes as well.
    assert file.with_name("a.sqlite-wal").stat().st_size < 3 * 400 * 20_000
    store.close()


def test_a_large_removal_is_done_alone_and_all_at_once(tmp_path: Path) -> None:
    store = open_store(DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite"))
    gone = store.write(lambda session: [session.insert(entry_of("gone")) for _ in range(300)])
    begun, going = threading.Event(), threading.Event()

    def holds(session: Session) -> None:
        begun.set()
        assert going.wait(30)

    def fails(session: Session) -> None:
        session.delete(gone)
        raise ValueError("in its middle")

    first = store.submit(holds)
    assert begun.wait(30)
    # These wait together and so are one group.
    works: list[Callable[[Session], Any]] = [
        lambda session: session.insert(entry_of("before")),
        fails,
        lambda session: session.delete(gone),
        lambda session: session.insert(entry_of("after")),
    ]
    futures = [store.submit(work) for work in works]
    going.set()
    first.result(30)
    assert [futures[0].result(30), futures[3].result(30)] == [301, 302]
    with pytest.raises(ValueError, match="in its middle"):
        futures[1].result(30)
    assert futures[2].result(30) is None
    left = store.read(lambda session: [facts.name for facts in session.facts()])
    assert left == ["before", "after"]
    events = store.read(lambda session: session.ledger.events(0, 1000))
    assert sum(event.kind == "removed" for event in events) == 300
    store.close()


def test_a_log_that_cannot_be_copied_is_told_once_and_copied_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite_checkpoint, "_EVERY", 0.02)
    tries: list[float] = []
    connect = SqliteStore._connect

    def refused(store: SqliteStore, mode: str = "rw") -> sqlite3.Connection:
        if threading.current_thread().name == "checkpoints" and len(tries) < 3:
            tries.append(time.monotonic())
            raise sqlite3.OperationalError("disk I/O error")
        return connect(store, mode)

    monkeypatch.setattr(SqliteStore, "_connect", refused)
    file = tmp_path / "a.sqlite"
    store = SqliteStore(str(file))
    with caplog.at_level(logging.WARNING):
        store.write(lambda session: session.insert(entry_of("a")))
        deadline = time.monotonic() + 60
        while _in_the_file(file) < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert len(tries) == 3 and _in_the_file(file) == 1
    assert caplog.text.count("could not be copied") == 1
    store.close()
