"""Text to vectors without torch in this process: a client of the embedding server, which it starts when needed."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO, Any, Protocol, Self

import httpx
import numpy as np

from common.errors import ServiceError
from common.process import LISTENING, REPOSITORY, spawn, terminate
from common.settings import Settings

__all__ = [
    "DEFAULT_MODEL",
    "MAX_WINDOWS",
    "STRIDE",
    "Embedder",
    "EmbeddingClient",
    "best_pair",
    "expected_model",
    "window_spans",
]

DEFAULT_MODEL = "all-MiniLM-L6-v2"
"""The packaged model."""
STRIDE = 192
"""Tokens from the start of one window to the start of the next; a window holds 256."""
MAX_WINDOWS = 64
"""Windows of one text that are embedded: about 12,000 tokens. What follows is not looked at."""

_REQUEST_CHARACTERS = 40_000
_REQUEST_TEXTS = 64
_LOST = (httpx.ConnectError, httpx.ConnectTimeout, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


class Embedder(Protocol):
    """Turns texts into unit vectors."""

    @property
    def model(self) -> str:
        """Name of the model. Vectors of different models are not comparable."""
        ...

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """One vector a text, from its first window: float32 [n, dimension], unit norm."""
        ...

    def windows(self, texts: Sequence[str]) -> list[np.ndarray]:
        """All windows of each text: float32 [w_i, dimension], w_i >= 1, unit norm; `embed` gives the first rows."""
        ...


def best_pair(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the closest pair of windows of two texts.

    Args:
        a: float [w_a, dimension], unit norm, from `Embedder.windows`.
        b: float [w_b, dimension], likewise.

    Returns:
        The largest cosine, in [-1, 1].
    """
    return float(np.clip(np.max(np.atleast_2d(a) @ np.atleast_2d(b).T), -1.0, 1.0))


def window_spans(length: int, content: int) -> list[tuple[int, int]]:
    """Windows of `content` tokens that cover `length` tokens, one every STRIDE (a short window: three quarters of it).

    Returns:
        [start, end) of each; at least one, at most MAX_WINDOWS.
    """
    stride = max(1, min(STRIDE, content * 3 // 4 + 2))
    starts = range(0, max(1, length - content + stride), stride)
    return [(start, min(length, start + content)) for start in starts[:MAX_WINDOWS]]


def expected_model(settings: Settings) -> str:
    """Name of the model that these settings ask for, known without a running server."""
    return settings.embedding.model or DEFAULT_MODEL


class EmbeddingClient:
    """The embedder every part uses. Thread-safe; starts nothing before its first use.

    With settings.services.embedding_url it uses that server and, since whoever owns it restarts it at the same
    address, waits up to `patience` seconds for one that is gone. Without, it starts `common/embedding_server.py` as a
    child, starts it again at the same address whenever it dies, and ends it with `close` (or when this process ends).

    Raises, from every method that talks to the server:
        ServiceError: it cannot be started, does not answer in time, or answers with something unusable.
    """

    def __init__(self, settings: Settings, patience: float = 20.0) -> None:
        self._settings = settings
        self._patience = patience
        self._lock = threading.Lock()
        self._http = httpx.Client(timeout=httpx.Timeout(settings.embedding.timeout, connect=5.0), trust_env=False)
        self._url: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._described: tuple[str, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def model(self) -> str:
        return self._describe()[0]

    @property
    def dimension(self) -> int:
        return self._describe()[1]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Embedder.embed`."""
        vectors = self._vectors(texts, windows=False)
        return np.stack(vectors) if vectors else np.zeros((0, self.dimension), np.float32)

    def windows(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Embedder.windows`."""
        return self._vectors(texts, windows=True)

    def start(self) -> str:
        """Starts the server now unless one runs, and returns its URL.

        The process that calls this owns the server; children get the URL as ASI_SERVICES__EMBEDDING_URL.
        """
        with self._lock:
            return self._start()

    def close(self) -> None:
        """Ends the server if this client started it. Further calls raise ServiceError."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            terminate(process)
        self._http.close()

    def _describe(self) -> tuple[str, int]:
        if self._described is None:
            answer = self._call("GET", "/health")
            self._described = (str(answer.get("model")), int(answer.get("dimension") or 0))
        return self._described

    def _vectors(self, texts: Sequence[str], *, windows: bool) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for batch in _batches(texts):
            answer = self._call("POST", "/embed", {"texts": batch, "windows": windows})
            try:
                vectors = [np.asarray(vector, dtype=np.float32) for vector in answer["vectors"]]
                self._described = (str(answer["model"]), int(answer["dimension"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ServiceError(
                    f"expected vectors of the embedding server at {self._url}, got {str(answer)[:200]}"
                ) from error
            shape = (2, self._described[1]) if windows else (1, self._described[1])
            if len(vectors) != len(batch) or any(
                (v.ndim, v.shape[-1]) != shape or not np.isfinite(v).all() for v in vectors
            ):
                raise ServiceError(
                    f"expected {len(batch)} vectors of {shape[1]} numbers from the embedding server at {self._url}"
                )
            found += vectors
        return found

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        deadline = time.monotonic() + self._patience
        while True:
            url = self.start()
            try:
                answer = self._http.request(method, url + path, json=body)
                break
            except _LOST as error:
                # It died, or is being started again: asking twice is harmless, since embedding has no effects.
                if time.monotonic() > deadline:
                    raise ServiceError(f"no embedding server answers at {url}: {error}", self._fix()) from error
                time.sleep(0.2)
            except httpx.TimeoutException as error:
                raise ServiceError(
                    f"the embedding server at {url} gave no answer in {self._settings.embedding.timeout:g} s",
                    "raise embedding.timeout or embedding.threads, or run less at the same time (run.parallel)",
                ) from error
            except (httpx.HTTPError, httpx.InvalidURL, RuntimeError) as error:
                raise ServiceError(f"cannot ask the embedding server at {url}: {error}", self._fix()) from error
        try:
            value = answer.json()
        except ValueError:
            value = None
        if answer.status_code != 200 or not isinstance(value, dict):
            raise ServiceError(
                f"the embedding server at {url} answered {answer.status_code}: {answer.text[:300]}",
                self._fix(),
                answer.status_code,
            )
        return value

    def _fix(self) -> str:
        if self._settings.services.embedding_url:
            return "start it: python common/embedding_server.py --port PORT; or unset services.embedding_url"
        return "python common/embedding_server.py --port 0 shows why it does not start"

    def _start(self, port: int = 0) -> str:
        """The URL of a live server; the caller holds the lock."""
        if self._closed:
            raise ServiceError("the embedding client is closed")
        external = self._settings.services.embedding_url
        if external:
            self._url = external.rstrip("/")
        elif self._process is None or self._process.poll() is not None:
            if self._url is not None:
                port = int(self._url.rsplit(":", 1)[1])
            self._url = self._launch(port)
        assert self._url is not None
        return self._url

    def _launch(self, port: int) -> str:
        embedding = self._settings.embedding
        argv = [sys.executable, str(REPOSITORY / "common" / "embedding_server.py"), "--port", str(port)]
        argv += ["--embedding.threads", str(embedding.threads), "--embedding.cache_size", str(embedding.cache_size)]
        argv += ["--embedding.model", embedding.model] if embedding.model else []
        with tempfile.TemporaryFile() as errors:
            process = spawn(argv, stdout=subprocess.PIPE, stderr=errors)
            assert process.stdout is not None
            line = _first_line(process.stdout, embedding.start_timeout)
            if not line.startswith(LISTENING):
                ended = process.poll() is not None
                terminate(process, grace=0.5)
                if port != 0:
                    return self._launch(0)
                why = (
                    f"ended with status {process.returncode}"
                    if ended
                    else f"is silent for {embedding.start_timeout:g} s"
                )
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()[-800:]
                raise ServiceError(f"the embedding server did not start, it {why}: {said}", self._fix())
        process.stdout.close()
        self._process = process
        threading.Thread(target=self._keep, args=(process,), name="embedding-keeper", daemon=True).start()
        return line.removeprefix(LISTENING)

    def _keep(self, process: subprocess.Popen[bytes]) -> None:
        """Starts the server again when it dies: other processes know its address and wait for it."""
        started = time.monotonic()
        process.wait()
        if time.monotonic() - started < 1.0:
            time.sleep(1.0)
        with self._lock:
            if not self._closed and self._process is process:
                try:
                    self._start()
                except ServiceError as error:
                    print(f"embedding server: {error}", file=sys.stderr)


def _batches(texts: Sequence[str]) -> list[list[str]]:
    """Requests small enough to be answered well within the time-out."""
    batches: list[list[str]] = []
    characters = 0
    for raw in texts:
        text = raw.encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent
        full = characters + len(text) > _REQUEST_CHARACTERS
        if not batches or full or len(batches[-1]) >= _REQUEST_TEXTS:
            batches.append([])
            characters = 0
        batches[-1].append(text)
        characters += len(text)
    return batches


def _first_line(stream: IO[bytes], seconds: float) -> str:
    """The first line a child writes, "" when it ends or is silent for `seconds`."""
    deadline = time.monotonic() + seconds
    data = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while b"\n" not in data and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                chunk = os.read(stream.fileno(), 4096)
                if not chunk:
                    break
                data += chunk
    return data.decode(errors="replace").partition("\n")[0].strip()
