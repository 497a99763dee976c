"""The routes, by noun. Each translates between HTTP and `database.memory`; what every route needs is here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, BeforeValidator
from starlette.convertors import PathConvertor, register_url_convertor

from common.files import sha256_text
from common.records import RunRecord, Usage
from database.answers import ApiResponse
from database.memory import Memory
from database.models import NewElement, StoredExperiment
from database.routers.arrivals import arrived
from database.routers.route import LONGEST_KEY
from database.store import Session

__all__ = ["IdempotencyKey", "MemoryDep", "Whole", "answered", "answered_before", "body_hash", "submitted"]

_LONG_RESULT = 1 << 16
"""Characters of a result that is read in a thread."""


class _Text(PathConvertor):
    """The rest of a path, with slashes and line breaks: a name is any text. Written {name:text}."""

    regex = "(?s:.*)"


register_url_convertor("text", _Text())


async def _memory(request: Request) -> Memory:
    # A coroutine, so that it needs no thread of its own.
    memory: Memory = request.app.state.memory
    return memory


MemoryDep = Annotated[Memory, Depends(_memory)]


def _in_digits(value: Any) -> Any:
    digits = value.removeprefix("-") if isinstance(value, str) else "0"
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError("expected a whole number in decimal digits, such as 7")
    return value


Whole = Annotated[int, BeforeValidator(_in_digits)]
"""A number in a path or query. Python would read 1_0 as 10, and "+1", " 1" and 1.0 as 1."""
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=LONGEST_KEY,
        description="a repeated key is answered as the first request was, with another body it is refused (409)",
    ),
]


def body_hash(body: BaseModel | Sequence[BaseModel] | None) -> str:
    """SHA-256 of what was asked for, whatever the order and spacing of its JSON."""
    if body is None:
        return sha256_text("")
    parts = (
        body.model_dump(mode="json") if isinstance(body, BaseModel) else [one.model_dump(mode="json") for one in body]
    )
    return sha256_text(json.dumps(parts, sort_keys=True))


def _asked(request: Request) -> str:
    """What a key stands for. Not of the request's URL, which leaves out tabs and line breaks."""
    return f"{request.method} {request.scope['path']}"


def answered(
    memory: Memory,
    request: Request,
    key: str | None,
    work: Callable[[Session], tuple[str, Any]],
    body: BaseModel | Sequence[BaseModel] | None = None,
) -> ApiResponse[Any]:
    """Runs a write that gives (message, data) once for each Idempotency-Key and wraps its answer.

    Raises:
        ConflictError: the key was used on this path with another body.
    """

    def run(session: Session) -> dict[str, Any]:
        message, data = work(session)
        return {"message": message, "data": data}

    return ApiResponse(**memory.once(_asked(request), key, run, body_hash(body)))


def answered_before(memory: Memory, request: Request, key: str | None) -> ApiResponse[Any] | None:
    """What `answered` said under this key; None the first time. For work that is done before its answer is kept, of
    requests without a body."""
    before = memory.repeated(_asked(request), key, body_hash(None))
    return None if before is None else ApiResponse(**before)


async def submitted(
    memory: Memory,
    element: NewElement,
    run: RunRecord | None = None,
    key: str | None = None,
    body: str | None = None,
    usage: Sequence[Usage] = (),
) -> StoredExperiment:
    """As `Memory.add`, for a coroutine. No other request waits while a long result is read."""
    given = (element, run, key, body, usage)
    if len(element.result.train) + len(element.result.test) > _LONG_RESULT:
        return await arrived(await run_in_threadpool(memory.submit, *given))
    return await arrived(memory.submit(*given))
