"""The embedding server: one process that holds the sentence model and turns texts into unit vectors.

    python common/embedding_server.py --port 0          # prints: listening on http://127.0.0.1:PORT

POST /embed {"texts": [...], "windows": false} -> {"model", "dimension", "vectors"}: one vector a text (its first
window), or with windows a list of vectors a text. GET /health. Errors are {"error", "message"}.

Texts are run one at a time: on CPU a batch gains nothing beyond 100 tokens, and a text's vector must not depend on
which others happened to come with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import json
import os
import socketserver
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import AsiError, cannot_listen
from common.process import announce, exit_with_parent
from common.settings import parse

if TYPE_CHECKING:
    from common.sentence_model import Encoder

__all__ = ["EmbeddingService", "main"]

MAX_BODY = 16 << 20
MAX_TEXTS = 1024


class EmbeddingService:
    """The model behind one lock, and the vectors of the windows seen last.

    Short requests go first: whoever waits with the fewest windows left is next, so a query does not wait for a corpus.
    """

    def __init__(self, encoder: Encoder, cache_size: int) -> None:
        self.encoder = encoder
        self.cache_size = cache_size
        self.cache: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self.computed = 0
        self._turn = threading.Condition()
        self._busy = False
        self._waiting: list[tuple[int, int]] = []

    def embed(self, texts: Sequence[str], windows: bool) -> list[list[np.ndarray]]:
        """The vectors of each text's windows, or of its first one only."""
        split = [self.encoder.split(text)[: None if windows else 1] for text in texts]
        left = sum(len(parts) for parts in split)
        vectors = []
        for parts in split:
            found = []
            for window in parts:
                found.append(self._vector(window, left))
                left -= 1
            vectors.append(found)
        return vectors

    def _vector(self, window: Hashable, left: int) -> np.ndarray:
        with self._turn:
            if window in self.cache:
                self.cache.move_to_end(window)
                return self.cache[window]
            ticket = (left, threading.get_ident())
            self._waiting.append(ticket)
            while self._busy or min(self._waiting) != ticket:
                self._turn.wait()
            self._waiting.remove(ticket)
            self._busy = True
        try:
            vector = self.encoder.encode(window)
        finally:
            with self._turn:
                self._busy = False
                self._turn.notify_all()
        with self._turn:
            self.computed += 1
            self.cache[window] = vector
            while len(self.cache) > self.cache_size:
                self.cache.popitem(last=False)
        return vector


class _RefusedError(Exception):
    """A request that cannot be answered: status and message."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    service: EmbeddingService

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks DNS for this machine's name and can wait seconds for the answer.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 300
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        service = self.server.service
        if self.path != "/health":
            return self._answer(404, {"error": "Not Found", "message": f"expected /health or /embed, got {self.path}"})
        return self._answer(
            200,
            {
                "status": "healthy",
                "model": service.encoder.name,
                "dimension": service.encoder.dimension,
                "computed": service.computed,
                "cached": len(service.cache),
            },
        )

    def do_POST(self) -> None:
        service = self.server.service
        try:
            texts, windows = self._request()
        except _RefusedError as refused:
            self.close_connection = True
            return self._answer(refused.args[0], {"error": "Bad Request", "message": refused.args[1]})
        vectors = [[vector.tolist() for vector in found] for found in service.embed(texts, windows)]
        body = {"model": service.encoder.name, "dimension": service.encoder.dimension}
        return self._answer(200, body | {"vectors": vectors if windows else [found[0] for found in vectors]})

    def _request(self) -> tuple[list[str], bool]:
        if self.path != "/embed":
            raise _RefusedError(404, f"expected POST /embed, got {self.path}")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise _RefusedError(411, "expected a Content-Length header")
        if int(length) > MAX_BODY:
            raise _RefusedError(413, f"expected at most {MAX_BODY} bytes, got {length}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _RefusedError(400, f"expected a JSON object: {error}") from error
        texts = body.get("texts") if isinstance(body, dict) else None
        if not isinstance(texts, list) or len(texts) > MAX_TEXTS or not all(isinstance(text, str) for text in texts):
            raise _RefusedError(400, f'expected {{"texts": [at most {MAX_TEXTS} strings]}}')
        windows = body.get("windows", False)
        if not isinstance(windows, bool):
            raise _RefusedError(400, f"expected windows to be true or false, got {windows!r}")
        # A lone surrogate is no text: the tokenizer takes only what UTF-8 can say.
        return [text.encode("utf-8", "replace").decode() for text in texts], windows

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: there are many, and they carry nothing a person looks for."""


def _bind(host: str, port: int) -> _Server:
    try:
        return _Server((host, port), _Handler)
    except OSError as error:
        raise cannot_listen(host, port, error) from error


def main(argv: Sequence[str] | None = None) -> int:
    exit_with_parent()
    parser = argparse.ArgumentParser(description="Embedding server: texts to unit vectors.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port; 0 takes a free one (default: 0)")
    try:
        settings, arguments = parse(parser, argv, sections=["embedding"])
        # Bound first: a taken port is told before the seconds that torch needs, and early requests wait in the queue.
        server = _bind(arguments.host, arguments.port)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from common.sentence_model import load_encoder

        encoder = load_encoder(settings.embedding.model, settings.embedding.threads)
        server.service = EmbeddingService(encoder, settings.embedding.cache_size)
    except AsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    announce(f"http://{arguments.host}:{server.server_address[1]}")
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(server.socket):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
