"""Threads for what may wait. The common ones, which quick answers need, are never all taken by it.

A question to the store takes milliseconds, and 40 threads are enough for all that ask at once. A write may wait seconds
for another process that holds the store, and what embeds for the embedding server: as many of either would leave no
thread for /health.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

__all__ = ["Awaited", "apart", "awaits"]

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Awaited = Literal["store", "embedding", "score", "large answer", "file"]
"""What is waited for: a write's turn, vectors, (a look at a time) an experiment's score, the turn of a large answer, or
(a piece at a time) what was written of one."""
_THREADS: dict[Awaited, int] = {"store": 40, "embedding": 40, "score": 4, "large answer": 2, "file": 4}
_LIMITERS: RunVar[dict[Awaited, CapacityLimiter]] = RunVar("_LIMITERS")
"""Of each event loop."""


async def apart(awaited: Awaited, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs `work` in one of the threads for what waits for `awaited`."""
    limiters = _LIMITERS.get(None)
    if limiters is None:
        limiters = {name: CapacityLimiter(number) for name, number in _THREADS.items()}
        _LIMITERS.set(limiters)
    return await to_thread.run_sync(partial(work, *args, **kwargs), limiter=limiters[awaited])


def awaits(awaited: Awaited) -> Callable[[F], F]:
    """Marks an endpoint that reads and may wait all the same, for `ThreadRoute`; one that writes needs no mark."""

    def mark(endpoint: F) -> F:
        endpoint.awaited = awaited  # type: ignore[attr-defined]
        return endpoint

    return mark
