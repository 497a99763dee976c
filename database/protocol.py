"""uvicorn's HTTP/1.1 with three things of our own: refusals in the envelope, bounds of what comes beside a body, and an
answer in one write."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from database.envelope import ErrorBody

__all__ = ["EnvelopeProtocol"]

_MOST_BESIDE = 1 << 16
_HEAD_SECONDS = 20.0
_BODY_SECONDS = 60.0
_JOINED = 1 << 16
"""Bytes of a body that is copied behind its head."""


class EnvelopeProtocol(HttpToolsProtocol):
    """As uvicorn's, which says in the envelope too that something is no HTTP, or has a method that nobody knows.

    A connection ends whose URL and headers are more than 64 KiB, that brings more than 64 KiB without beginning a
    request, ending its head or bringing some of its body (trailers), or whose head is not complete 20 s after it began.
    All this is read before any key can be asked for, and a header is the slower to read the longer it is already.

    So does one whose body is awaited and brings nothing for 60 s. The time in which we do not read does not count.
    """

    _in_head = True
    _in_body = False
    _further = False
    """Whether the data that is read now brought the request on."""
    _beside = 0
    """Bytes since something did."""
    _piece = 0
    """Bytes of the data that did."""
    _long = False
    """Whether the head that is read now may be too long."""
    _late: asyncio.TimerHandle | None = None
    _stalls: asyncio.TimerHandle | None = None
    """One for all bodies of the connection that do not come with their head: it looks when the last data came."""
    _heard = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._joining = _Joining(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, self._joining))
        self._late = self.loop.call_later(_HEAD_SECONDS, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        if self._stalls is not None:
            self._stalls.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._further = False
        self._long = self._piece + self._beside + len(data) > _MOST_BESIDE
        super().data_received(data)
        if self._further:
            self._beside, self._piece = 0, len(data)
        else:
            self._beside += len(data)
        if self.transport.is_closing():
            return
        if self._beside > _MOST_BESIDE:
            self._too_long()
        elif self._in_head and self._late is None:
            self._late = self.loop.call_later(_HEAD_SECONDS, self._too_late)
        elif self._in_body:
            self._heard = self.loop.time()
            if self._stalls is None:
                self._stalls = self.loop.call_later(_BODY_SECONDS, self._stalled)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._further = True

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body, self._further = False, True, True
        self._in_time()
        if self._long and len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > _MOST_BESIDE:
            self._too_long()
            raise ValueError  # so that the parser stops
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._further = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse("400 Bad Request", msg, "send HTTP/1.1 with one of the methods in /docs")

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _answering(self) -> bool:
        """Whether an answer is being sent, or is due before that of what comes now: ours would be taken for a part of
        it."""
        cycle: Any = self.cycle
        if self.pipeline:
            return True
        return cycle is not None and not cycle.response_complete and (cycle.response_started or not self._in_body)

    def _too_late(self) -> None:
        self._late = None
        if self._answering():
            self._late = self.loop.call_later(_HEAD_SECONDS, self._too_late)
            return
        said = f"expected the head of a request within {_HEAD_SECONDS:g} s"
        self._refuse("408 Request Timeout", said, "send it at once")

    def _too_long(self) -> None:
        said = f"expected at most {_MOST_BESIDE >> 10} KiB of headers, got more"
        self._refuse("431 Request Header Fields Too Large", said, "send fewer and shorter headers")

    def _stalled(self) -> None:
        self._stalls = None
        if not self._in_body or self.transport.is_closing():
            return
        now = self.loop.time()
        # A client that waits for an earlier answer, or to be told to send its body, is kept waiting by us as well.
        ours = self.flow.read_paused or bool(self.pipeline) or self.cycle.waiting_for_100_continue
        since = now if ours else max(self._heard, self._joining.resumed)
        left = since + _BODY_SECONDS - now
        if left > 0:
            self._stalls = self.loop.call_later(left, self._stalled)
        else:
            said = f"expected more of the body within {_BODY_SECONDS:g} s"
            self._refuse("408 Request Timeout", said, "send it without such pauses")

    def _refuse(self, status: str, message: str, fix: str) -> None:
        if self._answering():
            self.transport.close()
            return
        body = ErrorBody(message=message, detail=f"{message}\n  fix: {fix}").model_dump_json().encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(f"HTTP/1.1 {status}\r\n{head}".encode() + body)
        self.transport.close()


class _Joining:
    """A transport that sends the head of an answer with the first of its body, or alone where none follows at once.

    uvicorn writes them one after the other. Each write is a system call, and a packet for which the client wakes up.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self.resumed = 0.0
        """When the client could go on: it was read on after it was not, or told to send its body."""

    def resume_reading(self) -> None:
        self.resumed = self._loop.time()
        self._transport.resume_reading()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._transport.is_closing():
            return  # the client left, which is no mistake
        head, self._head = self._head, b""
        if head:
            if len(data) <= _JOINED:
                data = head + data
            else:
                self._transport.write(head)
        elif data.startswith(b"HTTP/"):
            self.resumed = self._loop.time()
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self._transport.is_closing():
            self._transport.write(head)
