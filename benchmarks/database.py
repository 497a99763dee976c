"""Speed of the architecture database over HTTP, at several sizes side by side, against reading everything.

    .venv/bin/python benchmarks/database.py                                      # SQLite at 1k, 10k, 100k elements
    .venv/bin/python benchmarks/database.py --sizes 1000 --requests 30 --seconds 2       # a quick look
    .venv/bin/python benchmarks/database.py --stores sqlite mongodb --sizes 1000 10000   # MongoDB-wire beside it

Elements have 20 KB, or 2 with --small; their vectors are seeded numbers, so nothing is embedded. Each question is asked
of a real server process; the ratio is that of a full scan of the same store to the median answer. mongodb is the server
that ASI_TEST_MONGODB_URL names, or a SecantusDB that runs meanwhile.
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
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

import faiss
import numpy as np
import pymongo

from benchmarks.database_data import embedding_double, fill, vectors
from benchmarks.database_inserts import Inserts, cpu_seconds, measure_inserts
from benchmarks.database_naive import Naive
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
LIMITS = {
    "sample candidates": 10, "sample parent": 10, "sample element": 10, "by index": 5, "top 10": 20, "context": 10,
    "children": 10, "path": 10, "uct select": 20, "similar": 5,
}  # fmt: skip
"""Milliseconds at the 99th percentile; of similar: beyond bare FAISS. uct select may take 150 at 100,000."""


@dataclass(frozen=True)
class Answer:
    """Milliseconds of one question, those of the server's CPU, and how many times its median a full scan takes."""

    question: str
    p50: float
    p99: float
    cpu_ms: float
    ratio: float
    limit: float | None
    note: str = ""
    times: int = 0
    """How often it was asked."""


@dataclass
class Report:
    """One store at one size."""

    store: str
    size: int
    document_bytes: float
    start_seconds: float
    counted_seconds: float
    """Until the numbers of elements are known as well."""
    first_search_seconds: float
    rss_mb: float
    vector_mb: float
    bare: tuple[float, float] | None = None
    """p50 and p99 in milliseconds of the driver's own find of one document by its index, where there is a server."""
    inserts: Inserts | None = None
    answers: list[Answer] = field(default_factory=list)


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
    questions: list[tuple[str, str, str, list[int] | None]] = [
        ("nothing (GET /)", "/", "nothing", None),
        ("sample candidates", "/candidates/sample-range/11/50/4", "nothing", None),
        ("sample parent", "/candidates/sample-range/1/10/1", "nothing", None),
        ("sample element", "/elements/sample", "nothing", None),
        ("by index", "/elements/by-index/{}", "by_index", some),
        ("top 10", "/elements/top-k/10", "top_k", None),
        ("context", "/elements/context/{}", "context", some),
        ("children", "/elements/{}/children", "children", small),
        ("path", "/elements/{}/path", "path", some),
        ("uct select", "/elements/uct-select", "uct_select", None),
        ("stats", "/stats", "nothing", None),
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
        seconds, expected = naive.timed(question, *arguments)
        if expected:
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


def answer_of(name: str, times: list[float], cpu: float, scan: float, limit: float | None, note: str = "") -> Answer:
    middle = statistics.median(times)
    return Answer(name, middle, p99(times), cpu, 1000 * scan / middle, limit, note, len(times))


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


def show(reports: list[Report]) -> str:
    """One row a question, the sizes side by side: p50 / p99 and CPU in ms, ratio of a full scan to p50."""
    lines = []
    for store in dict.fromkeys(report.store for report in reports):
        ours = [report for report in reports if report.store == store]
        # A MongoDB-wire server is shown for what it is; what is promised holds for the default store.
        limited = store == "SQLite"
        lines.append(
            f"\n{store}: p50 / p99 in ms, CPU of the server in ms (how much longer a full scan takes); limit in ms"
        )
        heads = "".join(f"{report.size:>36,}" for report in ours)
        lines.append(f"{'':20}{heads}")
        for position, answer in enumerate(ours[0].answers):
            cells = ""
            for report in ours:
                one = report.answers[position]
                mark = "!" if limited and one.limit is not None and one.p99 > one.limit else " "
                cells += f"{f'{one.p50:.1f} / {one.p99:.1f}{mark} {one.cpu_ms:.1f} ({one.ratio:,.0f}x)':>36}"
            limit = ours[-1].answers[position].limit if limited else None
            lines.append(f"{answer.question:20}{cells}   {'' if limit is None else f'{limit:.0f}'}")
        rows: list[tuple[str, Callable[[Report], str]]] = [
            ("inserts/s, 8 clients", lambda r: "" if r.inserts is None else r.inserts.shown(r.store == "SQLite")),
            ("start, s", lambda r: f"{r.start_seconds:.1f}, first search {r.first_search_seconds:.1f}"),
            ("memory, MB", lambda r: f"{r.rss_mb:.0f}, of it vectors {r.vector_mb:.0f}"),
            ("bytes an element", lambda r: f"{r.document_bytes:,.0f}"),
        ]
        if not limited:
            rows += [
                ("counted after, s", lambda r: f"{r.counted_seconds:.1f}"),
                ("bare find_one, ms", lambda r: "" if r.bare is None else f"{r.bare[0]:.1f} / {r.bare[1]:.1f}"),
            ]
        for name, cell in rows:
            lines.append(f"{name:20}" + "".join(f"{cell(report):>36}" for report in ours))
        for report in ours:
            seldom = [f"{one.question} {one.times}" for one in report.answers if one.times < 100]
            if seldom:
                lines.append(
                    f"at {report.size:,} asked fewer than 100 times, so that p99 is the worst: {', '.join(seldom)}"
                )
            lines.append(f"similar at {report.size:,}: {report.answers[-1].note}")
            if report.inserts is not None and limited:
                lines.append(f"inserts at {report.size:,}: {report.inserts.limit_shown()}")
    return "\n".join(lines)


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
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
