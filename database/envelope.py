"""The one error body, {success: false, message, detail}: what each error is answered with, and how OpenAPI says so.

Existing clients read `detail` as text.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from common.errors import AsiError, ServiceError, StoreError, first_line
from database.errors import ConflictError, NotFoundError, RefusedError, StoppingError
from database.store import StoreBusyError, StoreFullError, UncountedError

__all__ = ["REASONS", "ErrorBody", "answer_errors", "asked_path", "error_answer", "mistake"]

_LOG = logging.getLogger("database")


class ErrorBody(BaseModel):
    """Every error. `message` says in short what is wrong, `detail` also what to do."""

    success: Literal[False] = False
    message: str = Field(examples=["there is no element 7"])
    detail: str = Field(examples=["there is no element 7"])


REASONS = {
    400: "the request cannot be done",
    401: "an API key is needed, and none or an unknown one was sent",
    403: "the key only reads, or a web page of another origin asks",
    404: "there is no such thing",
    409: "the idempotency key was used before, for another request",
    413: "the body is larger than database.max_body_mb",
    422: "an argument is malformed",
    429: "more requests than database.rate_limit; Retry-After says when to come again",
    500: "a mistake of the server; its log has it under the reference given",
    503: "the store or the embedding server is not there, or the server stops; try again",
    507: "the disk is full; nothing was stored",
}


def error_answer(status: int, message: str, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body = ErrorBody(message=message, detail=detail)
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


def answer_errors(app: FastAPI) -> None:
    """Makes `app` answer everything that can go wrong with the one body."""
    for kind, status in (
        (NotFoundError, 404),
        (RefusedError, 400),
        (ConflictError, 409),
        (StoreFullError, 507),
        (StoreBusyError, 503),
        (StoreError, 503),
        (ServiceError, 503),
        (StoppingError, 503),
        (OverflowError, 422),
    ):
        app.add_exception_handler(kind, _handler(status))
    app.add_exception_handler(RecursionError, _too_deep)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _unexpected)


def _handler(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        if status >= 500 and not isinstance(error, UncountedError | StoppingError):
            _LOG.error("%s: %s", _asked(request), error)
        message = error.message if isinstance(error, AsiError) else str(error)
        after = error.retry_after if isinstance(error, StoreBusyError | StoppingError) else None
        return error_answer(status, message, str(error), None if after is None else {"Retry-After": str(after)})

    return handle


def asked_path(scope: Scope) -> str:
    """For the log: the path as it came, percent-encoded, so that no name breaks the line."""
    path: bytes = scope.get("raw_path", b"")
    return path.partition(b"?")[0].decode("ascii", "replace")[:500]


def _asked(request: Request) -> str:
    return f"{request.method} {asked_path(request.scope)}"


async def _too_deep(_: Request, __: Exception) -> Response:
    return error_answer(422, "an argument is malformed", "body: its JSON is nested too deeply")


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()[:10]]
    text = "; ".join(said).encode("utf-8", "replace").decode()
    return error_answer(422, "an argument is malformed", text)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = detail = str(error.detail)
    if error.status_code == 400 and isinstance(error.__cause__, ValueError | RecursionError):
        # FastAPI's own: the body is no JSON that Python can read.
        return error_answer(422, "an argument is malformed", f"body: expected JSON, got {first_line(error.__cause__)}")
    if detail == HTTPStatus(error.status_code).phrase and error.status_code in (404, 405):
        # The router's own: no route of this path, or none of this method.
        message = f"there is no route {request.method} {request.url.path}"
        detail = f"{message}\n  fix: see /docs for the paths and methods there are"
    return error_answer(error.status_code, message, detail, dict(error.headers or {}))


async def _left(_: Request, __: Exception) -> Response:
    # For the log and the counters: nobody reads it.
    return error_answer(400, "the client left", "the connection ended before the body did; send it again")


async def _unexpected(request: Request, error: Exception) -> Response:
    return mistake(request, error)


def mistake(request: Request, error: Exception) -> Response:
    """Records an error that nobody thought of, and answers it."""
    reference = getattr(request.state, "request_id", "no request")
    _LOG.error("%s failed, reference %s", _asked(request), reference, exc_info=error)
    said = f"an error of the server; its log has it under {reference}"
    # The server closes the connection after such an error: a client must not send its next request on it.
    return error_answer(500, "the server made a mistake", said, {"Connection": "close"})
