"""What the database tests share: the real server as a process, an embedding server to talk to, and made-up elements."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from common.files import sha256_text
from common.process import LISTENING, PARENT, REPOSITORY
from common.records import Baseline, Measurement, RunRecord
from database.client import DatabaseClient, NewElement

KEYS = ["time", "name", "result", "program", "motivation", "analysis", "cognition", "log", "parent", "index", "summary"]
DIMENSION = 64
RETRY_SECONDS = 0.5
"""How long the shared server rests after the embedding server failed."""
BASELINE = Baseline(
    key="cpu-1",
    profile="cpu",
    seeds=[0, 1, 2],
    loss=4.0,
    loss_sd=0.03,
    benchmark=0.5,
    benchmark_sd=0.02,
    sd_dof=2,
    tasks=["associative_recall", "induction"],
    loss_clip=0.1,
    benchmark_clip=0.3,
    flops_per_token=1000.0,
)


@functools.lru_cache(maxsize=10_000)
def _word_vector(word: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).normal(size=DIMENSION)


def hashed_windows(text: str, size: int = 40, stride: int = 30) -> list[list[float]]:
    """A bag of hashed words for every window of 40 words: texts that share words are near."""
    words = text.lower().split() or [""]
    found = []
    for start in range(0, max(1, len(words) - size + stride), stride):
        vector = np.zeros(DIMENSION)
        for word in words[start : start + size]:
            vector += _word_vector(word)
        found.append((vector / max(float(np.linalg.norm(vector)), 1e-9)).tolist())
    return found


class EmbeddingDouble:
    """An embedding server with another model: deterministic, quick, and it can be told to fail.

    Args:
        windows: the vectors of a text, one for each of its windows.
    """

    def __init__(
        self,
        windows: Callable[[str], list[list[float]]] = hashed_windows,
        model: str = "hashed-words",
        dimension: int = DIMENSION,
    ) -> None:
        self.broken = False
        self.failed_at = -1e9
        """When it last failed (time.monotonic)."""
        self.model = model
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(200, {"status": "healthy", "model": double.model, "dimension": dimension})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if double.broken:
                    double.failed_at = time.monotonic()
                    return self.reply(500, {"error": "Error", "message": "told to fail"})
                found = [windows(text) for text in body["texts"]]
                vectors: list[Any] = found if body["windows"] else [each[0] for each in found]
                return self.reply(200, {"model": double.model, "dimension": dimension, "vectors": vectors})

            def reply(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                # A server that stops does not wait for what it asked.
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def mongodb_server() -> Iterator[str]:
    """The URL of a MongoDB-wire server: ASI_TEST_MONGODB_URL, or one that runs meanwhile."""
    url = os.environ.get("ASI_TEST_MONGODB_URL")
    if url:
        yield url.rstrip("/")
        return
    with tempfile.TemporaryDirectory(prefix="secantus-") as folder:
        port = free_port()
        server = start_mongodb(Path(folder), port)
        try:
            yield f"mongodb://127.0.0.1:{port}"
        finally:
            # Nothing of it is kept, and an orderly end takes it ten seconds and more.
            server.kill()
            server.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def start_mongodb(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A MongoDB-wire server that keeps its data in `folder` and answers on `port`."""
    binary = Path(sys.executable).parent / "secantusd-py"
    assert binary.exists(), "install requirements-dev.txt: secantusd-py is missing"
    argv = [str(binary), "--host", "127.0.0.1", "--port", str(port), "--storage-path", f"{folder}/data"]
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen([*argv, "--sync-on-commit"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return server
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
    except BaseException:
        server.kill()
        server.wait()
        raise


class Service:
    """The server as a process of its own. `url` is where it listens."""

    def __init__(
        self,
        store: str,
        embedding_url: str,
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        limit_file_bytes: int | None = None,
        port: str = "0",
        within: Sequence[str] = (),
    ) -> None:
        """`within` is a command that runs the server's as its arguments, and is its parent then."""
        self.store = store
        self.log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ASI_")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment |= {"ASI_SERVICES__EMBEDDING_URL": embedding_url, "OMP_NUM_THREADS": "1", **(env or {})}
        # Tests that are killed leave no server behind, which would go on asking a port that is soon another's.
        if not within:
            environment[PARENT] = str(os.getpid())
        argv = [*within, sys.executable, "database/mongodb_api.py", "--port", port, "--store", store]
        if limit_file_bytes is not None:
            # A limit on file size is how a full disk looks to a write, without filling one.
            argv = ["/bin/sh", "-c", f'ulimit -f {limit_file_bytes // 512}; exec "$@"', "sh", *argv]
        with log.open("ab") as handle:
            self.process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=handle, env=environment, cwd=REPOSITORY, start_new_session=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode().strip()
        assert line.startswith(LISTENING), f"{line!r}\n{log.read_text()[-2000:]}"
        self.url = line.removeprefix(LISTENING)
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        self.client = DatabaseClient(self.url)

    def kill(self) -> None:
        self.process.kill()
        self._ended()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._ended()

    def _ended(self) -> int:
        status = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.http.close()
        self.client.close()
        return status

    def get(self, path: str, status: int = 200, **kwargs: Any) -> Any:
        return self._checked(self.http.get(path, **kwargs), status)

    def post(self, path: str, body: Any = None, status: int = 200, **kwargs: Any) -> Any:
        return self._checked(self.http.post(path, json=body, **kwargs), status)

    def put(self, path: str, body: Any = None, status: int = 200) -> Any:
        return self._checked(self.http.put(path, json=body), status)

    def delete(self, path: str, status: int = 200, **kwargs: Any) -> Any:
        return self._checked(self.http.delete(path, **kwargs), status)

    def _checked(self, answer: httpx.Response, status: int) -> Any:
        assert answer.status_code == status, answer.text
        value = answer.json()
        if status >= 400:
            assert {"success", "message", "detail"} <= set(value), value
            assert value["success"] is False and isinstance(value["detail"], str) and value["detail"], value
        return value

    def add(self, name: str = "delta_net_x", parent: int | None = None, **changes: Any) -> int:
        return int(self.post("/elements", body_of(name, parent, **changes))["data"]["index"])

    def add_experiment(self, number: int, parent: int | None, loss: float, benchmark: float) -> dict[str, Any]:
        element = element_of(number, parent)
        body = {
            "idempotency_key": f"experiment-{number}",
            "element": element.model_dump(),
            "run": run_of(element, loss, benchmark).model_dump(),
        }
        data: dict[str, Any] = self.post("/v2/experiments", body)["data"]
        return data


def settled(service: Service) -> None:
    """Returns when nothing waits to be embedded, so that no background work holds the file."""
    deadline = time.monotonic() + 60
    while service.client.stats()["pending_embeddings"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def body_of(name: str, parent: int | None = None, **changes: Any) -> dict[str, Any]:
    """A body for POST /elements."""
    return {
        "time": "2025-07-01 12:00:00",
        "name": name,
        "result": {
            "train": "step,1,100,2000\nx,10.8,10.2,4.5\n",
            "test": "Model,ARC Easy,PIQA\nx,0.3,0.5\n",
        },
        "program": f"class DeltaNet:\n    kind = {name!r}\n",
        "motivation": f"motivation of {name}",
        "analysis": "analysis",
        "cognition": "cognition",
        "log": "log",
        "parent": parent,
        "summary": "summary",
    } | changes


def element_of(number: int, parent: int | None) -> NewElement:
    return NewElement.model_validate(
        body_of(
            f"delta_net_{number}",
            parent,
            program=f"class DeltaNet:\n    number = {number}\n    def forward(self, x):\n        return x * {number}\n",
            motivation=f"gate {number} decays word{number} state{number} head{number}",
        )
    )


def run_of(element: NewElement, loss: float, benchmark: float) -> RunRecord:
    return RunRecord(
        run_id=f"run-{element.name}",
        name=element.name,
        profile="cpu",
        seed=0,
        status="finished",
        program_sha256=sha256_text(element.program),
        fingerprint=f"function of {element.name}",
        baseline_key=BASELINE.key,
        heldout_loss=Measurement(value=loss, n=1000, se=0.01),
        benchmark_mean=Measurement(value=benchmark, n=200, se=0.02),
        flops_per_token=1050.0,
        work_exponent=1.0,
    )
