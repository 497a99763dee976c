"""What a request can do wrong. The API answers each with its status."""

from __future__ import annotations

from common.errors import AsiError

__all__ = ["ConflictError", "NotFoundError", "RefusedError", "StoppingError", "VanishedError", "key_used"]


class NotFoundError(AsiError):
    """A single thing that was asked for is not there: 404."""


class VanishedError(NotFoundError):
    """An element that was there when the work began is gone: another client deleted it. Worth a repetition."""


class ConflictError(AsiError):
    """The idempotency key was used before, for another request: 409."""


class RefusedError(AsiError):
    """The request is well-formed and cannot be done: 400."""


class StoppingError(AsiError):
    """The server stops, and waits no more for what the request needs: 503."""

    retry_after = 2

    def __init__(self) -> None:
        super().__init__("the server stops", "ask again once it was started again")


def key_used(key: str, what: str) -> ConflictError:
    return ConflictError(
        f"the idempotency key {key!r} was used before, for {what}", "send another key, or the request of the first time"
    )
