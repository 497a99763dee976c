"""The cognition base: a Flask app that answers symptoms with what papers know about them.

    python cognition_base/rag_api.py                    # http://127.0.0.1:13142, embedded index
    python cognition_base/rag_api.py --port 0           # prints: listening on http://127.0.0.1:PORT

GET /, /health, /stats, /paper/<paper_key>; POST /search, /reinit. Every error is {"error", "message"}.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from common.process import end_on_interrupt

    end_on_interrupt()

import argparse
import contextlib
import json
import math
import signal
import socket
import threading
from collections.abc import Sequence
from typing import Any

from flask import Flask, Response, jsonify, request
from waitress.server import create_server
from werkzeug.exceptions import HTTPException

from cognition_base.rag_service import RagService, build_retriever
from common.embeddings import EmbeddingClient
from common.errors import AsiError, ServiceError, cannot_listen
from common.process import announce, exit_with_parent, raise_on_interrupt
from common.settings import Settings, parse

__all__ = ["create_app", "main"]

MAX_BODY = 1 << 20
MAX_QUERY = 100_000
SERVICE = "cognition-base"
ROUTES = {
    "GET /": "this description",
    "GET /health": "whether searches are answered: 200, or 503 before the index is ready",
    "GET /stats": "size of the index",
    "POST /search": "entries for a query: {query, k = 5 (1-50), similarity_threshold = 0.6 (0-1)}",
    "GET /paper/<paper_key>": "all entries of one paper",
    "POST /reinit": "reads the corpus again and rebuilds the index",
}


class _BadRequestError(Exception):
    """A request that cannot be answered as it is."""


def create_app(service: RagService) -> Flask:
    """The Flask app over `service`."""
    app = Flask(SERVICE)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.json.sort_keys = False  # type: ignore[attr-defined]

    @app.get("/")
    def root() -> Any:
        return {"service": SERVICE, "description": "Retrieval of design insights by symptom", "endpoints": ROUTES}

    @app.get("/health")
    def health() -> Any:
        if not service.ready:
            problem = {"error": "Service Unavailable", "message": "the corpus is still being indexed"}
            return {"status": "starting", "service": SERVICE, "stats": service.stats(), **problem}, 503
        return {"status": "healthy", "service": SERVICE, "stats": service.stats()}

    @app.get("/stats")
    def stats() -> Any:
        return service.stats()

    @app.post("/search")
    def search() -> Any:
        query, k, threshold = _search_request(request.get_data())
        results = service.search(query, k, threshold)
        return {"query": query, "total_results": len(results), "results": results}

    @app.get("/paper/<paper_key>")
    def paper(paper_key: str) -> Any:
        documents = service.paper(paper_key)
        return {"paper_key": paper_key, "total_documents": len(documents), "documents": documents}

    @app.post("/reinit")
    def reinit() -> Any:
        service.load(fresh=True)
        return {"status": "success", "message": "the corpus is indexed anew", "stats": service.stats()}

    @app.errorhandler(_BadRequestError)
    def bad_request(error: _BadRequestError) -> Any:
        return _error(400, "Bad Request", str(error))

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Any:
        return _error(error.code or 500, error.name, error.description or error.name)

    @app.errorhandler(AsiError)
    def failure(error: AsiError) -> Any:
        starting = isinstance(error, ServiceError) and error.status == 503
        return _error(
            503 if starting else 500, "Service Unavailable" if starting else "Internal Server Error", str(error)
        )

    return app


def _search_request(body: bytes) -> tuple[str, int, float]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _BadRequestError(f"expected a JSON object, got something else: {error}") from error
    if not isinstance(value, dict):
        raise _BadRequestError(f"expected a JSON object, got a {type(value).__name__}")
    query, k, threshold = value.get("query"), value.get("k", 5), value.get("similarity_threshold", 0.6)
    if not isinstance(query, str) or not query.strip():
        raise _BadRequestError("expected query to be a text that is not empty")
    if len(query) > MAX_QUERY:
        raise _BadRequestError(f"expected query to have at most {MAX_QUERY} characters, got {len(query)}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= 50:
        raise _BadRequestError(f"expected k to be a whole number from 1 to 50, got {str(k)[:100]}")
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not math.isfinite(threshold) or not 0 <= threshold <= 1:
        raise _BadRequestError(f"expected similarity_threshold to be a number from 0 to 1, got {str(threshold)[:100]}")
    return query, k, float(threshold)


def _error(status: int, error: str, message: str) -> tuple[Response, int]:
    return jsonify({"error": error, "message": message}), status


def _bind(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(128)
    except OSError as error:
        bound.close()
        raise cannot_listen(host, port, error) from error
    return bound


def _run(settings: Settings) -> None:
    """Serves until SIGTERM or Ctrl-C. /health answers from the start; the address is announced once searches do."""
    bound = _bind(settings.cognition.host, settings.cognition.port)
    with EmbeddingClient(settings) as embedder, contextlib.closing(build_retriever(settings)) as retriever:
        service = RagService(settings, embedder, retriever)
        server = create_server(create_app(service), sockets=[bound], threads=8, clear_untrusted_proxy_headers=True)
        threading.Thread(target=server.run, name="http", daemon=True).start()
        service.load()
        host = f"[{settings.cognition.host}]" if ":" in settings.cognition.host else settings.cognition.host
        announce(f"http://{host}:{bound.getsockname()[1]}")
        # With cached vectors nothing was embedded yet: the model starts while the first query is on its way.
        threading.Thread(target=_warm, args=(embedder,), name="warm", daemon=True).start()
        threading.Event().wait()


def _warm(embedder: EmbeddingClient) -> None:
    # Whoever needs it gets the error; this thread only saves the wait.
    with contextlib.suppress(ServiceError):
        embedder.start()


def main(argv: Sequence[str] | None = None) -> int:
    exit_with_parent()
    parser = argparse.ArgumentParser(description="Cognition base: symptoms in, ideas of papers out.")
    short = [f"cognition.{name}" for name in ("host", "port", "retriever", "opensearch_url")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings, _ = parse(parser, argv, sections=["cognition", "embedding", "services.embedding_url"], short=short)
        raise_on_interrupt()
        _run(settings)
    except KeyboardInterrupt:
        return 0
    except AsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
