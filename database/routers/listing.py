"""Answers that are lists of whole elements: written one element at a time, and sent as their client reads.

Large ones are made by few threads of their own, so that quick answers stay quick, and lie in a temporary file until
they are sent: however many clients read slowly, they take no memory.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from contextvars import ContextVar
from typing import IO, Any, Literal

from anyio import to_thread
from fastapi import Response
from pydantic import TypeAdapter
from starlette.types import Receive, Scope, Send

from database.entries import with_score
from database.models import Element, ScoredElement
from database.routers.threads import apart
from database.store import Session

__all__ = ["apart_if_large", "json_answer", "listed"]

_LARGE = 4 << 20
"""Bytes of elements from which on an answer is large: 200 elements of 20 KB."""
_PIECE = 1 << 18
"""Bytes that are sent at once."""
_ELEMENT, _SCORED = TypeAdapter(Element), TypeAdapter(ScoredElement)
_PLACE: ContextVar[Literal["small", "file", "memory"]] = ContextVar("_PLACE", default="small")
"""Where the answer that is being made may lie; a small one in memory."""


class _LargeAnswerError(Exception):
    """The answer is large: it is to be made again, by a thread for those."""


class _NoFileError(Exception):
    """No temporary file can be written: the answer is to be made again, in memory."""


class _Pieces(Response):
    """A JSON answer that is sent piece by piece. uvicorn copies what a client does not read at once."""

    media_type = "application/json"

    def __init__(self, pieces: AsyncGenerator[bytes], length: int) -> None:
        super().__init__()
        self.headers["content-length"] = str(length)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def json_answer(body: bytes) -> Response:
    """An answer whose JSON is `body`."""
    if len(body) <= _PIECE:
        return Response(body, media_type="application/json")

    async def pieces() -> AsyncGenerator[bytes]:
        for start in range(0, len(body), _PIECE):
            yield body[start : start + _PIECE]

    return _Pieces(pieces(), len(body))


def listed(
    session: Session,
    indices: Sequence[int],
    scores: dict[int, float | None] | None = None,
    around: tuple[bytes, bytes] = (b"[", b"]"),
) -> Response:
    """The elements of `indices` as a JSON list, for an endpoint of a `ThreadRoute` that has no threads of its own.

    Args:
        scores: of a list of elements with their scores.
        around: what is written before and after them.
    """
    place = _PLACE.get()
    if place == "small" and session.weight_of(indices) > _LARGE:
        raise _LargeAnswerError
    parts = _written(session, indices, scores, around)
    return _in_file(parts) if place == "file" else json_answer(b"".join(parts))


def _written(
    session: Session, indices: Sequence[int], scores: dict[int, float | None] | None, around: tuple[bytes, bytes]
) -> Iterator[bytes]:
    yield around[0]
    between = b""
    for element in session.each(indices):
        yield between
        if scores is None:
            yield _ELEMENT.dump_json(element)
        else:
            yield _SCORED.dump_json(with_score(element, scores[element.index]))
        between = b","
    yield around[1]


def _in_file(parts: Iterable[bytes]) -> Response:
    try:
        with ExitStack() as held:
            file = held.enter_context(tempfile.TemporaryFile(buffering=_PIECE))
            file.writelines(parts)
            length = file.tell()
            file.seek(0)
            held.pop_all()
    except OSError as error:
        raise _NoFileError from error
    return _Pieces(_read(file), length)


async def _read(file: IO[bytes]) -> AsyncGenerator[bytes]:
    with file:
        while piece := await apart("file", file.read, _PIECE):
            yield piece


def apart_if_large(endpoint: Callable[..., Response]) -> Callable[..., Awaitable[Response]]:
    """An endpoint that is run in a common thread and, where its answer turns out to be large, by one of the few for
    those. What waits for them takes no thread."""

    @functools.wraps(endpoint)
    async def run(**arguments: Any) -> Response:
        try:
            return await to_thread.run_sync(functools.partial(endpoint, **arguments))
        except _LargeAnswerError:
            pass
        try:
            return await apart("large answer", _placed, "file", endpoint, arguments)
        except _NoFileError:
            return await apart("large answer", _placed, "memory", endpoint, arguments)

    return run


def _placed(place: Literal["file", "memory"], endpoint: Callable[..., Response], arguments: dict[str, Any]) -> Response:
    # A call in a thread has a context of its own.
    _PLACE.set(place)
    return endpoint(**arguments)
