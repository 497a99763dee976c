"""Routes that do little beside their work: the whole answer in one thread, the body read once.

What may wait has threads of its own (`database.routers.threads`).
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, get_type_hints

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.datastructures import DefaultPlaceholder
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError

from database.routers.listing import apart_if_large, json_answer
from database.routers.threads import Awaited, apart

__all__ = ["LONGEST_KEY", "ThreadRoute", "reads_body"]

LONGEST_KEY = 200
"""Characters of an Idempotency-Key."""
_LONG_BODY = 1 << 16
"""Bytes of a body that is read in a thread."""
B = TypeVar("B", bound=BaseModel)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ThreadRoute(APIRoute):
    """As FastAPI's own, but an answer is validated and written as JSON where it was found.

    FastAPI goes to a second thread for the validation and writes the JSON in the event loop, where every other request
    waits for it. Endpoints that are coroutines, or answer with a response, stay as they are.

    `handler` is what `database.direct` answers with in place of the endpoint, where `reads_body` gave one.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        given = options.get("response_model")
        if not inspect.iscoroutinefunction(endpoint) and not hasattr(endpoint, "dumps"):
            model = get_type_hints(endpoint, include_extras=True)["return"]
            if given is not None and not isinstance(given, DefaultPlaceholder):
                model = given
            if not (isinstance(model, type) and issubclass(model, Response)):
                endpoint = _dumped(endpoint, TypeAdapter(model))
            awaited: Awaited | None = getattr(
                endpoint, "awaited", None if options.get("methods") == ["GET"] else "store"
            )
            if awaited is not None:
                endpoint = _set_apart(endpoint, awaited)
            elif hasattr(endpoint, "dumps"):
                endpoint = apart_if_large(endpoint)
        # Existing clients send JSON without a content type as well.
        super().__init__(path, endpoint, **options | {"strict_content_type": False})
        self.handler: Handler | None = getattr(endpoint, "handler", None)


def reads_body(model: type[B], *, keyed: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a coroutine (memory, body, idempotency key) that stores one thing: its body goes from JSON to `model` in one
    pass, and its answer back.

    What FastAPI does in between (each parameter a dependency, JSON to dicts to the model and the answer likewise) takes
    longer than the write itself. The declared parameters still describe the route.

    Args:
        keyed: whether the coroutine takes the header's key; one whose body holds its key does not.
    """

    def decorate(endpoint: Callable[..., Awaitable[BaseModel]]) -> Callable[..., Any]:
        async def handler(request: Request) -> Response:
            key = request.headers.get("idempotency-key")
            if key is not None and not 1 <= len(key) <= LONGEST_KEY:
                raise _malformed(("header", "Idempotency-Key"), f"expected 1 to {LONGEST_KEY} characters")
            # Without a type, or with an empty one, it is taken for JSON: existing clients send that.
            kind = (request.headers.get("content-type") or "application/json").partition(";")[0].strip().lower()
            if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
                raise _malformed(("body",), f"expected application/json, got {kind}")
            body = await request.body()
            # No other request waits while a long body is read.
            given = _read(model, body) if len(body) <= _LONG_BODY else await run_in_threadpool(_read, model, body)
            answer = await endpoint(request.app.state.memory, given, *([key] if keyed else []))
            return Response(answer.model_dump_json(), media_type="application/json")

        endpoint.handler = handler  # type: ignore[attr-defined]
        return endpoint

    return decorate


def _read(model: type[B], text: bytes) -> B:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        if error.errors(include_url=False, include_context=False, include_input=False)[0]["type"] != "json_invalid":
            raise _unfit(error) from error
        # Python's parser takes what the quick one does not, such as half a surrogate pair, and the fields say what is
        # wrong with it, as on every other route.
        try:
            value = json.loads(text)
        except ValueError as wrong:
            raise _malformed(("body",), f"expected JSON, got {wrong}") from wrong
        except RecursionError as deep:
            raise _malformed(("body",), "its JSON is nested too deeply") from deep
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _unfit(error) from error


def _unfit(error: ValidationError) -> RequestValidationError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return RequestValidationError([item | {"loc": ("body", *item["loc"])} for item in found])


def _malformed(place: tuple[str, ...], message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": place, "msg": message, "type": "value_error"}])


def _set_apart(endpoint: Callable[..., Any], awaited: Awaited) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    async def run(**arguments: Any) -> Any:
        return await apart(awaited, endpoint, **arguments)

    return run


def _dumped(endpoint: Callable[..., Any], answers: TypeAdapter[Any]) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    def run(**arguments: Any) -> Response:
        found = endpoint(**arguments)
        if isinstance(found, Response):
            return found
        body = answers.dump_json(answers.validate_python(found), by_alias=True)
        response = json_answer(body)
        for given in arguments.values():
            # A response that the endpoint asked for carries headers.
            if isinstance(given, Response):
                response.headers.update(given.headers)
        return response

    run.dumps = True  # type: ignore[attr-defined]
    return run
