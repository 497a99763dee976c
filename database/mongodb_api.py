"""The architecture database: a FastAPI service over SQLite or MongoDB.

python database/mongodb_api.py [--host H] [--port P] [--store sqlite:///FILE or mongodb://...]
python database/mongodb_api.py --port 0 --store sqlite:////tmp/try.sqlite     # prints: listening on http://127.0.0.1:PORT
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import logging
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from common.embeddings import Embedder, EmbeddingClient
from common.errors import AsiError, BusyError, ServiceError, StoreError, UsageError
from common.process import announce, exit_with_parent
from common.settings import Database as DatabaseSettings
from common.settings import parse, usage_exit
from database.errors import ConflictError, NotFoundError, RefusedError
from database.memory import Memory
from database.routers import candidates, elements, experiments, lineage, system
from database.store import StoreBusyError, StoreFullError, open_store

__all__ = ["create_app", "main", "serve"]

_LOG = logging.getLogger("database")


def create_app(memory: Memory, port: int = 8001) -> FastAPI:
    """The API over `memory`, which is closed when the app shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        memory.start()
        yield
        memory.close()

    app = FastAPI(title="ASI-Arch architecture database", version=system.VERSION, lifespan=lifespan)
    app.state.memory = memory
    app.state.port = port
    # Fixed words win over {index} in paths, so the routes with them come first.
    for module in (system, elements, lineage, candidates, experiments):
        app.include_router(module.router)
    for kind, status in (
        (NotFoundError, 404),
        (RefusedError, 400),
        (ConflictError, 409),
        (StoreFullError, 507),
        (StoreBusyError, 503),
        (StoreError, 503),
        (ServiceError, 503),
        (OverflowError, 422),
    ):
        app.add_exception_handler(kind, _error_handler(status))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


def _body(status: int, message: str, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    # One error shape for all: existing clients read `detail` as text.
    return JSONResponse({"success": False, "message": message, "detail": detail}, status_code=status, headers=headers)


def _error_handler(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        if status >= 500:
            _LOG.error("%s %s: %s", request.method, request.url.path, error)
        message = error.message if isinstance(error, AsiError) else str(error)
        return _body(status, message, str(error))

    return handle


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()[:10]]
    text = "; ".join(said).encode("utf-8", "replace").decode()
    return _body(422, "an argument is malformed", text)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _body(error.status_code, str(error.detail), str(error.detail), dict(error.headers or {}))


async def _unexpected(request: Request, error: Exception) -> Response:
    reference = uuid.uuid4().hex[:12]
    _LOG.error("%s %s failed, reference %s", request.method, request.url.path, reference, exc_info=error)
    return _body(500, "the server made a mistake", f"an error of the server; its log has it under {reference}")


class _Server(uvicorn.Server):
    """Says where it listens once it answers."""

    url = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            announce(self.url)


def serve(settings: DatabaseSettings, embedder: Embedder) -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests in progress.

    Raises:
        BusyError: the port is taken, or the address is not ours.
        StoreError, UsageError: the store cannot be opened.
    """
    listener = _listen(settings.host, settings.port)
    try:
        memory = Memory(open_store(settings), embedder, settings)
        host, port = listener.getsockname()[:2]
        config = uvicorn.Config(
            create_app(memory, port),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
            # A motivation comes in the query string of /elements/search-similar.
            h11_max_incomplete_event_size=1 << 20,
        )
        server = _Server(config)
        server.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        # uvicorn raises the signal again after an orderly end; that end is what was asked for.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    finally:
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(256)
    except OSError as error:
        raise BusyError(
            f"cannot listen on {host}:{port}: {error.strerror}", "choose another --port; 0 takes a free one"
        ) from error
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    exit_with_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for name in ("httpx", "faiss.loader"):
        logging.getLogger(name).setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description="The architecture database: an HTTP API over SQLite or MongoDB.")
    try:
        settings, _ = parse(
            parser,
            argv,
            sections=["database", "services.embedding_url", "embedding"],
            short=["database.host", "database.port", "database.store"],
        )
        with EmbeddingClient(settings) as embedder:
            serve(settings.database, embedder)
    except UsageError as error:
        return usage_exit(error)
    except AsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
