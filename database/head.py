"""HEAD, as probes send it: every GET route answers it with the same head and no body."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["HeadAsGet"]


class HeadAsGet:
    """ASGI middleware: `app` sees a GET, of whose answer only the head is sent. The request ends there, so that a
    stream without an end, or an export, does not go on for nobody."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        begun = False

        async def head(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                begun = True

        async def left() -> Message:
            # As if the client had left: what streams stops.
            return {"type": "http.disconnect"} if begun else await receive()

        # The route that is found goes into the state that the log reads: both scopes share it.
        as_get = {**scope, "method": "GET"}
        await self._app(as_get, left, head)
        scope["route"] = as_get.get("route")
