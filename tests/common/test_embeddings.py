"""The embedding server as a real process, and the client that starts it, keeps it alive and ends it."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.embeddings import DEFAULT_MODEL, MAX_WINDOWS, STRIDE, EmbeddingClient, best_pair, window_spans
from common.errors import ServiceError
from common.process import REPOSITORY
from common.settings import Settings, load
from tests.fixtures_services import clean_environment
from tests.pipeline.running import children, command_line

SERVER = str(REPOSITORY / "common" / "embedding_server.py")
FILLER = "The weather report of the day mentions clouds over the hills and a light wind from the west. "
PASSAGE = "A delta rule update overwrites the value that a key retrieves from the memory matrix. " * 4


def external(url: str) -> Settings:
    return load(flags={"services": {"embedding_url": url}})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def server_pid(url: str) -> int:
    """The server among this process's children, found by the port in its socket table."""
    found = [pid for pid in children(os.getpid()) if "embedding_server.py\0--port" in command_line(pid)]
    wanted = f"{int(url.rsplit(':', 1)[1]):04X}"
    for pid in found:
        sockets = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{wanted}") and fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                return pid
    raise AssertionError(f"no child listens at {url}")


@given(length=st.integers(0, 30_000), content=st.integers(8, 512))
def test_windows_cover_every_token_until_the_cap(length: int, content: int) -> None:
    spans = window_spans(length, content)
    assert 1 <= len(spans) <= MAX_WINDOWS
    assert spans[0][0] == 0 and all(end - start <= content for start, end in spans)
    assert all(later[0] <= earlier[1] for earlier, later in itertools.pairwise(spans))
    assert spans[-1][1] == length or len(spans) == MAX_WINDOWS


def test_vectors_have_unit_norm_and_do_not_depend_on_company(embedding_client: EmbeddingClient) -> None:
    texts = ["linear attention", "", "Ünïcode ☃ and \ud800 too", "linear attention", "a\0b"]
    together = embedding_client.embed(texts)
    assert together.shape == (5, 384) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    assert np.array_equal(together[0], together[3])
    for text, vector in zip(texts, together, strict=True):
        assert np.array_equal(embedding_client.embed([text])[0], vector)
    assert embedding_client.embed([]).shape == (0, 384) and embedding_client.windows([]) == []
    assert embedding_client.model == DEFAULT_MODEL and embedding_client.dimension == 384


def test_related_texts_are_closer_than_unrelated_ones(embedding_client: EmbeddingClient) -> None:
    a, b, c = embedding_client.embed(
        ["the cat sat on the mat", "a kitten lay on the rug", "interest rates rose in May"]
    )
    assert a @ b > a @ c + 0.2


def test_long_texts_are_compared_by_their_best_windows(embedding_client: EmbeddingClient) -> None:
    one, other, without = embedding_client.windows(
        [FILLER * 40 + PASSAGE, PASSAGE + "Prices of wheat fell. " * 150, FILLER * 40]
    )
    assert len(one) > 2 and one.shape[1] == 384
    assert np.array_equal(one[0], embedding_client.embed([FILLER * 40 + PASSAGE])[0])
    # Their beginnings have nothing in common; the shared passage is found wherever it stands.
    assert one[0] @ other[0] < 0.3
    assert best_pair(one, other) > 0.6
    assert best_pair(without, other) < 0.4
    assert best_pair(one[0], one) == pytest.approx(1.0, abs=1e-5)


def test_many_texts_take_several_requests_and_keep_their_order(embedding_client: EmbeddingClient) -> None:
    texts = [f"number {n % 9}" for n in range(150)]
    vectors = embedding_client.embed(texts)
    assert vectors.shape == (150, 384)
    assert np.array_equal(vectors[149], embedding_client.embed(["number 5"])[0])


def test_an_endless_text_is_cut_not_refused(embedding_client: EmbeddingClient, embedding_url: str) -> None:
    (windows,) = embedding_client.windows([FILLER[:30] * 20_000])
    assert len(windows) == MAX_WINDOWS
    assert httpx.get(f"{embedding_url}/health").json()["status"] == "healthy"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"texts": "one"}', 400),
        (b'{"texts": [1]}', 400),
        (b'{"texts": ["a"], "windows": 1}', 400),
        (b"[" * 100_000, 400),
        (b'{"texts": ' + json.dumps(["a"] * 1025).encode() + b"}", 400),
    ],
)
def test_the_server_refuses_malformed_requests(embedding_url: str, body: bytes, status: int) -> None:
    answer = httpx.post(f"{embedding_url}/embed", content=body)
    assert answer.status_code == status and set(answer.json()) == {"error", "message"}


def test_the_server_refuses_unknown_paths_and_huge_bodies(embedding_url: str) -> None:
    assert httpx.get(f"{embedding_url}/nothing").status_code == 404
    assert httpx.post(f"{embedding_url}/nothing", content=b"{}").status_code == 404
    connection = http.client.HTTPConnection(embedding_url.removeprefix("http://"), timeout=10)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/embed")
        connection.putheader("Content-Length", str(1 << 30))
        connection.endheaders()
        assert connection.getresponse().status == 413
    assert httpx.post(f"{embedding_url}/embed", content=iter([b"{}"])).status_code == 411


def test_one_server_for_many_threads_restarted_when_killed_and_ended_by_close() -> None:
    client = EmbeddingClient(Settings())
    with ThreadPoolExecutor(8) as pool:
        urls = set(pool.map(lambda _: client.start(), range(8)))
        vectors = list(pool.map(lambda _: client.embed(["the same text"]), range(8)))
    assert len(urls) == 1 and all(np.array_equal(vectors[0], v) for v in vectors)
    url = urls.pop()
    first = server_pid(url)
    with EmbeddingClient(external(url), patience=120.0) as other:
        assert np.array_equal(other.embed(["the same text"]), vectors[0])
        os.kill(first, signal.SIGKILL)
        # Whoever only has the address waits until the owner has started it again there.
        assert np.array_equal(other.embed(["the same text"]), vectors[0])
    second = server_pid(url)
    assert client.start() == url and second != first
    client.close()
    assert ends(second, 0.5)
    with pytest.raises(ServiceError, match="closed"):
        client.embed(["x"])


def test_the_server_does_not_outlive_its_parent() -> None:
    script = "from common.embeddings import *; from common.settings import Settings; import time\n"
    script += "c = EmbeddingClient(Settings()); c.start(); print(c._process.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=REPOSITORY, env=clean_environment()
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    assert ends(pid, 5.0)


def test_a_server_that_does_not_start_in_time_is_reported_with_the_fix() -> None:
    with (
        EmbeddingClient(load(flags={"embedding": {"start_timeout": 0.01}})) as client,
        pytest.raises(ServiceError) as caught,
    ):
        client.start()
    assert "did not start" in caught.value.message and "embedding_server.py" in caught.value.fix


def test_nobody_at_the_address_is_an_error_after_the_patience() -> None:
    client = EmbeddingClient(external("http://127.0.0.1:9"), patience=0.5)
    with client, pytest.raises(ServiceError, match="no embedding server answers") as caught:
        client.embed(["x"])
    assert "services.embedding_url" in caught.value.fix


class _Nonsense(http.server.BaseHTTPRequestHandler):
    answer = b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def nonsense() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Nonsense)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>proxy</html>",
        b"[]",
        b"{}",
        b'{"model": "m", "dimension": 2, "vectors": [[1, 0, 0]]}',
        b'{"model": "m", "dimension": 2, "vectors": []}',
        b'{"model": "m", "dimension": 2, "vectors": [[NaN, 1]]}',
        b'{"model": "m", "dimension": 2, "vectors": [["a", 1]]}',
        b'{"model": "m", "dimension": 2, "vectors": [[[1, 0]]]}',
    ],
)
def test_an_unusable_answer_is_a_service_error(nonsense: str, answer: bytes) -> None:
    _Nonsense.answer = answer
    with EmbeddingClient(external(nonsense)) as client, pytest.raises(ServiceError):
        client.embed(["x"])


def test_importing_the_client_does_not_import_torch() -> None:
    code = (
        "import sys, common.embeddings, cognition_base.client, cognition_base.rag_api; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=clean_environment()).returncode == 0


def test_a_taken_port_is_one_clear_error(embedding_url: str) -> None:
    port = embedding_url.rsplit(":", 1)[1]
    done = subprocess.run(
        [sys.executable, SERVER, "--port", port], capture_output=True, text=True, env=clean_environment(), timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port}") and "fix:" in done.stderr


def test_stride_leaves_an_overlap() -> None:
    assert 0 < STRIDE < 254
