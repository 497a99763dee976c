"""Embedding that never holds a request up: bounded in time, and left for later when the embedding server is not
there."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np

from common.embeddings import Embedder
from common.errors import ServiceError

__all__ = ["EmbeddingGuard"]

_LOG = logging.getLogger(__name__)
_WAIT_SECONDS = 12.0
_REMEMBERED = 256
_AT_ONCE = 4


class EmbeddingGuard:
    """Asks the embedder in a thread of its own and gives up after 12 s; then rests, so that each request does not wait
    again. The queries asked last are remembered.

    The threads are daemons: the end of the process waits for none of them.

    Args:
        rest: seconds until an embedder that failed is asked again.
    """

    def __init__(self, embedder: Embedder, rest: float = 2.0) -> None:
        self._embedder = embedder
        self._rest_seconds = rest
        self._places = threading.Semaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._rest_until = 0.0
        self._closed: Future[Any] = Future()
        self._known: OrderedDict[str, tuple[str, np.ndarray]] = OrderedDict()
        self.last_error: str | None = None

    @property
    def resting(self) -> bool:
        """Whether nothing is asked now: the embedder failed a moment ago, or this is closed."""
        with self._lock:
            return self.closed or time.monotonic() < self._rest_until

    @property
    def closed(self) -> bool:
        return self._closed.done()

    def windows(self, texts: Sequence[str]) -> tuple[str, list[np.ndarray]] | None:
        """The model's name and the windows of each text, float32 [w_i, dimension]; None when they cannot be had now."""
        if self.resting:
            return None
        future: Future[tuple[str, list[np.ndarray]]] = Future()
        threading.Thread(target=self._answer, args=(future, list(texts)), name="embedding", daemon=True).start()
        both: list[Future[Any]] = [future, self._closed]
        wait(both, _WAIT_SECONDS, FIRST_COMPLETED)
        if self.closed:
            return None
        try:
            return future.result(0)
        except FutureTimeoutError:
            self._rest(f"no answer in {_WAIT_SECONDS:g} s")
        except ServiceError as error:
            self._rest(error.message)
        return None

    def query(self, text: str) -> tuple[str, np.ndarray] | None:
        """As `windows` of one text; those asked for last are remembered."""
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
                return self._known[text]
        answer = self.windows([text])
        if answer is None:
            return None
        found = answer[0], answer[1][0]
        with self._lock:
            # Vectors of two models are not comparable.
            if any(model != found[0] for model, _ in self._known.values()):
                self._known.clear()
            self._known[text] = found
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return found

    def close(self) -> None:
        """Whoever waits for an answer gets none, at once."""
        if not self.closed:
            self._closed.set_result(None)

    def _answer(self, future: Future[tuple[str, list[np.ndarray]]], texts: list[str]) -> None:
        try:
            # Whoever asked is gone by then, so that an embedder that hangs is left with few questions.
            if not self._places.acquire(timeout=_WAIT_SECONDS):
                return
            try:
                found = self._embedder.windows(texts)
                model = self._embedder.model
            finally:
                self._places.release()
        except BaseException as error:  # noqa: BLE001 - the boundary of a thread: whoever waits gets it
            future.set_exception(error)
            return
        self.last_error = None
        future.set_result((model, found))

    def _rest(self, why: str) -> None:
        self.last_error = why
        _LOG.warning("motivations stay pending, the embedding server cannot be asked: %s", why)
        with self._lock:
            self._rest_until = time.monotonic() + self._rest_seconds
