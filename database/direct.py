"""The way of a stored result: from the server straight to its handler, past the layers and the router of FastAPI.

Where many pipelines store, those layers take as long as the handler does, in the one loop that all requests share.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from database.routers.route import ThreadRoute

__all__ = ["Direct"]

_Told = Callable[[Request, Exception], Awaitable[Response]]


class Direct:
    """ASGI middleware: the routes of `app` that have a handler of their own are answered by it, as `app` would; all
    other requests go on to `rest`.

    Args:
        app: what it is told of errors, its handlers answer.
        rest: `app` itself, in what wraps it.
    """

    def __init__(self, app: FastAPI, rest: ASGIApp) -> None:
        self._app = app
        self._rest = rest
        self._routes = {
            (method, route.path): (route, route.handler)
            for route in app.routes
            if isinstance(route, ThreadRoute) and route.handler is not None and not route.param_convertors
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if found is None:
            await self._rest(scope, receive, send)
            return
        route, handler = found
        # The log and the counters ask for the route, the handlers of requests and of errors for the app.
        scope["app"], scope["route"] = self._app, route
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except Exception as error:
            told = self._app.exception_handlers
            kind = next(kind for kind in type(error).__mro__ if kind in told)
            if kind is Exception:
                # A mistake of ours, which is answered further out.
                raise
            response = await cast(_Told, told[kind])(request, error)
        await response(scope, receive, send)
