"""What goes wrong around the server: ports, files, disks, locks. One clear message, nothing half-written."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pymongo
import pytest

from common.errors import StoreError
from common.knobs import Database as DatabaseSettings
from common.process import LISTENING, REPOSITORY
from common.records import Usage
from database.evaluate_agent.score import evidence_of
from database.faiss_manager import VectorIndex
from database.models import NewElement
from database.mongodb_api import main
from database.mongodb_connection import translated
from database.novelty import shingles, sketch
from database.sqlite_database import SqliteStore
from database.store import NewEntry, Session, Store, open_store, without_secrets
from tests.database.db_service import Service, body_of, free_port, hashed_windows, settled


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Runs the command that should not start; returns its exit status and what it said."""
    status = main(arguments)
    said = capsys.readouterr()
    assert said.out == ""
    return status, said.err


def test_a_taken_port_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, said = refused(capsys, "--port", port, "--store", f"sqlite:///{tmp_path}/a.sqlite")
    assert status == 2 and f"127.0.0.1:{port}" in said and "--port" in said
    assert not list(tmp_path.iterdir())


def test_a_mongodb_server_that_is_not_there_is_told_in_short() -> None:
    address = f"127.0.0.1:{free_port()}"
    url = f"mongodb://{address}/x"
    for shown in (url, f"x at {address}"):
        client: pymongo.MongoClient[dict[str, object]] = pymongo.MongoClient(url, serverSelectionTimeoutMS=50)
        with client, pytest.raises(StoreError) as told, translated(shown):
            client.admin.command("hello")
        reason = f"expected a MongoDB server that answers at {address}, got [Errno 111] Connection refused"
        assert told.value.message == reason and "--store" in told.value.fix


def test_a_server_without_stdout_serves(tmp_path: Path) -> None:
    argv = [sys.executable, "database/mongodb_api.py", "--port", "0", "--store", f"sqlite:///{tmp_path}/a.sqlite"]
    server = subprocess.Popen(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *argv], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        said = next(line for line in server.stderr if line.startswith(LISTENING))
        assert httpx.get(f"{said.removeprefix(LISTENING).strip()}/health").status_code == 200
        server.terminate()
        assert "Traceback" not in server.communicate(timeout=30)[1] and server.returncode == 0
    finally:
        server.kill()


@pytest.mark.parametrize("case", ["unwritable", "text", "foreign", "newer", "url", "memory", "folder", "options"])
def test_a_store_that_cannot_be_used_stops_the_start(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.sqlite"
    url, expected = f"sqlite:///{file}", (3, "--store")
    if case == "unwritable":
        file.write_text("")
        url = f"sqlite:///{file}/below/a.sqlite"
    elif case == "folder":
        url, expected = f"sqlite:///{tmp_path}", (3, f"{tmp_path} is a folder")
    elif case == "options":
        url, expected = f"{url}?mode=ro", (2, "question mark")
    elif case == "text":
        file.write_text("this is no database\n" * 100)
    elif case in ("foreign", "newer"):
        with sqlite3.connect(file) as connection:
            connection.execute("CREATE TABLE other (a)")
            if case == "newer":
                connection.execute(f"PRAGMA application_id = {0x41534931}")
                connection.execute("PRAGMA user_version = 99")
    else:
        url, expected = {"url": "postgres://x/y", "memory": "sqlite:///:memory:"}[case], (2, "sqlite:///")
    before = file.read_bytes() if file.exists() else None
    status, said = refused(capsys, "--port", "0", "--store", url)
    assert status == expected[0] and expected[1] in said and "fix:" in said
    assert (file.read_bytes() if file.exists() else None) == before


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("mongo://asi:hush-hush@127.0.0.1:1/x", 2),
        ("mongodb://asi:hush%hush-hush@127.0.0.1:1/x", 3),
        ("mongodb://asi:a/b@hush-hush@127.0.0.1:1/x", 3),
        ("mongodb://asi:hush-hush@127.0.0.1:port/x", 3),
    ],
)
def test_a_password_in_the_url_of_a_store_is_not_told(
    url: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, said = refused(capsys, "--port", "0", "--store", url)
    assert ended == status and "127.0.0.1" in said and "fix:" in said
    assert "hush-hush" not in said and "Traceback" not in said


def test_options_of_a_url_may_be_secrets() -> None:
    assert without_secrets("mongodb://a:1/x?tlsCertificateKeyFilePassword=hush") == "mongodb://a:1/x"
    assert without_secrets("mongodb://u:p?q/r@a:1,b:2/x?authSource=admin") == "mongodb://a:1,b:2/x"
    assert without_secrets("sqlite:////var/a.sqlite") == "sqlite:////var/a.sqlite"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bwrap to make a disk read-only")
@pytest.mark.parametrize("exists", [True, False])
def test_a_read_only_disk_stops_the_start(tmp_path: Path, exists: bool) -> None:
    file = tmp_path / "a.sqlite"
    if exists:
        SqliteStore(str(file)).close()
    argv = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", sys.executable, "database/mongodb_api.py", "--port", "0"]
    ended = subprocess.run(
        [*argv, "--store", f"sqlite:///{file}"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 3 and ended.stdout == ""
    assert str(file) in ended.stderr and "fix: make" in ended.stderr and "Traceback" not in ended.stderr


def test_a_full_disk_refuses_the_write_and_keeps_the_rest(start: Callable[..., Service]) -> None:
    service = start(limit_file_bytes=1_500_000)
    stored = 0
    status = 200
    for _ in range(60):
        answer = service.http.post("/elements", json=body_of(f"n{stored}", log="x" * 60_000))
        status = answer.status_code
        if status != 200:
            assert answer.json()["detail"] and answer.json()["success"] is False
            break
        stored += 1
    assert status == 507 and stored > 3
    assert service.get("/health")["database"]["total_records"] == stored
    assert service.get(f"/elements/by-index/{stored}")["name"] == f"n{stored - 1}"
    service.stop()
    roomy = start()
    assert roomy.get("/health")["database"]["total_records"] == stored
    assert roomy.add("next") == stored + 1


def test_several_processes_share_one_file(start: Callable[..., Service], tmp_path: Path) -> None:
    one, two = start(), start()
    one.add("a", motivation="alpha beta")
    two.post("/candidates/1/add")
    assert [element["index"] for element in one.get("/candidates/all")] == [1], "no process has a set of its own"
    two.add("b", motivation="gamma delta")
    assert one.add("c", motivation="epsilon") == 3
    settled(one)
    assert [element["name"] for element in one.get("/elements/search-similar?motivation=gamma%20delta&top_k=1")] == [
        "b"
    ]
    two.delete("/elements/by-index/2")
    names = [element["name"] for element in one.get("/elements/search-similar?motivation=gamma%20delta")]
    assert sorted(names) == ["a", "c"]
    # One that holds the file is waited for, then the write is refused for now; reading goes on.
    impatient = start(env={"ASI_DATABASE__LOCK_TIMEOUT": "0.3"})
    holder = sqlite3.connect(tmp_path / "database.sqlite", isolation_level=None, timeout=60)
    holder.execute("BEGIN IMMEDIATE")
    assert "another process" in impatient.post("/elements", body_of("d"), 503)["detail"]
    assert impatient.get("/elements/by-index/1")["name"] == "a"
    holder.execute("ROLLBACK")
    holder.close()
    assert one.add("d") == 4


def _insert(store: Store, entry: NewEntry) -> int:
    return store.write(lambda session: session.insert(entry))


def fill(store: Store, motivations: dict[str, str]) -> None:
    """Stores elements with vectors, without the service around it."""
    for name, motivation in motivations.items():
        element = NewElement.model_validate(body_of(name, motivation=motivation))
        entry = NewEntry(
            element=element,
            evidence=evidence_of(element.result.train, element.result.test, None),
            complete=True,
            sketch=sketch(shingles(element.program)),
            windows=np.array(hashed_windows(motivation), dtype=np.float32),
            model="hashed-words",
        )
        _insert(store, entry)


@pytest.mark.parametrize(
    ("damage", "asked"),
    [
        ("UPDATE answers SET body = '{'", lambda session: session.answer("POST /x", "k")),
        ("UPDATE events SET data = '{'", lambda session: session.ledger.events(0, 9)),
        ("UPDATE usage SET body = '{'", lambda session: session.ledger.usage(0, 9)),
        ("UPDATE vectors SET windows = x'00'", lambda session: session.windows(0, 9)),
        ("UPDATE evidence SET evidence = '{'", lambda session: session.evidence(1)),
    ],
    ids=["answer", "event", "usage", "vector", "evidence"],
)
def test_what_is_damaged_beside_an_element_is_an_error_of_the_store(
    tmp_path: Path, damage: str, asked: Callable[[Session], object]
) -> None:
    store = open_store(DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite"))
    fill(store, {"a": "alpha beta"})

    def beside(session: Session) -> None:
        session.put_answer("POST /x", "k", {"message": "m"})
        session.ledger.put_usage([Usage(role="planner", model="m", calls=1)])

    store.write(beside)
    assert store.read(asked)
    with contextlib.closing(sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None)) as connection:
        assert connection.execute(damage).rowcount
    with pytest.raises(StoreError, match="restore a backup"):
        store.read(asked)
    store.close()


@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "garbage", "gone", "older", "newer"])
def test_the_vector_cache_is_disposable(tmp_path: Path, damage: str) -> None:
    store = SqliteStore(str(tmp_path / "a.sqlite"))
    cache = tmp_path / "a.sqlite.faiss"
    fill(store, {"a": "alpha beta"})
    index = VectorIndex(cache)
    store.read(index.stats)
    index.save()
    kept = cache.read_bytes()
    fill(store, {"b": "gamma delta", "c": " ".join(f"word{number}" for number in range(100))})
    store.read(index.stats)
    index.save()
    if damage == "cut":
        cache.write_bytes(cache.read_bytes()[:-20])
    elif damage == "flipped":
        data = bytearray(cache.read_bytes())
        data[-30] ^= 1
        cache.write_bytes(data)
    elif damage == "garbage":
        cache.write_bytes(b"garbage")
    elif damage == "gone":
        cache.unlink()
    elif damage == "older":
        cache.write_bytes(kept)
    elif damage == "newer":
        # A cache that is ahead of its store, as after restoring a backup of the database.
        store.write(lambda session: session.delete([2]))
        fill(store, {"b": "gamma delta"})
    fresh = VectorIndex(cache)
    query = np.array(hashed_windows("gamma delta"), dtype=np.float32)
    found = store.read(lambda session: fresh.search(session, query, 3))
    expected = 4 if damage == "newer" else 2
    assert found[0] == (expected, pytest.approx(1.0, abs=1e-5)) and len(found) == 3
    held = store.read(fresh.stats)
    assert held.vectors - held.orphans == 5 and held.orphans == (1 if damage == "newer" else 0)
    store.close()


@pytest.mark.parametrize("damage", ["flipped", "a folder"])
def test_a_server_starts_over_a_damaged_vector_file(start: Callable[..., Service], tmp_path: Path, damage: str) -> None:
    first, cache = start(), tmp_path / "database.sqlite.faiss"
    for name in ("alpha beta", "gamma delta", "epsilon zeta"):
        first.add(name, motivation=name)
    settled(first)
    assert first.stop() == 0
    whole = cache.read_bytes()
    if damage == "flipped":
        cache.write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])
    else:
        cache.unlink()
        cache.mkdir()
    service = start()
    for name in ("alpha beta", "gamma delta", "epsilon zeta"):
        found = service.get("/elements/search-similar", params={"motivation": name, "top_k": 1})
        assert [element["name"] for element in found] == [name]
    stats = service.get("/faiss/stats")["data"]
    assert (stats["total_vectors"], stats["orphan_vectors"], stats["health_status"]) == (3, 0, "healthy")
    assert service.add("eta theta", motivation="eta theta") == 4
    settled(service)
    assert service.get("/elements/search-similar?motivation=eta%20theta&top_k=1")[0]["index"] == 4
    assert service.stop() == 0
    log = (tmp_path / "server.log").read_text()
    assert f"{cache} is built anew" in log or "the vector cache was not written" in log, "it is told"
    assert "Traceback" not in log
    if cache.is_file():
        assert len(cache.read_bytes()) > len(whole), "and kept again"


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "a.sqlite"))
    fill(store, {"a": "alpha beta"})
    (tmp_path / "a.sqlite.faiss").mkdir()
    index = VectorIndex(tmp_path / "a.sqlite.faiss")
    assert store.read(index.stats).vectors == 1
    index.save()
    store.close()


def test_the_entry_works_from_its_own_folder_and_shows_its_settings() -> None:
    ended = subprocess.run(
        [sys.executable, "mongodb_api.py", "--help"],
        cwd=REPOSITORY / "database",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0 and "--store" in ended.stdout and "candidate set" in ended.stdout
