"""The routes, by noun. Each translates between HTTP and `database.memory`; what every route needs is here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from pydantic import BaseModel

from common.files import sha256_text
from database.memory import Memory
from database.models import ApiResponse
from database.store import Session

__all__ = ["ERRORS", "IdempotencyKey", "MemoryDep", "answered", "body_hash"]


async def _memory(request: Request) -> Memory:
    # A coroutine, so that it needs no thread of its own.
    memory: Memory = request.app.state.memory
    return memory


MemoryDep = Annotated[Memory, Depends(_memory)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=200,
        description="a repeated key is answered as the first request was, with another body it is refused (409)",
    ),
]

_ERROR = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["success", "message", "detail"],
                "properties": {
                    "success": {"type": "boolean", "const": False},
                    "message": {"type": "string"},
                    "detail": {"type": "string"},
                },
            }
        }
    }
}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the request cannot be done", **_ERROR},
    404: {"description": "there is no such thing", **_ERROR},
    409: {"description": "the idempotency key was used before, for another request", **_ERROR},
    422: {"description": "an argument is malformed", **_ERROR},
    503: {"description": "the store or the embedding server is not there; try again", **_ERROR},
    507: {"description": "the disk is full; nothing was stored", **_ERROR},
}


def body_hash(body: BaseModel | None) -> str:
    """SHA-256 of what was asked for, whatever the order and spacing of its JSON."""
    return sha256_text("" if body is None else json.dumps(body.model_dump(mode="json"), sort_keys=True))


def answered(
    memory: Memory,
    request: Request,
    key: str | None,
    work: Callable[[Session], tuple[str, Any]],
    body: BaseModel | None = None,
) -> ApiResponse:
    """Runs a write that gives (message, data) once for each Idempotency-Key and wraps its answer.

    Raises:
        ConflictError: the key was used on this path with another body.
    """

    def run(session: Session) -> dict[str, Any]:
        message, data = work(session)
        return {"message": message, "data": data}

    return ApiResponse(**memory.once(f"{request.method} {request.url.path}", key, run, body_hash(body)))
