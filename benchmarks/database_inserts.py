"""Durable inserts a second over HTTP, from 8 clients, and what the disk allows in the same run."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import statistics
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

from benchmarks.database_data import element_of

_CLIENTS = 8
_BODIES = 20
_WANTED = 1000.0


@dataclass(frozen=True)
class Inserts:
    """Acknowledged inserts a second; milliseconds of one, and of the server's CPU, and of an fsync of 20 KB; the rate
    asked for."""

    rate: float
    p50: float
    p99: float
    cpu_ms: float
    fsync_ms: float
    limit: float

    def shown(self, limited: bool) -> str:
        mark = "!" if limited and self.rate < self.limit else ""
        return f"{self.rate:,.0f}{mark} ({self.p50:.0f} / {self.p99:.0f} ms) {self.cpu_ms:.2f} cpu"

    def limit_shown(self) -> str:
        """Which of the two limits applies, and why."""
        disk = f"0.6 x {_CLIENTS} / fsync of {self.fsync_ms:.2f} ms = {_disk_limit(self.fsync_ms / 1000):,.0f}"
        if self.limit < _WANTED:
            return f"{self.rate:,.0f} a second; the limit is {disk}, less than {_WANTED:,.0f}"
        return f"{self.rate:,.0f} a second; the limit is {_WANTED:,.0f}, less than {disk}"


def _disk_limit(fsync: float) -> float:
    """What is asked for of a disk that takes so many seconds for an fsync."""
    return 0.6 * _CLIENTS / fsync


def cpu_seconds(process: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_inserts(url: str, server: int, folder: Path, seconds: float) -> Inserts:
    """8 processes insert elements of 20 KB for `seconds`; the disk is measured before and after."""
    context = multiprocessing.get_context("fork")
    host, port = url.removeprefix("http://").split(":")
    go = context.Event()
    with context.Manager() as manager:
        times = manager.list()
        clients = [
            context.Process(target=_insert, args=(host, int(port), number, seconds, go, times))
            for number in range(_CLIENTS)
        ]
        fsyncs = _fsync_times(folder)
        for client in clients:
            client.start()
        time.sleep(0.5)
        used = cpu_seconds(server)
        go.set()
        for client in clients:
            client.join()
        used = cpu_seconds(server) - used
        fsyncs += _fsync_times(folder)
        found = sorted(spent for each in times for spent in each)
    fsync = statistics.median(fsyncs)
    return Inserts(
        rate=len(found) / seconds,
        p50=1000 * found[len(found) // 2],
        p99=1000 * found[int(0.99 * len(found))],
        cpu_ms=1000 * used / len(found),
        fsync_ms=1000 * fsync,
        limit=min(_WANTED, _disk_limit(fsync)),
    )


def _insert(host: str, port: int, number: int, seconds: float, go: Event, times: list[list[float]]) -> None:
    """One client on one connection. Its requests are made before, so that it costs the machine next to nothing."""
    rng = random.Random(number)
    requests = []
    for position in range(_BODIES):
        body = element_of(1000 * number + position, None, rng).model_dump_json().encode()
        head = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        requests.append(f"POST /elements HTTP/1.1\r\n{head}".encode() + body)
    spent = []
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        go.wait()
        end = time.perf_counter() + seconds
        position = 0
        while (began := time.perf_counter()) < end:
            connection.sendall(requests[position % _BODIES])
            _acknowledged(connection)
            spent.append(time.perf_counter() - began)
            position += 1
    times.append(spent)


def _acknowledged(connection: socket.socket) -> None:
    """Reads one answer, which must say that the element is stored."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    assert head.startswith(b"HTTP/1.1 200") and b'"index"' in body, (head, body[:500])


def _fsync_times(folder: Path) -> list[float]:
    times = []
    with (folder / "fsync").open("wb", buffering=0) as handle:
        for _ in range(100):
            handle.write(b"x" * 20_000)
            began = time.perf_counter()
            os.fsync(handle.fileno())
            times.append(time.perf_counter() - began)
    (folder / "fsync").unlink()
    return times
