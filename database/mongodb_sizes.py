"""The bytes of a MongoDB database, as its server says.

Not every server knows them without reading everything, and some answer nothing else meanwhile. So no question waits for
the answer: it is asked for in the background, given up after a moment, and kept with its date.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pymongo.errors import PyMongoError

__all__ = ["Measured", "ServerSizes"]

_LOG = logging.getLogger(__name__)
_KEPT_SECONDS = 10.0
_SHARE = 100
"""Of the time that the server takes to answer, how many times as long it is left alone after."""
_WAIT_SECONDS = 0.25
_PATIENCE_MS = 500
"""After which the server is to give up."""
_NAMES = ("dataSize", "storageSize", "indexSize")


@dataclass(frozen=True)
class Measured:
    """What the server said, in bytes, and when: UTC, "YYYY-MM-DD HH:MM:SS"."""

    said: dict[str, int]
    at: str


class ServerSizes:
    """Thread-safe.

    Args:
        ask: `dbStats`, given up after so many milliseconds. Called in a thread of its own.
    """

    def __init__(self, ask: Callable[[int], Mapping[str, Any]]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._kept: Measured | None = None
        self._due = 0.0
        self._answered = threading.Event()
        self._answered.set()
        self._closed = False
        self._quick = True
        """Whether the answer before came while it was waited for."""

    def latest(self) -> Measured | None:
        """What the server said last, a moment ago where it is quick; None until it has answered in time."""
        with self._lock:
            if self._answered.is_set() and not self._closed and time.monotonic() >= self._due:
                self._answered.clear()
                threading.Thread(target=self._run, name="sizes", daemon=True).start()
        self._answered.wait(_WAIT_SECONDS if self._kept is None or self._quick else 0.0)
        with self._lock:
            return self._kept

    def close(self) -> None:
        """Asks no more. Waits a moment for the answer under way: a server that gives up when it was asked to has
        answered by then, and that to another goes to nobody, when it comes or the driver gives up."""
        with self._lock:
            self._closed = True
        self._answered.wait(2 * _PATIENCE_MS / 1000)

    def _run(self) -> None:
        began = time.monotonic()
        kept = None
        try:
            told = self._ask(_PATIENCE_MS)
            at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
            kept = Measured({name: int(told[name]) for name in _NAMES if told.get(name) is not None}, at)
        except PyMongoError as error:
            _LOG.info("the server does not say its sizes: %s", str(error)[:300])
        finally:
            spent = time.monotonic() - began
            with self._lock:
                self._kept = kept or self._kept
                self._quick = spent < _WAIT_SECONDS
                self._due = time.monotonic() + max(_KEPT_SECONDS, _SHARE * spent)
                self._answered.set()
