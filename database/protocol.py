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
_JOINED = 1 << 16
"""Bytes of a body that is copied behind its head."""


class EnvelopeProtocol(HttpToolsProtocol):
    """As uvicorn's, which says in the envelope too that something is no HTTP, or has a method that nobody knows.

    A connection ends that brings more than 64 KiB without beginning a request, ending its head or bringing some of its
    body (headers, trailers), or whose head is not complete 20 s after it began. All this is read before any key can be
    asked for, and a header is the slower to read the longer it is already.
    """

    _in_head = True
    _further = False
    """Whether the data that is read now brought the request on."""
    _beside = 0
    """Bytes since something did."""
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Joining(transport, self.loop)))
        self._late = self.loop.call_later(_HEAD_SECONDS, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._further = False
        super().data_received(data)
        self._beside = 0 if self._further else self._beside + len(data)
        if self._beside > _MOST_BESIDE and not self.transport.is_closing():
            said = f"expected at most {_MOST_BESIDE >> 10} KiB of headers, got more"
            self._refuse("431 Request Header Fields Too Large", said, "send fewer and shorter headers")
        elif self._in_head and self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(_HEAD_SECONDS, self._too_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._further = True

    def on_headers_complete(self) -> None:
        self._in_head, self._further = False, True
        self._in_time()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._further = True
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse("400 Bad Request", msg, "send HTTP/1.1 with one of the methods in /docs")

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        said = f"expected the head of a request within {_HEAD_SECONDS:g} s"
        self._refuse("408 Request Timeout", said, "send it at once")

    def _refuse(self, status: str, message: str, fix: str) -> None:
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
