"""The sizes that a MongoDB server says: no question waits for a slow answer."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pymongo.errors import ExecutionTimeout

from common.knobs import Database as DatabaseSettings
from database.admin import _NoEmbedder
from database.memory import Memory
from database.mongodb_sizes import ServerSizes
from database.routers.system import extended_stats
from database.sqlite_session import SqliteSession
from database.store import Sizes, open_store


def test_a_quick_answer_is_had_at_once_and_kept() -> None:
    asked: list[int] = []

    def ask(milliseconds: int) -> dict[str, Any]:
        asked.append(milliseconds)
        return {"dataSize": 10.0, "storageSize": 20, "collections": 3}

    sizes = ServerSizes(ask)
    for _ in range(3):
        found = sizes.latest()
        assert found is not None and found.said == {"dataSize": 10, "storageSize": 20} and found.at.startswith("20")
    assert len(asked) == 1


def test_nothing_waits_for_a_slow_answer() -> None:
    go = threading.Event()

    def ask(_: int) -> dict[str, Any]:
        assert go.wait(30)
        return {"dataSize": 10}

    sizes = ServerSizes(ask)
    began = time.monotonic()
    assert sizes.latest() is None and time.monotonic() - began < 5
    go.set()
    while sizes.latest() is None:
        assert time.monotonic() - began < 30
    # It took its time, and is not asked again soon.
    go.clear()
    began = time.monotonic()
    for _ in range(100):
        assert sizes.latest() is not None
    assert time.monotonic() - began < 5


def test_a_server_that_gives_up_has_said_nothing() -> None:
    asked: list[int] = []

    def ask(milliseconds: int) -> dict[str, Any]:
        asked.append(milliseconds)
        raise ExecutionTimeout("too long")

    sizes = ServerSizes(ask)
    assert sizes.latest() is None and sizes.latest() is None and len(asked) == 1


def test_a_closed_one_asks_no_more_and_waits_for_the_answer_under_way() -> None:
    asked, go = threading.Event(), threading.Event()

    def ask(_: int) -> dict[str, Any]:
        asked.set()
        assert go.wait(30)
        return {"dataSize": 10}

    sizes = ServerSizes(ask)
    sizes.latest()
    assert asked.is_set()
    threading.Timer(0.1, go.set).start()
    sizes.close()
    found = sizes.latest()
    assert found is not None and found.said == {"dataSize": 10}
    closed = ServerSizes(ask)
    asked.clear()
    closed.close()
    assert closed.latest() is None and not asked.is_set()


def test_the_sizes_and_their_date_are_of_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/database.sqlite"
    store = open_store(DatabaseSettings(store=url))
    sizes, asked = SqliteSession.sizes, 0

    def measured_meanwhile(session: SqliteSession) -> Sizes:
        """As a MongoDB server that answers between one question and the next."""
        nonlocal asked
        asked += 1
        told = sizes(session)
        return replace(told, database=None) if asked == 1 else replace(told, measured_at="2026-01-01 00:00:00")

    monkeypatch.setattr(SqliteSession, "sizes", measured_meanwhile)
    memory = Memory(store, _NoEmbedder(), DatabaseSettings(store=url))
    stats = extended_stats(memory)
    assert (stats.database_size, stats.sizes_measured_at) == (None, None)
    store.close()
