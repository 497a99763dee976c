"""The architecture database: a FastAPI service over SQLite or MongoDB.

python database/mongodb_api.py [--host H] [--port P] [--store sqlite:///FILE or mongodb://...]
python database/mongodb_api.py --port 0 --store sqlite:////tmp/try.sqlite     # prints: listening on http://127.0.0.1:PORT
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from common.process import end_on_interrupt

    end_on_interrupt()

import argparse
import gc
import signal
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from common.embeddings import Embedder, EmbeddingClient
from common.errors import AsiError, UsageError, cannot_listen
from common.process import announce, exit_with_parent
from common.settings import Settings, parse, usage_exit
from database.access import Access, Keys, require_key
from database.direct import Direct
from database.envelope import answer_errors
from database.evaluate_agent.model_judger import ModelJudger, open_judger
from database.head import HeadAsGet
from database.logs import log_to_stderr
from database.memory import Memory
from database.openapi import describe_api
from database.protocol import EnvelopeProtocol
from database.readiness import Readiness
from database.routers import bulk, candidates, elements, events, experiments, lineage, records, system
from database.store import open_store
from database.telemetry import Metrics, Telemetry

__all__ = ["create_app", "main", "serve"]

_SWITCH_SECONDS = 0.001
"""How long a thread keeps the interpreter while another waits for it. The default, 5 ms, is longer than a request
takes: whoever commits or reads would wait that long for the loop, and the loop for them."""
_COLLECT_EVERY = 50_000
"""Objects more than before until the collector looks for cycles among new ones."""


def create_app(memory: Memory, port: int, closing: threading.Event) -> ASGIApp:
    """The API over `memory`, which is closed when the app shuts down.

    Args:
        port: what /docs names as the address.
        closing: streams end when it is set, so that a stop need not wait for their clients.

    Raises:
        UsageError: an API key that no client can send.
    """
    settings, metrics = memory.settings, Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        memory.start()
        yield
        memory.close()

    # /docs and /redoc with their scripts served from here.
    app = FastAPIOffline(
        title="ASI-Arch architecture database",
        version=system.VERSION,
        lifespan=lifespan,
    )
    app.state.memory = memory
    app.state.metrics = metrics
    app.state.readiness = Readiness(memory.store)
    app.state.port = port
    app.state.closing = closing
    app.state.newest_event = events.NewestEvent(memory)
    # Routes are tried in their order: those asked most come first. Fixed words win over {index} within one router.
    for module in (elements, candidates, lineage, experiments, records, events, bulk, system):
        # Not as a router within the router, which takes a tenth of the time of a request to look through.
        app.router.routes.extend(module.router.routes)
    answer_errors(app)
    describe_api(app)
    # Around the app and not within it: a request that goes past FastAPI passes these as well.
    served: ASGIApp = Access(
        Direct(app, HeadAsGet(app)),
        Keys.of(settings),
        origins=settings.cors_origins,
        rate_limit=settings.rate_limit,
        max_body=settings.max_body_mb << 20,
    )
    if settings.cors_origins:
        served = CORSMiddleware(
            served,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After", "Pending-Embeddings"],
        )
    return Telemetry(served, metrics)


class _Server(uvicorn.Server):
    """Says where it listens once it answers."""

    url = ""
    closing = threading.Event()
    memory: Memory | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is loaded by now stays: the collector need not look at it again, nor every few requests at what they
        # leave behind, which is free of cycles. It would hold every request for up to a tenth of a second.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_EVERY)
        sys.setswitchinterval(_SWITCH_SECONDS)
        if self.started:
            announce(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.closing.set()
        if self.memory is not None:
            # Requests that wait for a score are answered without it, instead of being cut off.
            self.memory.hurry()
        await super().shutdown(sockets)


def serve(settings: Settings, embedder: Embedder) -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests in progress.

    Raises:
        BusyError: the port is taken, or the address is not ours.
        StoreError: the store cannot be opened.
        UsageError: the store has no such form, other machines could ask without a key, or the judge's endpoint cannot
            be.
    """
    given = settings.database
    keys = Keys.of(given)
    judger = _judger(settings) if given.judge == "llm" else None
    listener = _listen(given.host, given.port)
    try:
        require_key(listener.getsockname()[0], keys)
        listener.listen(256)
        memory = Memory(open_store(given), embedder, given, judger)
        host, port = listener.getsockname()[:2]
        closing = threading.Event()
        config = uvicorn.Config(
            create_app(memory, port, closing),
            http=EnvelopeProtocol,
            # Its lines go where ours go, in the same form.
            log_config=None,
            log_level="warning",
            access_log=False,
            # The log names who connects. What a header says of it is nobody's word.
            proxy_headers=False,
            timeout_graceful_shutdown=5,
        )
        server = _Server(config)
        server.closing, server.memory = closing, memory
        server.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        # uvicorn raises the signal again after an orderly end; that end is what was asked for.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    finally:
        listener.close()


def _judger(settings: Settings) -> ModelJudger:
    """Its calls are recorded beside an SQLite store; those of a judge over MongoDB in the store's usage only."""
    file = settings.database.store.removeprefix("sqlite:///")
    beside = None if file == settings.database.store else Path(f"{file}.judge.jsonl")
    return open_judger(settings.llm, beside)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise cannot_listen(host, port, error) from error
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    exit_with_parent()
    parser = argparse.ArgumentParser(description="The architecture database: an HTTP API over SQLite or MongoDB.")
    try:
        settings, _ = parse(
            parser,
            argv,
            sections=["database", "services.embedding_url", "embedding", "llm"],
            short=["database.host", "database.port", "database.store"],
        )
        log_to_stderr(settings.database.log_format)
        with EmbeddingClient(settings) as embedder:
            serve(settings, embedder)
    except UsageError as error:
        return usage_exit(error)
    except AsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
