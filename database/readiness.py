"""Whether the store takes writes, found out by one, for whoever asks: a probe of a load balancer, or of a stranger."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from datetime import UTC, datetime

from database.store import Session, Store

__all__ = ["Readiness"]

_SHARED_SECONDS = 1.0


class Readiness:
    """Thread-safe. One write at most begins in a second, and none while another waits: all who ask meanwhile get what
    became of it, whether it was kept or refused."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._asked: Future[None] | None = None
        self._until = 0.0

    def require(self) -> None:
        """Returns when a write was kept, which began a second ago at the earliest or is the one under way.

        Raises:
            StoreError: it was not.
        """
        with self._lock:
            asked = self._asked
            if asked is None or (asked.done() and time.monotonic() >= self._until):
                asked = self._asked = self._store.submit(_write)
                self._until = time.monotonic() + _SHARED_SECONDS
        error = asked.exception()
        if error is not None:
            # Raised by everybody who asked, each of whom would add where.
            raise error.with_traceback(None)


def _write(session: Session) -> None:
    session.put_state("asked_ready", datetime.now(UTC).isoformat(timespec="seconds"))
