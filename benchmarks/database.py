"""Speed of the architecture database over HTTP, at several sizes side by side, against reading everything.

    .venv/bin/python benchmarks/database.py                                      # SQLite at 1k, 10k, 100k elements
    .venv/bin/python benchmarks/database.py --sizes 1000 --requests 30 --seconds 2       # a quick look
    .venv/bin/python benchmarks/database.py --stores sqlite mongodb --sizes 1000 10000   # MongoDB-wire beside it

Elements have 20 KB, or 2 with --small; their vectors are seeded numbers, so nothing is embedded. Each question is asked
of a real server process; the ratio is that of a full scan of the same store to the median answer. mongodb is the server
that ASI_TEST_MONGODB_URL names, or a SecantusDB that runs meanwhile. A limit that is missed has a "!", and exit code 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

import faiss
import numpy as np
import pymongo

from benchmarks.database_data import embedding_double, fill, vectors
from benchmarks.database_inserts import cpu_seconds, measure_inserts
from benchmarks.database_naive import Naive
from benchmarks.database_report import LIMITS, Answer, Report, show
from common.embeddings import EmbeddingClient
from common.knobs import Database as DatabaseSettings
from common.settings import Settings
from database.mongodb_documents import ELEMENTS, WHOLE
from database.store import VectorRow
from database.vectors import Vectors, approximate
from tests.database.db_service import Service, mongodb_server

_KEPT_SECONDS = 2.0
PATIENCE = 20.0
"""Seconds after which a question is not repeated any more: a store that is slow at one must not take hours."""


class Client:
    """One kept connection."""

    def __init__(self, url: str, process: int) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        self._process = process
        self._last = 0.0

    def cpu(self) -> float:
        """CPU seconds of the server so far."""
        return cpu_seconds(self._process)

    def wait(self, path: str) -> None:
        """Returns when the server does not ask for patience any more."""
        deadline = time.monotonic() + 600
        while True:
            self._connection.request("GET", path)
            answer = self._connection.getresponse()
            answer.read()
            self._last = time.perf_counter()
            if answer.status != 503 or answer.getheader("Retry-After") is None:
                return
            assert time.monotonic() < deadline, path
            time.sleep(0.1)

    def get(self, path: str) -> tuple[float, Any]:
        """Milliseconds until the body is here, and the parsed body."""
        if time.perf_counter() - self._last > _KEPT_SECONDS:
            self._connection.close()
        began = time.perf_counter()
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        body = answer.read()
        self._last = time.perf_counter()
        spent = 1000 * (self._last - began)
        assert answer.status == 200, body[:500]
        return spent, json.loads(body)


def indices_of(answer: Any) -> list[int]:
    if isinstance(answer, dict) and "data" in answer:
        data = answer["data"]
        above = [] if data["grandparent"] is None else [data["grandparent"]]
        return [item["index"] for item in (data["direct_parent"], *data["strongest_siblings"], *above)]
    return [item["index"] for item in (answer if isinstance(answer, list) else [answer])]


def measure(size: int, client: Client, naive: Naive, requests: int) -> list[Answer]:
    """Every question but similar search, each answer checked against the full scan."""
    rng = random.Random(size)
    some = [rng.randint(1, size) for _ in range(requests)]
    small = [index for index in some if len(naive.children(index)) <= 20]
    questions: list[tuple[str, str, str | None, list[int] | None]] = [
        ("nothing (GET /)", "/", None, None),
        ("sample candidates", "/candidates/sample-range/11/50/4", None, None),
        ("sample parent", "/candidates/sample-range/1/10/1", None, None),
        ("sample element", "/elements/sample", None, None),
        ("by index", "/elements/by-index/{}", "by_index", some),
        ("top 10", "/elements/top-k/10", "top_k", None),
        ("context", "/elements/context/{}", "context", some),
        ("children", "/elements/{}/children", "children", small),
        ("path", "/elements/{}/path", "path", some),
        ("uct select", "/elements/uct-select", "uct_select", None),
        ("stats", "/stats", None, None),
    ]
    found = []
    for name, path, question, over in questions:
        times = []
        used = client.cpu()
        until = time.perf_counter() + PATIENCE
        for asked in over or [0] * requests:
            spent, answer = client.get(path.format(asked))
            times.append(spent)
            if time.perf_counter() > until:
                break
        used = 1000 * (client.cpu() - used) / len(times)
        arguments = [asked] if over else [10] if question == "top_k" else []
        seconds = None
        if question is not None:
            seconds, expected = naive.timed(question, *arguments)
            assert indices_of(answer) == expected, (name, indices_of(answer), expected)
        limit = 150 if name == "uct select" and size > 10_000 else LIMITS.get(name)
        found.append(answer_of(name, times, used, seconds, limit))
    return found


def measure_similar(block: np.ndarray, client: Client, naive: Naive, requests: int) -> Answer:
    """Similar search with the query's vector known already, beside bare FAISS on the same vectors."""
    flat = faiss.IndexFlatIP(block.shape[1])
    flat.add(block)
    faiss.omp_set_num_threads(1)
    rng = random.Random(len(block))
    times, bare = [], []
    used = client.cpu()
    until = time.perf_counter() + PATIENCE
    for number in [rng.randrange(len(block)) for _ in range(requests)]:
        if time.perf_counter() > until:
            break
        path = f"/elements/search-similar?top_k=5&motivation={quote(f'vector {number} again')}"
        client.get(path)
        spent, answer = client.get(path)
        times.append(spent)
        began = time.perf_counter()
        _, nearest = flat.search(block[number : number + 1], 5)
        bare.append(1000 * (time.perf_counter() - began))
        assert indices_of(answer) == (nearest[0] + 1).tolist()
    used = 1000 * (client.cpu() - used) / len(times) / 2
    more = [mine - theirs for mine, theirs in zip(times, bare, strict=True)]
    began = time.perf_counter()
    np.argsort(-(block @ block[0]))
    seconds = naive.seconds + time.perf_counter() - began
    note = f"bare FAISS {statistics.median(bare):.1f}, beyond it p50 {statistics.median(more):.1f} p99 {p99(more):.1f}"
    return answer_of("similar", times, used, seconds, LIMITS["similar"] + statistics.median(bare), note)


def answer_of(
    name: str, times: list[float], cpu: float, scan: float | None, limit: float | None, note: str = ""
) -> Answer:
    middle = statistics.median(times)
    ratio = None if scan is None else 1000 * scan / middle
    return Answer(name, middle, p99(times), cpu, ratio, limit, note, len(times))


def p99(times: list[float]) -> float:
    return sorted(times)[min(len(times) - 1, int(0.99 * len(times)))]


@contextlib.contextmanager
def place(store: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(the store's URL, its name in the table)."""
    if store == "sqlite":
        yield f"sqlite:///{folder}/database.sqlite", "SQLite"
        return
    with mongodb_server() as url:
        shown = "MongoDB" if os.environ.get("ASI_TEST_MONGODB_URL") else "SecantusDB"
        yield f"{url}/bench_{uuid.uuid4().hex}", shown


def run(store: str, size: int, requests: int, seconds: float, small: bool, say: Callable[[str], None]) -> Report:
    with tempfile.TemporaryDirectory(prefix="bench-database-") as name, place(store, Path(name)) as (url, shown):
        folder = Path(name)
        settings = DatabaseSettings(store=url)
        block = vectors(size)
        began = time.perf_counter()
        fill(settings, size, small)
        say(f"{shown} {size}: filled in {time.perf_counter() - began:.0f} s")
        double = embedding_double(block)
        env = {"ASI_DATABASE__EXACT_WINDOWS": "1000000000"}
        began = time.perf_counter()
        service = Service(url, double.url, folder / "log", env=env)
        try:
            client = Client(service.url, service.process.pid)
            client.get("/health")
            started = time.perf_counter() - began
            client.wait("/stats")
            counted = time.perf_counter() - began
            length = client.get("/stats")[1]["average_object_size"]
            first, _ = client.get("/elements/search-similar?motivation=vector%200")
            naive = Naive(url)
            report = Report(shown, size, length, started, counted, first / 1000, 0.0, block.nbytes / 1e6)
            report.bare = bare_find(url, size, requests) if store == "mongodb" else None
            report.answers = [
                *measure(size, client, naive, requests),
                measure_similar(block, client, naive, requests),
            ]
            double.broken = True
            report.inserts = measure_inserts(service.url, service.process.pid, folder, seconds)
            report.rss_mb = rss_mb(service.process.pid)
            return report
        finally:
            service.kill()
            double.close()


def bare_find(url: str, size: int, requests: int) -> tuple[float, float]:
    """p50 and p99 in milliseconds of finding one document by its index with the driver alone."""
    rng = random.Random(size)
    times = []
    with pymongo.MongoClient[dict[str, Any]](url) as client:
        elements = client.get_default_database()[ELEMENTS]
        elements.find_one({"index": 1})
        for _ in range(requests):
            began = time.perf_counter()
            found = elements.find_one({"index": rng.randint(1, size)}, WHOLE)
            times.append(1000 * (time.perf_counter() - began))
            assert found is not None
    return statistics.median(times), p99(times)


def rss_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def show_recall(size: int) -> str:
    """What the approximate index finds of what the exact one finds, at a size beyond the threshold."""
    block = vectors(size)
    exact = Vectors()
    exact.add([VectorRow(position + 1, position + 1, block[position : position + 1]) for position in range(size)])
    began = time.perf_counter()
    near = approximate(exact)
    built = time.perf_counter() - began
    times: dict[str, list[float]] = {"exact": [], "approximate": []}
    shared = []
    for number in range(0, size, max(1, size // 100)):
        found = []
        for name, index in (("exact", exact), ("approximate", near)):
            began = time.perf_counter()
            found.append({owner for owner, _ in index.search(block[number : number + 1], 5)})
            times[name].append(1000 * (time.perf_counter() - began))
        shared.append(len(found[0] & found[1]) / len(found[0]))
    medians = ", ".join(f"{name} {statistics.median(spent):.1f} ms" for name, spent in times.items())
    return (
        f"approximate index of {size:,} windows: recall@5 {statistics.mean(shared):.3f}, {medians}, "
        f"{near.lists.nprobe} of {near.lists.nlist} lists, built in {built:.1f} s"
    )


def show_embedding() -> str:
    """The embedding server: a process of its own, started when it is first asked."""
    with EmbeddingClient(Settings()) as client:
        began = time.perf_counter()
        client.start()
        started = time.perf_counter() - began
        client.embed(["warm"])
        texts = [f"{number} " + "gates decay the state by channel and position " * 18 for number in range(24)]
        began = time.perf_counter()
        client.windows(texts)
        rate = len(texts) / (time.perf_counter() - began)
        assert client._process is not None
        memory = rss_mb(client._process.pid)
    return f"embedding server: start {started:.1f} s, {memory:.0f} MB, {rate:.0f} motivations of 150 words a second"


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of the architecture database over HTTP.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--stores", nargs="+", choices=["sqlite", "mongodb"], default=["sqlite"])
    parser.add_argument("--requests", type=int, default=200, help="times each question is asked (default: 200)")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long clients insert (default: 8)")
    parser.add_argument("--small", action="store_true", help="elements of 2 KB instead of 20; inserts are of 20")
    parser.add_argument("--recall", type=int, metavar="WINDOWS", help="also measure the approximate index at this size")
    parser.add_argument("--embedding", action="store_true", help="also measure the embedding server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    reports = [
        run(store, size, arguments.requests, arguments.seconds, arguments.small, say)
        for store in arguments.stores
        for size in arguments.sizes
    ]
    print(show(reports))
    if arguments.recall:
        print(show_recall(arguments.recall))
    if arguments.embedding:
        print(show_embedding())
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n")
    return int(any(report.missed for report in reports))


if __name__ == "__main__":
    raise SystemExit(main())
