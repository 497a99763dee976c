"""The cognition base as a real process over HTTP: every route, every error, hostile input, start and end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cognition_base.client import CognitionClient, Insight
from cognition_base.corpus import FIELDS, SHIPPED
from common.errors import ServiceError
from common.process import REPOSITORY, spawn, terminate
from tests.contract.retriever_contract import HOSTILE
from tests.fixtures_services import clean_environment, running

SCRIPT = str(REPOSITORY / "cognition_base" / "rag_api.py")
PAPERS = ("2006_16236", "2406_06484", "2412_06464", "2210_10340", "2312_00752")
SYMPTOM = "associative recall collapses because old bindings stay in the memory when a key is written again"


class Service:
    def __init__(self, url: str, corpus: Path, index: Path, env: dict[str, str]) -> None:
        self.url, self.corpus, self.index, self.env = url, corpus, index, env
        self.http = httpx.Client(base_url=url, timeout=30, trust_env=False)


@pytest.fixture(scope="module")
def service(embedding_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service over a small corpus of its own."""
    folder = tmp_path_factory.mktemp("cognition")
    corpus, index = folder / "corpus", folder / "index"
    corpus.mkdir()
    for paper in PAPERS:
        shutil.copy(SHIPPED / f"{paper}.json", corpus)
    env = {
        "ASI_SERVICES__EMBEDDING_URL": embedding_url,
        "ASI_COGNITION__CORPUS": str(corpus),
        "ASI_COGNITION__INDEX_DIR": str(index),
    }
    with running([SCRIPT, "--port", "0"], env) as (url, _):
        yield Service(url, corpus, index, env)


def documents(paper: str) -> list[dict[str, str]]:
    entries = json.loads((SHIPPED / f"{paper}.json").read_text(encoding="utf-8"))
    return [{"DESIGN_AI_INSTRUCTIONS": ""} | entry for entry in entries]


def search(service: Service, **body: Any) -> httpx.Response:
    return service.http.post("/search", json=body)


def test_description_health_and_stats(service: Service) -> None:
    root = service.http.get("/")
    assert root.status_code == 200 and {"service", "description", "endpoints"} <= set(root.json())
    stats = service.http.get("/stats").json()
    assert stats == {
        "total_documents": sum(len(documents(paper)) for paper in PAPERS),
        "unique_papers": len(PAPERS),
        "index_name": "cognition_rag",
    }
    health = service.http.get("/health")
    assert health.status_code == 200 and set(health.json()) == {"status", "service", "stats"}
    assert health.json()["status"] == "healthy" and health.json()["stats"] == stats


def test_search_answers_in_the_published_form(service: Service) -> None:
    answer = search(service, query=SYMPTOM, k=3, similarity_threshold=0.5)
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"query", "total_results", "results"}
    assert body["query"] == SYMPTOM and body["total_results"] == len(body["results"]) >= 1
    first = body["results"][0]
    assert set(first) == {"id", "score", "paper_key", *FIELDS}
    assert first["paper_key"] in {"2406_06484", "2412_06464"}
    assert {name: first[name] for name in FIELDS} in [
        {n: d.get(n, "") for n in FIELDS} for d in documents(first["paper_key"])
    ]
    assert all(0.5 <= result["score"] <= 1 for result in body["results"])


def test_k_and_threshold_bound_the_results(service: Service) -> None:
    everything = search(service, query=SYMPTOM, k=50, similarity_threshold=0).json()["results"]
    assert len(everything) == service.http.get("/stats").json()["total_documents"]
    assert len({result["id"] for result in everything}) == len(everything)
    assert search(service, query=SYMPTOM, k=1, similarity_threshold=0.0).json()["results"] == everything[:1]
    assert search(service, query=SYMPTOM, similarity_threshold=1).json()["results"] == []
    default = search(service, query=SYMPTOM).json()["results"]
    assert default == [result for result in everything if result["score"] >= 0.6][:5]


def test_a_paper_is_answered_whole_and_an_unknown_one_is_empty(service: Service) -> None:
    known = service.http.get("/paper/2406_06484").json()
    assert set(known) == {"paper_key", "total_documents", "documents"}
    assert known["total_documents"] == len(known["documents"]) == len(documents("2406_06484"))
    assert known["documents"][0] == {
        "id": "2406_06484_1",
        "paper_key": "2406_06484",
        "DESIGN_AI_INSTRUCTIONS": "",
        **documents("2406_06484")[0],
    }
    unknown = service.http.get("/paper/9999_00000")
    assert unknown.status_code == 200
    assert unknown.json() == {"paper_key": "9999_00000", "total_documents": 0, "documents": []}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"query"',
        b"{}",
        b'{"query": ""}',
        b'{"query": "  \\n"}',
        b'{"query": 7}',
        b'{"query": null}',
        b'{"query": "x", "k": 0}',
        b'{"query": "x", "k": 51}',
        b'{"query": "x", "k": -1}',
        b'{"query": "x", "k": 2.5}',
        b'{"query": "x", "k": "3"}',
        b'{"query": "x", "k": true}',
        b'{"query": "x", "k": null}',
        b'{"query": "x", "similarity_threshold": -0.1}',
        b'{"query": "x", "similarity_threshold": 1.1}',
        b'{"query": "x", "similarity_threshold": NaN}',
        b'{"query": "x", "similarity_threshold": "0.5"}',
        b'{"query": "x", "similarity_threshold": false}',
        b"[" * 50_000,
        b'{"query": "\xff"}',
        json.dumps({"query": "x" * 100_001}).encode(),
    ],
)
def test_a_bad_request_is_400_in_the_one_error_shape(service: Service, body: bytes) -> None:
    answer = service.http.post("/search", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error", "message"} and len(answer.text) < 2000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/search", 405), ("POST", "/stats", 405), ("GET", "/reinit", 405)],
)
def test_unknown_routes_and_methods_have_the_error_shape(service: Service, method: str, path: str, status: int) -> None:
    answer = service.http.request(method, path)
    assert answer.status_code == status and set(answer.json()) == {"error", "message"}


def test_a_huge_body_is_refused(service: Service) -> None:
    answer = service.http.post("/search", content=b'{"query": "' + b"x" * (2 << 20) + b'"}')
    assert answer.status_code == 413 and set(answer.json()) == {"error", "message"}


@pytest.mark.parametrize("query", [*HOSTILE, "attention " * 1000, "a\u0000b", "\ud83d\ude00" * 50])
def test_hostile_queries_are_answered(service: Service, query: str) -> None:
    escaped = json.dumps({"query": query or "x", "similarity_threshold": 0})
    answer = service.http.post("/search", content=escaped.encode("utf-8", "surrogatepass"))
    assert answer.status_code == (200 if query.strip() else 400)


def test_a_lone_surrogate_in_a_query_is_answered(service: Service) -> None:
    answer = service.http.post("/search", content=b'{"query": "recall \\ud800", "similarity_threshold": 0}')
    assert answer.status_code == 200


def test_reinit_reads_the_corpus_again_and_keeps_the_old_one_when_it_is_broken(service: Service) -> None:
    before = service.http.get("/stats").json()
    new = service.corpus / "2305_13048.json"
    shutil.copy(SHIPPED / new.name, new)
    answer = service.http.post("/reinit")
    assert answer.status_code == 200
    assert service.http.get("/stats").json()["unique_papers"] == before["unique_papers"] + 1
    assert service.http.get("/paper/2305_13048").json()["total_documents"] >= 1
    new.write_text('[{"DESIGN_INSIGHT": 5}]')
    broken = service.http.post("/reinit")
    assert broken.status_code == 500 and set(broken.json()) == {"error", "message"}
    assert "2305_13048.json" in broken.json()["message"] and "DESIGN_INSIGHT" in broken.json()["message"]
    assert service.http.get("/paper/2305_13048").json()["total_documents"] >= 1
    assert search(service, query=SYMPTOM).status_code == 200
    new.unlink()
    assert service.http.post("/reinit").status_code == 200
    assert service.http.get("/stats").json() == before


def test_the_client_reads_what_the_service_says(service: Service) -> None:
    with CognitionClient(service.url) as client:
        insights = client.search(SYMPTOM, k=2, threshold=0.5)
        assert insights and all(isinstance(insight, Insight) for insight in insights)
        assert insights[0].DESIGN_INSIGHT.startswith("### DESIGN_INSIGHT")
        assert client.search("lone \ud800 surrogate", threshold=0.0)
        assert client.health()["status"] == "healthy" and client.stats()["index_name"] == "cognition_rag"
        with pytest.raises(ServiceError, match="k to be") as caught:
            client.search("x", k=51)
        assert caught.value.status == 400
    with pytest.raises(ServiceError, match="cannot ask"):
        client.stats()


def test_the_client_says_when_nobody_answers() -> None:
    with CognitionClient("http://127.0.0.1:9", patience=0.2) as client, pytest.raises(ServiceError) as caught:
        client.stats()
    assert "no cognition base" in caught.value.message and "rag_api.py" in caught.value.fix


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_health_is_503_until_the_index_is_ready(service: Service, tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # An embedding server that accepts and never answers keeps the service loading.
        env = service.env | {
            "ASI_SERVICES__EMBEDDING_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "ASI_COGNITION__INDEX_DIR": str(tmp_path),
        }
        process = spawn(
            [sys.executable, SCRIPT, "--port", str(port)], env=clean_environment(env), stdout=subprocess.PIPE
        )
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    health = httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            assert health.status_code == 503 and {"status", "service", "error", "message"} <= set(health.json())
            answer = httpx.post(f"http://127.0.0.1:{port}/search", json={"query": "x"})
            assert answer.status_code == 503 and set(answer.json()) == {"error", "message"}
            with (
                CognitionClient(f"http://127.0.0.1:{port}", patience=0.3) as client,
                pytest.raises(ServiceError) as caught,
            ):
                client.search("x")
            assert caught.value.status == 503
        finally:
            terminate(process)


def test_it_starts_from_inside_its_folder_without_embedding_anything_twice(service: Service) -> None:
    # Nobody listens at this address: only what the cache holds can be used.
    env = service.env | {"ASI_SERVICES__EMBEDDING_URL": "http://127.0.0.1:9"}
    process = subprocess.Popen(
        [sys.executable, "rag_api.py", "--port", "0"],
        cwd=REPOSITORY / "cognition_base",
        env=clean_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().decode().removeprefix("listening on ").strip()
        assert httpx.get(f"{url}/health").json()["stats"] == service.http.get("/stats").json()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_damaged_cache_is_replaced(service: Service) -> None:
    (cache,) = service.index.glob("*.npz")
    whole = cache.read_bytes()
    try:
        for damage in (b"", whole[: len(whole) // 2], b"nonsense" * 100):
            cache.write_bytes(damage)
            assert service.http.post("/reinit").status_code == 200
            with np.load(cache) as stored:
                assert len(stored["vectors"]) == 2 * service.http.get("/stats").json()["total_documents"]
    finally:
        cache.write_bytes(whole)


def test_an_unwritable_cache_only_costs_time(service: Service, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("a file where the folder should be")
    with running([SCRIPT, "--port", "0"], service.env | {"ASI_COGNITION__INDEX_DIR": str(blocker / "x")}) as (url, _):
        assert httpx.post(f"{url}/search", json={"query": SYMPTOM}).json()["total_results"] >= 1


def run_to_its_end(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=clean_environment(env), timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--cognition.corpus", "/nowhere"], 2, "expected paper files"),
        (["--retriever", "elastic"], 2, "'embedded' or 'opensearch'"),
        (["--port", "70000"], 2, "65535"),
        (["--retriever", "opensearch", "--opensearch-url", "127.0.0.1:9200"], 2, "opensearch_url"),
        (["--retriever", "opensearch", "--opensearch-url", "http://u:secret@127.0.0.1:9"], 3, "--retriever embedded"),
    ],
)
def test_a_wrong_start_is_one_clear_error(service: Service, arguments: list[str], status: int, said: str) -> None:
    done = run_to_its_end(["--port", "0", *arguments], service.env)
    assert done.returncode == status, done.stderr
    assert said in done.stderr and "error: " in done.stderr and "Traceback" not in done.stderr
    assert "secret" not in done.stderr and done.stdout == ""


def test_a_taken_port_and_a_broken_corpus_are_told(service: Service, tmp_path: Path) -> None:
    taken = run_to_its_end(["--port", service.url.rsplit(":", 1)[1]], service.env)
    assert taken.returncode == 2 and taken.stderr.startswith("error: cannot listen on") and "--port" in taken.stderr
    (tmp_path / "2406_1.json").write_text("[{}]")
    broken = run_to_its_end(["--port", "0"], service.env | {"ASI_COGNITION__CORPUS": str(tmp_path)})
    assert broken.returncode == 2 and "2406_1.json: entry 1, DESIGN_INSIGHT" in broken.stderr


def test_it_ends_with_its_parent(service: Service) -> None:
    script = (
        "import subprocess, sys, time; from common.process import spawn\n"
        f"child = spawn([sys.executable, {SCRIPT!r}, '--port', '0'], stdout=subprocess.PIPE)\n"
        "print(child.pid, child.stdout.readline().decode().strip(), flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=clean_environment(service.env), stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid, _, line = parent.stdout.readline().decode().partition(" ")
    assert line.startswith("listening on ")
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(int(pid), os.WNOHANG)
        time.sleep(0.05)
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
