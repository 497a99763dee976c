"""Routes that make their whole answer in the thread in which they ask the store."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from fastapi import Response
from fastapi.datastructures import DefaultPlaceholder
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

__all__ = ["ThreadRoute"]


class ThreadRoute(APIRoute):
    """As FastAPI's own, but an answer is validated and written as JSON where it was found.

    FastAPI goes to a second thread for the validation and writes the JSON in the event loop, where every other request
    waits for it. Endpoints that are coroutines, or answer with a response, stay as they are.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        given = options.get("response_model")
        if not inspect.iscoroutinefunction(endpoint) and not hasattr(endpoint, "dumps"):
            model = get_type_hints(endpoint, include_extras=True)["return"]
            if given is not None and not isinstance(given, DefaultPlaceholder):
                model = given
            if not (isinstance(model, type) and issubclass(model, Response)):
                endpoint = _dumped(endpoint, TypeAdapter(model))
        super().__init__(path, endpoint, **options)


def _dumped(endpoint: Callable[..., Any], answers: TypeAdapter[Any]) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    def run(**arguments: Any) -> Response:
        found = endpoint(**arguments)
        if isinstance(found, Response):
            return found
        body = answers.dump_json(answers.validate_python(found), by_alias=True)
        response = Response(body, media_type="application/json")
        for given in arguments.values():
            # A response that the endpoint asked for carries headers.
            if isinstance(given, Response):
                response.headers.update(given.headers)
        return response

    run.dumps = True  # type: ignore[attr-defined]
    return run
