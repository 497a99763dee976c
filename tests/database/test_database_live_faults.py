"""What happens to the file while the server runs: a full disk, no room to write, a file moved away, a damaged one.

Each time: a clear refusal in the one envelope, reading as far as it can go on, nothing acknowledged lost, and all of it
well again once the cause is gone, without a restart.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.database.db_service import BASELINE, Service, body_of, element_of, run_of

WRITES: list[tuple[str, str, Any]] = [
    ("POST", "/elements", body_of("w")),
    ("POST", "/v2/experiments", None),
    ("PUT", "/v2/baselines/cpu-1", BASELINE.model_dump()),
    ("POST", "/candidates/2/add", None),
    ("POST", "/repair", None),
    ("DELETE", "/elements/by-index/1", None),
]


def add_five(service: Service) -> None:
    """Five elements of 100 KB; returns when they are settled."""
    for number in range(1, 6):
        service.add(f"n{number}", log=f"{number}" * 100_000)
    deadline = time.monotonic() + 60
    while service.client.stats()["unscored"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def filled(start: Callable[..., Service], tmp_path: Path) -> Iterator[Service]:
    """A server with five settled elements of 100 KB; its log must show no fault of the server's own."""
    service = start()
    add_five(service)
    yield service
    assert service.stop() == 0
    log = (tmp_path / "server.log").read_text()
    assert "Traceback" not in log, log[-3000:]


def refuses_writes(service: Service, status: int, word: str) -> None:
    """Every write is refused with `status`, and none of it happened."""
    element = element_of(9, None)
    experiment = {
        "idempotency_key": "nine",
        "element": element.model_dump(),
        "run": run_of(element, 4.0, 0.5).model_dump(),
    }
    for method, path, body in WRITES:
        answer = service.http.request(method, path, json=experiment if path == "/v2/experiments" else body)
        assert answer.status_code == status, (method, path, answer.text)
        found = answer.json()
        assert found["success"] is False and word in found["detail"] and "fix:" in found["detail"], found
    refused = service.http.get("/ready")
    assert refused.status_code == status and refused.json()["success"] is False


def holds(service: Service, count: int) -> None:
    """All that was acknowledged is there, whole."""
    assert service.get("/health")["database"]["total_records"] == count
    for number in range(1, 6):
        element = service.get(f"/elements/by-index/{number}")
        assert (element["name"], element["log"]) == (f"n{number}", f"{number}" * 100_000)


def test_a_disk_that_takes_nothing_more_is_told_until_it_does(filled: Service) -> None:
    # A limit on file size is how a full disk looks to a write, without filling one.
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(filled.process.pid, resource.RLIMIT_FSIZE, (0, unlimited))
    refuses_writes(filled, 507, "free disk space")
    holds(filled, 5)
    assert filled.get("/elements/search-similar?motivation=n3&top_k=1")[0]["name"]
    resource.prlimit(filled.process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
    # What became of the write before is told for a second.
    time.sleep(1.0)
    assert filled.get("/ready") == {"status": "ready"}
    assert filled.add("next") == 6
    holds(filled, 6)


def full_disk(start: Callable[..., Service]) -> tuple[Service, int, Path]:
    """A server with five settled elements on a file system of 3 MB, on which another program has taken all that was
    free; the server's process, and the disk."""
    small = ["bwrap", "--dev-bind", "/", "/", "--size", "3000000", "--tmpfs", "/mnt", "--die-with-parent"]
    for _ in range(5):
        service = start(store="sqlite:////mnt/database.sqlite", within=small)
        (server,) = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
        disk = Path(f"/proc/{server}/root/mnt")
        add_five(service)
        fill(disk)
        assert os.statvfs(disk).f_bavail == 0
        if service.http.post("/elements", json=body_of("w")).status_code == 507:
            return service, int(server), disk
        # All of its log was copied a moment ago: it begins anew, and has room for a small write.
        service.kill()
    raise AssertionError("each time the log was copied at this moment")


def fill(disk: Path) -> None:
    with (disk / "other").open("wb", buffering=0) as other, pytest.raises(OSError, match="No space left"):
        while True:
            other.write(b"x" * 4096)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bwrap to make a small disk")
def test_a_disk_that_is_really_full_is_told_until_it_is_not(start: Callable[..., Service], tmp_path: Path) -> None:
    service, server, disk = full_disk(start)
    refuses_writes(service, 507, "free disk space")
    holds(service, 5)
    assert service.get("/elements/search-similar?motivation=n3&top_k=1")[0]["name"]
    (disk / "other").unlink()
    time.sleep(1.0)  # as above
    assert service.get("/ready") == {"status": "ready"}
    assert service.add("next") == 6
    holds(service, 6)
    # It is full again at the end, when the vectors would be cached.
    fill(disk)
    os.kill(server, signal.SIGTERM)
    assert service.process.wait(30) == 0
    log = (tmp_path / "server.log").read_text()
    assert "Traceback" not in log, log[-3000:]


def test_a_file_that_is_moved_away_is_missed_until_it_is_back(filled: Service, tmp_path: Path) -> None:
    file, away = tmp_path / "database.sqlite", tmp_path / "away.sqlite"
    file.rename(away)
    refuses_writes(filled, 503, "moved, removed or replaced")
    assert not file.exists(), "no new file in its place"
    away.rename(file)
    assert filled.add("next") == 6
    holds(filled, 6)


def test_a_damaged_file_is_an_error_and_never_a_wrong_answer(filled: Service, tmp_path: Path) -> None:
    file = tmp_path / "database.sqlite"
    filled.client.put_baseline(BASELINE)
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    whole = file.read_bytes()
    # The logs are what most pages of the file hold; the rest, and the schema, stay.
    damaged = bytearray(whole)
    for start in range(0, len(whole), 4096):
        if whole[start + 100 : start + 200] in {str(number).encode() * 100 for number in range(1, 6)}:
            damaged[start : start + 4096] = b"\xff" * 4096
    assert damaged != whole
    file.write_bytes(damaged)
    for path in ("by-index/2", "with-score/by-index/4", "top-k/5"):
        assert "backup" in filled.get(f"/elements/{path}", 503)["detail"]
    # The baseline is told before the first page of elements fails: what a client has is no whole answer.
    with pytest.raises(httpx.RemoteProtocolError):
        filled.http.get("/v2/export")
    assert filled.get("/health")["status"] == "healthy", "what is not damaged is answered"
    file.write_bytes(whole)
    holds(filled, 5)
    assert filled.add("next") == 6
    holds(filled, 6)
