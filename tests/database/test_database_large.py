"""Large answers: exact, made by few threads of their own, and in no memory while their clients read slowly."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.database.db_service import KEYS, Service, body_of, settled

MANY = 24
SLOW = 20
LISTS = ("/elements/top-k/100", "/elements/by-name/n", "/elements/roots", "/elements/sample-range/1/100/100")


@pytest.fixture
def filled(start: Callable[..., Service]) -> Service:
    """24 elements of 400 KB."""
    service = start()
    lines = [json.dumps(body_of("n", log=f"{number} \u00e9\n" * 66_000)) for number in range(MANY)]
    assert service.http.post("/v2/import", content="\n".join(lines)).json()["data"]["stored"] == MANY
    settled(service)
    return service


def memory(service: Service) -> int:
    """Megabytes that the server holds now."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) // 1024


def test_a_large_list_is_what_is_stored(filled: Service, tmp_path: Path) -> None:
    alone = [filled.get(f"/elements/by-index/{index}") for index in range(1, MANY + 1)]
    page: dict[str, Any] = filled.get("/v2/elements?limit=23")
    assert page["next"] == 23 and [list(element) for element in page["elements"]] == [[*KEYS, "score"]] * 23
    assert [{name: element[name] for name in KEYS} for element in page["elements"]] == alone[:23]

    def holds() -> None:
        for path in LISTS:
            answer = filled.http.get(path)
            assert answer.json() == alone, path
            assert answer.content == json.dumps(alone, ensure_ascii=False, separators=(",", ":")).encode(), path
            assert filled.http.head(path).headers["content-length"] == f"{len(answer.content)}"

    holds()
    # Where no temporary file can be written it is in memory.
    _, most = resource.prlimit(filled.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(filled.process.pid, resource.RLIMIT_FSIZE, (0, most))
    holds()
    resource.prlimit(filled.process.pid, resource.RLIMIT_FSIZE, (most, most))
    # What is damaged is no half answer.
    with contextlib.closing(sqlite3.connect(tmp_path / "database.sqlite")) as opened:
        opened.execute("UPDATE documents SET body = '{' WHERE idx = 20")
        opened.commit()
    for path in LISTS:
        assert "element 20 cannot be read" in filled.get(path, 503)["detail"]


def test_slow_readers_of_large_answers_take_no_memory_and_hold_nobody_up(filled: Service, tmp_path: Path) -> None:
    filled.http.get(LISTS[0])
    before = memory(filled)
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW):
            reader = stack.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((urlsplit(filled.url).hostname, urlsplit(filled.url).port))
            reader.sendall(f"GET {LISTS[0]} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        began, grown = time.monotonic(), 0
        while time.monotonic() < began + 2:
            asked = time.monotonic()
            filled.get("/elements/top-k/1")
            assert time.monotonic() < asked + 1.5
            grown = max(grown, memory(filled) - before)
        # Together they are 190 MB.
        assert grown < 60, grown
        assert len(filled.get(LISTS[0])) == MANY
    assert filled.stop() == 0
    assert "Traceback" not in (tmp_path / "server.log").read_text()
