"""Writes of many threads, kept together: one thread per store takes whatever waits and commits it as one group.

What the group costs once (a lock, an fsync) is shared. A write is answered only after the commit that holds it.

Clients that wait for their answers fall into two halves: while one half is committed, the other queues up, and each
commit carries half of what it could. So the writer waits a moment for those it has just answered to come again, never
longer than a share of what a commit takes, and only where so many wrote at the same time a moment ago.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

__all__ = ["GroupWriter", "Write"]

S = TypeVar("S")
_LARGEST_GROUP = 64
_PATIENCE = 0.5
"""Longest wait for more, as a share of the last commit's time."""
_LONGEST_PATIENCE = 0.005
_FADES = 0.9
"""How fast it is forgotten that many wrote at the same time, a group."""


@dataclass(frozen=True)
class Write(Generic[S]):
    """One unit of work, and where its outcome goes."""

    work: Callable[[S], Any]
    done: Future[Any] = field(default_factory=Future)

    def succeed(self, value: Any) -> None:
        if not self.done.cancelled():
            self.done.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self.done.cancelled():
            self.done.set_exception(error)


class GroupWriter(Generic[S]):
    """A thread that hands waiting writes to `commit`, in the order in which they came.

    Args:
        commit: keeps a group and gives each write its outcome; what it raises is the outcome of those without one.
        closed: the error of a write that comes after `close`.
    """

    def __init__(self, commit: Callable[[Sequence[Write[S]]], None], closed: Callable[[], BaseException]) -> None:
        self._commit = commit
        self._closed_error = closed
        self._waiting: queue.SimpleQueue[Write[S] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._open = 0
        """Writes without an outcome."""
        self._together = 0.0
        self._commit_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="group-writer", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[S], Any]) -> Future[Any]:
        write = Write(work)
        with self._lock:
            if self._closed:
                write.fail(self._closed_error())
            else:
                self._open += 1
                self._waiting.put(write)
        return write.done

    def close(self) -> None:
        """Returns when everything that was submitted has its outcome."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            group, ended = self._next()
            if not group:
                continue
            began = time.monotonic()
            try:
                self._commit(group)
            except BaseException as error:  # noqa: BLE001 - the boundary of a thread: whoever waits gets it
                for write in group:
                    if not write.done.done():
                        write.fail(error)
            self._commit_seconds = time.monotonic() - began
            with self._lock:
                self._together = max(self._open, self._together * _FADES)
                self._open -= len(group)

    def _next(self) -> tuple[list[Write[S]], bool]:
        """What waits, at least one; and whether the writer was closed."""
        first = self._waiting.get()
        if first is None:
            return [], True
        group = [first]
        until = time.monotonic() + min(_LONGEST_PATIENCE, _PATIENCE * self._commit_seconds)
        while len(group) < _LARGEST_GROUP:
            # A fraction of a client is none.
            patience = max(0.0, until - time.monotonic()) if len(group) + 0.5 < self._together else 0.0
            try:
                more = self._waiting.get(timeout=patience) if patience else self._waiting.get_nowait()
            except queue.Empty:
                break
            if more is None:
                return group, True
            group.append(more)
        return group, False
