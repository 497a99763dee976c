"""What a question costs does not grow with the store: counted are steps of SQLite's machine, which no load changes."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.database_data import embedding_double, fill, vectors
from common.embeddings import EmbeddingClient
from common.knobs import Database as DatabaseSettings
from common.settings import Settings
from database import sqlite_database
from database.memory import Memory
from database.mongodb_api import create_app
from database.store import open_store
from tests.database.db_service import body_of

FEW, MANY = 300, 3000
_EVERY = 10
"""Steps between two looks of the counter."""
# Each twice: what is learnt at the first time is part of a start, not of a question.
QUESTIONS = (
    "/elements/by-index/7",
    "/elements/with-score/by-index/7",
    "/elements/by-name/delta_net_6",
    "/elements/sample",
    "/elements/top-k/10",
    "/elements/sample-range/11/50/4",
    "/elements/7/path",
    "/elements/roots",
    "/elements/context/1",
    "/elements/context/{leaf}",
    "/elements/{leaf}/children",
    "/elements/uct-select",
    "/elements/search-similar?motivation=vector%207&top_k=5",
    "/candidates/all",
    "/candidates/stats",
    "/candidates/sample-range/1/10/1",
    "/candidates/sample-range/11/50/4",
    "/stats",
    "/health",
    "/v2/elements?after=50&limit=20",
    "/v2/elements?after=50&limit=5&unscored=true",
    "/v2/events?after=50&limit=20",
    "/v2/stats",
)


class Steps:
    """How many steps all connections took so far."""

    def __init__(self) -> None:
        self.taken = 0

    def connect(self, *args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = sqlite3.connect(*args, **kwargs)
        connection.set_progress_handler(self._some, _EVERY)
        return connection

    def _some(self) -> int:
        self.taken += _EVERY
        return 0


class Counted:
    """`sqlite3` as the store sees it."""

    def __init__(self, steps: Steps) -> None:
        self.connect = steps.connect

    def __getattr__(self, name: str) -> Any:
        return getattr(sqlite3, name)


def costs(size: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Steps of each question, and of an insert, over a store of `size` elements."""
    settings = DatabaseSettings(store=f"sqlite:///{folder}/{size}.sqlite")
    fill(settings, size, small=True)
    steps, double = Steps(), embedding_double(vectors(size))
    with (
        monkeypatch.context() as patched,
        EmbeddingClient(Settings.model_validate({"services": {"embedding_url": double.url}})) as embedder,
    ):
        patched.setattr(sqlite_database, "sqlite3", Counted(steps))
        memory = Memory(open_store(settings), embedder, settings)  # not started: nothing else takes steps
        leaf = memory.store.read(lambda session: session.oldest_leaf())
        found = asyncio.run(_asked(memory, steps, str(leaf)))
        memory.close()
    double.close()
    return found


async def _asked(memory: Memory, steps: Steps, leaf: str) -> dict[str, int]:
    transport = httpx.ASGITransport(create_app(memory, 1, threading.Event()))
    found: dict[str, int] = {}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
        for path in QUESTIONS:
            for _ in range(2):
                before = steps.taken
                answer = await client.get(path.format(leaf=leaf))
                assert answer.status_code == 200, (path, answer.text)
                found[path] = steps.taken - before
        for number in range(2):
            before = steps.taken
            body = body_of(f"new {number}", 7, motivation="vector 3 again")
            assert (await client.post("/elements", json=body)).status_code == 200
            found["POST /elements"] = steps.taken - before
    return found


def test_ten_times_the_elements_cost_a_question_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (costs(size, tmp_path, monkeypatch) for size in (FEW, MANY))
    grown = {path: (few[path], many[path]) for path in few if many[path] > 1.5 * few[path] + 200}
    assert not grown, f"steps at {FEW} and {MANY} elements: {grown}"
    assert many["/elements/by-index/7"] > 0, "steps are counted"
