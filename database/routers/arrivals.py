"""Results of other threads for coroutines: one wake-up of the event loop for all that came meanwhile.

`asyncio.wrap_future` wakes the loop for each result by itself. A commit brings the results of a whole group at once,
and every wake-up is a system call for which the thread that commits waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["arrived"]

T = TypeVar("T")


class _Arrivals:
    """What is done and not told yet, for one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._done: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._woken = False

    def put(self, waiting: asyncio.Future[Any], done: Future[Any]) -> None:
        """From any thread."""
        self._done.append((waiting, done))
        # Set after the append and cleared before the first is taken: nothing is left lying without a wake-up to come.
        if not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._woken = False
        while self._done:
            waiting, done = self._done.popleft()
            if waiting.done():
                continue  # whoever waited has left
            error = done.exception()
            if error is None:
                waiting.set_result(done.result())
            else:
                waiting.set_exception(error)


_OF: WeakKeyDictionary[asyncio.AbstractEventLoop, _Arrivals] = WeakKeyDictionary()


async def arrived(future: Future[T]) -> T:
    """What `future` gives, for a coroutine; what is waited for goes on where the coroutine is cancelled."""
    loop = asyncio.get_running_loop()
    arrivals = _OF.get(loop)
    if arrivals is None:
        arrivals = _OF[loop] = _Arrivals(loop)
    waiting: asyncio.Future[T] = loop.create_future()
    future.add_done_callback(lambda done: arrivals.put(waiting, done))
    return await waiting
