"""What the server says of itself: a line and an id for each request, and counters for Prometheus.

Lines hold no query, no body and no key: motivations, programs and secrets stay out of the log.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
import re
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from database.envelope import asked_path, mistake
from database.store import Session, UncountedError, Where

__all__ = ["Metrics", "Telemetry"]

_LOG = logging.getLogger("database.requests")
_ID = re.compile(r"[\w.:-]{1,64}")
_OWN_SCRIPTS = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"worker-src 'self' blob:; frame-ancestors 'none'"
)
"""The pages of the API's description load nothing from anywhere else."""
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 15.0, 30.0)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "asi_database_requests", "requests answered", ["method", "route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "asi_database_request_seconds",
            "seconds to answer",
            ["method", "route"],
            registry=self._registry,
            buckets=_BUCKETS,
        )
        self.running = Gauge("asi_database_requests_running", "requests in progress", registry=self._registry)
        # To find the series of a request takes longer than to count it.
        self._series = functools.lru_cache(maxsize=1024)(
            lambda method, route, status: (
                self.requests.labels(method, route, status),
                self.seconds.labels(method, route),
            )
        )
        self._stored = {
            name: Gauge(f"asi_database_{name}", text, registry=self._registry)
            for name, text in (
                ("elements", "elements stored"),
                ("candidates", "size of the candidate set"),
                ("pending_embeddings", "elements whose motivation is not embedded yet"),
                ("unscored", "elements without a score"),
            )
        }

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        requests, took = self._series(method, route, str(status))
        requests.inc()
        took.observe(seconds)

    def text(self, session: Session) -> bytes:
        """Everything, in Prometheus' text format, with what is stored now."""
        try:
            self._stored["elements"].set(session.count())
        except UncountedError:
            self._stored["elements"].set(math.nan)
        self._stored["candidates"].set(len(session.candidates()))
        self._stored["pending_embeddings"].set(session.count(Where(pending=True)))
        self._stored["unscored"].set(session.count(Where(unscored=True)))
        return generate_latest(self._registry)


class Telemetry:
    """ASGI middleware: X-Request-ID of the client, or a new one, on every answer; a log line; the counters."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        identity = sent if _ID.fullmatch(sent) else f"{random.getrandbits(128):032x}"
        scope.setdefault("state", {})["request_id"] = identity
        status = 0
        started = time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", identity.encode()), (b"x-content-type-options", b"nosniff")]
                if scope["path"] in ("/docs", "/redoc"):
                    own.append((b"content-security-policy", _OWN_SCRIPTS))
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        with self._metrics.running.track_inprogress():
            try:
                await self._app(scope, receive, answer)
            except asyncio.CancelledError:
                # Only a stopping server cancels, when it has waited long enough for a client that does not read its
                # answer or does not end its body. The task ends here, and the connection with it.
                _LOG.warning("%s is cut off: the server stops and its client keeps it waiting", identity)
            except Exception as error:
                # A mistake of ours in what stands around the app. The server hears of it as well.
                if not status:
                    await mistake(Request(scope), error)(scope, receive, answer)
                raise
            finally:
                self._record(scope, identity, status or 500, time.perf_counter() - started)

    def _record(self, scope: Scope, identity: str, status: int, seconds: float) -> None:
        method, route = scope["method"], getattr(scope.get("route"), "path", "none")
        # A client may invent methods, and each would be a series of its own.
        known = method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH") else "other"
        self._metrics.count(known, route, status, seconds)
        path = asked_path(scope)
        client = (scope.get("client") or ("",))[0]
        role = scope["state"].get("role")
        milliseconds = round(1000 * seconds, 2)
        _LOG.info(
            "%s %s %s %d %.2f ms %s",
            identity,
            known,
            path,
            status,
            milliseconds,
            client,
            extra={
                "request_id": identity,
                "method": known,
                "path": path,
                "route": route,
                "status": status,
                "milliseconds": milliseconds,
                "client": client,
                "role": role,
            },
        )
