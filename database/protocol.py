"""uvicorn's HTTP/1.1 with two things of our own: its refusals are in the envelope, and an answer is one write."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from database.envelope import ErrorBody

__all__ = ["EnvelopeProtocol"]

_JOINED = 1 << 16
"""Bytes of a body that is copied behind its head."""


class EnvelopeProtocol(HttpToolsProtocol):
    """As uvicorn's, which says in the envelope too that something is no HTTP, or has a method that nobody knows."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Joining(transport, self.loop)))

    def send_400_response(self, msg: str) -> None:
        detail = f"{msg}\n  fix: send HTTP/1.1 with one of the methods in /docs"
        body = ErrorBody(message=msg, detail=detail).model_dump_json().encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head.encode() + body)
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
        if head:
            self._transport.write(head)
