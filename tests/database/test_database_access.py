"""Who may ask what: keys, addresses, web pages, body sizes, requests a minute; and what the log and the metrics say."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.responses import PlainTextResponse

from common.embeddings import EmbeddingClient
from common.errors import ServiceError
from common.knobs import Database as DatabaseSettings
from common.settings import Settings
from database.access import Access, Keys
from database.client import DatabaseClient
from database.memory import Memory
from database.mongodb_api import create_app, main
from database.store import Session, open_store
from tests.database.db_service import EmbeddingDouble, Service, body_of, element_of

WRITE, READ = "write-key-of-this-test", "read-key-of-this-test"
ERROR = ["success", "message", "detail"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(embedding: EmbeddingDouble, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server with both keys, 1 MB bodies, one named origin, and a JSON log."""
    folder = tmp_path_factory.mktemp("guarded")
    settings = {
        "API_KEY": WRITE,
        "READ_KEY": READ,
        "MAX_BODY_MB": "1",
        "CORS_ORIGINS": '["https://dashboard.example"]',
        "LOG_FORMAT": "json",
    }
    env = {f"ASI_DATABASE__{name}": value for name, value in settings.items()}
    service = Service(f"sqlite:///{folder}/a.sqlite", embedding.url, folder / "log", env=env)
    yield service
    assert service.stop() == 0


def refused(answer: httpx.Response, status: int, word: str) -> None:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ERROR and word in answer.json()["detail"]
    assert WRITE not in answer.text and READ not in answer.text


def test_keys_open_what_they_are_for(guarded: Service) -> None:
    http = guarded.http
    for headers in (
        {},
        bearer("wrong"),
        bearer("x " + WRITE),
        {"Authorization": f"Basic {WRITE}"},
        {"Authorization": WRITE},
    ):
        for method, path in (("GET", "/elements/top-k/1"), ("POST", "/elements"), ("GET", "/metrics"), ("GET", "/x")):
            answer = http.request(method, path, headers=headers)
            refused(answer, 401, "Bearer")
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert http.get(path).status_code == 200, path
    assert http.get("/elements/top-k/1", headers=bearer(READ)).json() == []
    refused(http.post("/elements", json=body_of("x"), headers=bearer(READ)), 403, "only reads")
    refused(http.delete("/elements/all", headers=bearer(READ)), 403, "only reads")
    assert http.post("/elements", json=body_of("x"), headers=bearer(WRITE)).status_code == 200
    with DatabaseClient(guarded.url, api_key=WRITE) as client:
        assert client.add_element(element_of(5, None), "k") == 2
    with DatabaseClient(guarded.url, api_key=READ) as reader, pytest.raises(ServiceError) as caught:
        reader.add_element(element_of(6, None), "l")
    assert caught.value.status == 403 and "api_key" in caught.value.fix


def test_a_large_body_is_refused_however_it_is_sent(guarded: Service) -> None:
    body = json.dumps(body_of("x", log="x" * 1_100_000)).encode()
    json_body = {"content-type": "application/json"}
    for content in (body, iter([body[:600_000], body[600_000:]])):
        answer = guarded.http.post("/elements", content=content, headers=bearer(WRITE) | json_body)
        assert answer.status_code == 413 and list(answer.json()) == ERROR, answer.text
        assert answer.json()["detail"]
    assert (
        guarded.http.post("/elements", json=body_of("x", log="x" * 900_000), headers=bearer(WRITE)).status_code == 200
    )


def test_web_pages_of_other_origins_may_not_write(guarded: Service, service: Service) -> None:
    evil = {"Origin": "https://evil.example"}
    refused(guarded.http.post("/elements/clean-invalid", headers=bearer(WRITE) | evil), 403, "evil.example")
    # Without a key this is what protects a database on a developer's machine.
    refused(service.http.post("/elements/clean-invalid", headers=evil), 403, "cors_origins")
    rebound = {"Origin": "http://evil.example:8001", "Host": "evil.example:8001"}
    refused(service.http.post("/elements/clean-invalid", headers=rebound), 403, "evil.example")
    assert service.http.post("/elements/clean-invalid", headers={"Origin": service.url}).status_code == 200
    assert "access-control-allow-origin" not in service.http.get("/health", headers=evil).headers
    asked = {"Access-Control-Request-Method": "POST"}
    assert service.http.options("/elements", headers=evil | asked).status_code in (403, 405)
    named = {"Origin": "https://dashboard.example"}
    allowed = guarded.http.options("/elements", headers=named | asked)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == named["Origin"]
    assert guarded.http.post("/elements/clean-invalid", headers=bearer(WRITE) | named).status_code == 200
    assert guarded.http.options("/elements", headers=evil | asked).status_code == 400


def asked_for(service: Service, host: str, path: str = "/v2/export", method: str = "GET") -> httpx.Response:
    return service.http.request(method, path, headers={"Host": host})


def test_without_keys_a_name_that_was_made_to_point_here_reads_nothing(guarded: Service, service: Service) -> None:
    """DNS rebinding: to the browser the page of evil.example is of this server's own origin."""
    port = urlsplit(service.url).port
    for host in (f"evil.example:{port}", "localhost.evil.example", "notlocalhost", "192.168.1.7", "[", ""):
        refused(asked_for(service, host), 403, "cors_origins")
        refused(asked_for(service, host, "/elements/clean-invalid", "POST"), 403, "database.api_key")
    for host in (
        "localhost",
        f"localhost:{port}",
        f"LOCALHOST:{port}",
        "a.localhost",
        f"127.0.0.1:{port}",
        "[::1]:8001",
    ):
        assert asked_for(service, host).status_code == 200, host
    # Whoever has the key is no page of somebody else.
    assert guarded.http.get("/stats", headers=bearer(READ) | {"Host": "database.example"}).status_code == 200
    with socket.create_connection((urlsplit(service.url).hostname, port), 10) as connection:
        connection.sendall(b"GET /elements/top-k/1 HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200"), "without a Host no browser asks"


def test_without_keys_the_host_of_a_named_origin_is_answered() -> None:
    app = Access(PlainTextResponse("found"), Keys(None, None), ["https://dashboard.example"])

    async def statuses(*hosts: str) -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            return [(await http.get("/stats", headers={"Host": host})).status_code for host in hosts]

    hosts = ["dashboard.example", "Dashboard.example:8001", "evil.example", "x.dashboard.example"]
    assert asyncio.run(statuses(*hosts)) == [200, 200, 403, 403]


def test_a_named_page_may_go_on_with_a_stream_and_sees_what_is_pending(guarded: Service) -> None:
    page = {"Origin": "https://dashboard.example"}
    wanted = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "last-event-id"}
    assert guarded.http.options("/v2/events/stream", headers=page | wanted).status_code == 200
    shown = guarded.http.get("/elements/search-similar?motivation=x", headers=page | bearer(READ))
    assert "Pending-Embeddings" in shown.headers["access-control-expose-headers"]


def test_requests_a_minute_are_counted_by_key(start: Callable[..., Service]) -> None:
    keys = {"ASI_DATABASE__API_KEY": WRITE, "ASI_DATABASE__READ_KEY": READ}
    limited = start(env=keys | {"ASI_DATABASE__RATE_LIMIT": "5"})
    answers = [limited.http.get("/elements/top-k/1", headers=bearer(READ)) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
    refused(answers[-1], 429, "rate_limit")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 61
    assert limited.http.get("/elements/top-k/1", headers=bearer(WRITE)).status_code == 200, "another key"
    assert [limited.http.get("/stats", headers=bearer("guess")).status_code for _ in range(7)][-1] == 429
    assert limited.http.get("/health").status_code == 200


def test_each_request_is_logged_with_an_id_and_without_secrets(guarded: Service) -> None:
    headers = bearer(WRITE) | {"X-Request-ID": "from-the-client.1"}
    path = "/elements/search-similar?motivation=private&top_k=1"
    assert guarded.http.get(path, headers=headers).headers["x-request-id"] == "from-the-client.1"
    forged = guarded.http.get("/elements/by-name/a%0D%0Aforged", headers=bearer(READ) | {"X-Request-ID": "a b{}"})
    assert re.fullmatch("[0-9a-f]{32}", forged.headers["x-request-id"])
    place = urlsplit(guarded.url)
    with socket.create_connection((place.hostname or "", place.port or 0), timeout=10) as connection:
        connection.sendall(b"no HTTP\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400")
    # A request is logged once its answer is sent, so the client may be first.
    deadline = time.monotonic() + 10
    while forged.headers["x-request-id"] not in guarded.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    lines = [json.loads(line) for line in guarded.log.read_text().splitlines()]
    assert any("Invalid HTTP" in line["message"] for line in lines), "what the server says is in the same form"
    found = {line.get("request_id"): line for line in lines}
    line = found["from-the-client.1"]
    assert (line["method"], line["path"], line["status"], line["role"]) == (
        "GET", "/elements/search-similar", 200, "write",
    )  # fmt: skip
    assert line["milliseconds"] > 0 and line["time"] and line["level"] == "INFO"
    assert found[forged.headers["x-request-id"]]["path"] == "/elements/by-name/a%0D%0Aforged"
    text = guarded.log.read_text()
    assert WRITE not in text and READ not in text and "private" not in text


def test_metrics_count_requests_by_route(guarded: Service) -> None:
    for number in range(3):
        guarded.http.get(f"/elements/by-index/{900 + number}", headers=bearer(READ))
        guarded.http.get(f"/nothing/{number}", headers=bearer(READ))
    series = 'asi_database_requests_total{method="GET",route="/elements/by-index/{index}",status="404"} 3.0'
    deadline, text = time.monotonic() + 10, ""
    while not (series in text and 'route="none",status="404"' in text) and time.monotonic() < deadline:
        text = guarded.http.get("/metrics", headers=bearer(READ)).text  # a request is counted once its answer is sent
    assert series in text, text
    assert "/nothing" not in text and 'route="none",status="404"' in text
    stored = guarded.http.get("/stats", headers=bearer(READ)).json()["total_records"]
    assert f"asi_database_elements {float(stored)}" in text and "process_resident_memory_bytes" in text


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["--host", "0.0.0.0"], {}, "ASI_DATABASE__API_KEY"),
        (["--host", "::"], {"API_KEY": ""}, "ASI_DATABASE__API_KEY"),
        ([], {"API_KEY": "ключ"}, "printable ASCII"),
        ([], {"READ_KEY": "only-reads"}, "api_key"),
    ],
)
def test_a_start_without_the_keys_it_needs_is_refused(
    tmp_path: Path,
    arguments: list[str],
    env: dict[str, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(f"ASI_DATABASE__{name}", value)
    assert main(["--port", "0", "--store", f"sqlite:///{tmp_path}/a.sqlite", *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told and "fix:" in told and "ключ" not in told and "only-reads" not in told
    assert not list(tmp_path.iterdir())


def test_with_a_key_other_machines_are_served(start: Callable[..., Service]) -> None:
    service = start(env={"ASI_DATABASE__HOST": "0.0.0.0", "ASI_DATABASE__API_KEY": WRITE})
    url = service.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/stats", trust_env=False).status_code == 401
    assert httpx.get(f"{url}/stats", headers=bearer(WRITE), trust_env=False).status_code == 200


def test_the_pages_of_the_description_load_nothing_from_elsewhere(service: Service) -> None:
    for path in ("/docs", "/redoc"):
        page = service.http.get(path)
        assert page.status_code == 200 and page.headers["content-security-policy"].startswith("default-src 'self'")
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(loaded) >= 2 and not re.search(r"https?://", page.text.replace("http://www.w3.org", ""))
        for file in loaded:
            answer = service.http.get(file)
            assert answer.status_code == 200 and len(answer.content) > 1000, file
    assert service.http.get("/static-offline-docs/..%2f__init__.py").status_code == 404


def test_ready_means_that_a_write_would_be_taken(service: Service) -> None:
    assert service.get("/ready") == {"status": "ready"}


def test_who_asks_within_a_second_whether_it_is_ready_shares_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DatabaseSettings(store=f"sqlite:///{tmp_path}/a.sqlite", lock_timeout=0.05)
    holder = sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None)
    writes: list[float] = []
    with EmbeddingClient(Settings()) as embedder:
        memory = Memory(open_store(settings), embedder, settings)
        submit = memory.store.submit

        def counted(work: Callable[[Session], Any]) -> Any:
            writes.append(time.monotonic())
            return submit(work)

        monkeypatch.setattr(memory.store, "submit", counted)
        monkeypatch.setattr(memory.store, "write", lambda work: counted(work).result())
        app = create_app(memory, 1, threading.Event())

        async def ask(times: int) -> list[int]:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=30
            ) as client:
                asked = await asyncio.gather(*(client.get("/ready") for _ in range(times)))
                return [answer.status_code for answer in [*asked, await client.get("/ready")]]

        assert asyncio.run(ask(20)) == [200] * 21 and len(writes) == 1
        holder.execute("BEGIN IMMEDIATE")
        time.sleep(1.05)
        assert asyncio.run(ask(20)) == [503] * 21 and len(writes) == 2
        holder.execute("ROLLBACK")
        time.sleep(1.05)
        assert asyncio.run(ask(1)) == [200] * 2 and len(writes) == 3
        memory.close()
    holder.close()
