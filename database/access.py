"""Who may ask what: API keys, origins of web pages, requests a minute.

A key is a bearer token: one that reads and writes, and optionally one that only reads. Without keys everything may be
asked, which is only served on loopback addresses (`require_key`). What this covers: other machines, other users'
browsers, web pages opened on this machine, also those whose name was made to point here (DNS rebinding): without keys
the Host that is asked for has to be this machine or that of a named origin. What it does not: other programs of this
machine, while no key is set.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import UsageError
from common.knobs import Database as DatabaseSettings
from database.envelope import error_answer

__all__ = ["Access", "Keys", "require_key"]

Role = Literal["write", "read"]
_READING = ("GET", "HEAD", "OPTIONS")
_OPEN = ("/health", "/ready", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
"""Asked without a key: probes, and the description of the API, which holds no data."""
_OPEN_BELOW = "/static-offline-docs/"
_UNBOUNDED = "/v2/import"
_DIGITS = 18


@dataclass(frozen=True)
class Keys:
    """The keys of a server; None where there is none."""

    write: str | None
    read: str | None

    @classmethod
    def of(cls, settings: DatabaseSettings) -> Keys:
        """Raises UsageError for a key that no client can send."""
        found: dict[str, str | None] = {}
        for name in ("api_key", "read_key"):
            secret = getattr(settings, name)
            key = None if secret is None else secret.get_secret_value() or None
            if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
                raise UsageError(
                    f"database.{name}: expected printable ASCII without spaces, got something else",
                    "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
                )
            found[name] = key
        if found["api_key"] is None and found["read_key"] is not None:
            raise UsageError("database.read_key is set without database.api_key", "set both, or only database.api_key")
        return cls(found["api_key"], found["read_key"])

    def role(self, authorization: str) -> Role | None:
        """What the bearer of this Authorization header may do. Takes the same time whatever is wrong with it."""
        scheme, _, token = authorization.partition(" ")
        sent = token.strip().encode() if scheme.lower() == "bearer" else b""
        writes = hmac.compare_digest(sent, (self.write or "").encode())
        reads = hmac.compare_digest(sent, (self.read or "").encode())
        if not sent:
            return None
        return "write" if writes else "read" if reads else None


def require_key(address: str, keys: Keys) -> None:
    """Refuses to serve other machines without a key.

    Args:
        address: the numeric address that is listened on.

    Raises:
        UsageError: it is not a loopback address, and there is no key.
    """
    if keys.write is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise UsageError(
            f"the database would listen on {address}, where other machines reach it, without an API key",
            "set ASI_DATABASE__API_KEY (and ASI_DATABASE__READ_KEY for those who only read), or leave out --host",
        )


class Access:
    """ASGI middleware that refuses what may not be asked. The role goes into scope["state"]["role"].

    Args:
        origins: origins of web pages that may write, besides the server's own. Without keys the server may be asked for
            under their host names.
        rate_limit: requests a minute of one key; 0 for no limit. Only where keys are set.
        max_body: bytes of a body; an import is read line by line and may be longer.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, origins: Sequence[str] = (), rate_limit: int = 0, max_body: int = 1 << 26
    ) -> None:
        self._app = app
        self._keys = keys
        self._origins = frozenset(origins)
        self._hosts = frozenset(map(_host_name, origins)) - {None}
        self._limit = RateLimitItemPerMinute(rate_limit) if rate_limit and keys.write is not None else None
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
        elif scope["path"] == _UNBOUNDED:
            await self._app(scope, receive, send)
        else:
            await self._app(scope, self._bounded(receive), send)

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` that counts, for bodies that do not say how long they are."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body:
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _longer(self, length: str) -> bool:
        """Whether a Content-Length says that the body is too long. Python reads no number of thousands of digits."""
        digits = length.lstrip("0")
        return digits.isdecimal() and (len(digits) > _DIGITS or int(digits) > self._max_body)

    def _too_large(self) -> str:
        return f"expected a body of at most {self._max_body >> 20} MiB, got more"

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host")
        # HTTP/1.0 needs no Host; a browser always sends one.
        if self._keys.write is None and host is not None and not self._own_host(host):
            said = f"expected a Host of this machine, such as localhost, got {host[:200]!r}"
            fix = "set database.api_key, or name the origin of that host in database.cors_origins"
            return error_answer(403, said, f"{said}\n  fix: {fix}")
        writes = scope["method"] not in _READING
        if writes and not self._own_page(headers):
            said = f"a web page of {headers['origin']} may not write here"
            return error_answer(403, said, f"{said}\n  fix: name its origin in database.cors_origins")
        refused = self._refused_key(scope, headers, writes)
        if refused is None and scope["path"] != _UNBOUNDED and self._longer(headers.get("content-length", "")):
            return error_answer(413, self._too_large(), f"{self._too_large()}\n  fix: raise database.max_body_mb")
        return refused

    def _refused_key(self, scope: Scope, headers: Headers, writes: bool) -> Response | None:
        if self._keys.write is None or scope["path"] in _OPEN or scope["path"].startswith(_OPEN_BELOW):
            return None
        role = self._keys.role(headers.get("authorization", ""))
        scope.setdefault("state", {})["role"] = role
        # Guesses of a key are counted by address.
        limited = self._over_limit(role or f"address {(scope.get('client') or ('?',))[0]}")
        if limited is not None:
            return limited
        if role is None:
            said = "expected Authorization: Bearer KEY, with a key of this server"
            fix = "send the key in database.api_key (services.database_key for the pipeline)"
            return error_answer(401, said, f"{said}\n  fix: {fix}", {"WWW-Authenticate": "Bearer"})
        if writes and role == "read":
            said = "this key only reads"
            return error_answer(403, said, f"{said}\n  fix: send the key in database.api_key")
        return None

    def _own_host(self, host: str) -> bool:
        """Whether a request for this host and port is for this machine, or for a name of ours. A page whose name was
        made to point here could else read everything: to the browser of whoever opens it this is its own server."""
        name = _host_name(f"//{host}")
        return _is_loopback_name(name) or name in self._hosts

    def _own_page(self, headers: Headers) -> bool:
        """Whether a write comes from no web page, from one of ours, or from one that is named. A page of another
        origin could else write through the browser of whoever opens it."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return True
        scheme, _, asked = origin.partition("://")
        return scheme in ("http", "https") and asked == headers.get("host", "")

    def _over_limit(self, who: str) -> Response | None:
        if self._limit is None or self._limiter.hit(self._limit, who):
            return None
        wait = max(1, round(self._limiter.get_window_stats(self._limit, who).reset_time - time.time() + 0.5))
        said = f"expected at most {self._limit.amount} requests a minute, got more"
        detail = f"{said}\n  fix: wait {wait} s, or raise database.rate_limit"
        return error_answer(429, said, detail, {"Retry-After": str(wait)})


@functools.lru_cache(maxsize=64)
def _host_name(url: str) -> str | None:
    """The host of a URL, in lower case and without its port; None where it has none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


@functools.lru_cache(maxsize=64)
def _is_loopback_name(host: str | None) -> bool:
    if host is not None and (host == "localhost" or host.endswith(".localhost")):
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
