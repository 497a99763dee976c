"""Real servers for the database tests."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest

from tests.database.db_service import RETRY_SECONDS, EmbeddingDouble, Service, mongodb_server


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A MongoDB-wire server: its URL."""
    with mongodb_server() as url:
        yield url


@pytest.fixture
def place(server: str) -> Iterator[tuple[str, pymongo.database.Database[dict[str, Any]]]]:
    """A fresh database: (its URL, the database as another program sees it)."""
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(server)
    name = f"test_{uuid.uuid4().hex}"
    yield f"{server}/{name}", client[name]
    client.close()


@pytest.fixture(scope="session")
def embedding() -> Iterator[EmbeddingDouble]:
    double = EmbeddingDouble()
    yield double
    double.close()


@pytest.fixture(scope="session", params=["sqlite", pytest.param("mongodb", marks=pytest.mark.services)])
def shared_service(
    request: pytest.FixtureRequest, embedding: EmbeddingDouble, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """One server for many tests, over each store; MongoDB with `-m services`."""
    folder = tmp_path_factory.mktemp("database")
    small = {"COLD_START": "4", "UPDATE_BATCH": "2", "CANDIDATE_CAPACITY": "5", "RETRY_SECONDS": f"{RETRY_SECONDS}"}
    with contextlib.ExitStack() as stack:
        store = f"sqlite:///{folder}/database.sqlite"
        if request.param == "mongodb":
            store = f"{stack.enter_context(mongodb_server())}/test_{uuid.uuid4().hex}"
        env = {f"ASI_DATABASE__{name}": value for name, value in small.items()}
        service = Service(store, embedding.url, folder / "log", env=env)
        yield service
        assert service.stop() == 0
    log = (folder / "log").read_text()
    at = log.find("Traceback")
    assert at < 0, log[max(0, at - 2000) : at + 8000]


@pytest.fixture
def service(shared_service: Service, embedding: EmbeddingDouble) -> Service:
    """A running server over an empty store: capacity 5, cold start 4, batch 2."""
    embedding.broken = False
    shared_service.delete("/elements/all")
    # The server asks nothing for a while after a failure that an earlier test told the double to have.
    time.sleep(max(0.0, embedding.failed_at + RETRY_SECONDS + 0.1 - time.monotonic()))
    return shared_service


@pytest.fixture
def start(embedding: EmbeddingDouble, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts servers over tmp_path/database.sqlite; ends those that still run."""
    started: list[Service] = []

    def begin(**kwargs: Any) -> Service:
        service = Service(
            kwargs.pop("store", f"sqlite:///{tmp_path}/database.sqlite"),
            kwargs.pop("embedding_url", embedding.url),
            tmp_path / "server.log",
            **kwargs,
        )
        started.append(service)
        return service

    yield begin
    for service in started:
        if service.process.poll() is None:
            service.kill()
