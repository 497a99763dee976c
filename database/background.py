"""Work that no request waits for: a thread that does one step after the other, and rests when there is none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from common.errors import AsiError

__all__ = ["Background"]

_LOG = logging.getLogger(__name__)
_GATHER_SECONDS = 0.02


class Background:
    """Calls `step` until it says that nothing is left, then again when woken, and at the latest after `rest` seconds,
    since other processes may have made work.

    Args:
        step: does a little and returns whether more can be done at once. What it raises is logged; it is tried again
            after `rest` seconds.
    """

    def __init__(self, name: str, step: Callable[[], bool], rest: float) -> None:
        self._name = name
        self._step = step
        self._rest = rest
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wanted.set()

    def close(self) -> None:
        """Returns when the step under way, if any, is done."""
        self._closing.set()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            if self._again():
                continue
            self._wanted.wait(self._rest)
            # What woke it seldom comes alone.
            self._closing.wait(_GATHER_SECONDS)
            self._wanted.clear()

    def _again(self) -> bool:
        """Whether the next step is to be done at once, after one that failed when it has rested."""
        try:
            return self._step()
        except AsiError as error:
            _LOG.warning("%s waits %g s: %s", self._name, self._rest, error)
        except Exception:  # noqa: BLE001 - the boundary of a thread: recorded, and tried again
            _LOG.exception("%s failed", self._name)
        self._closing.wait(self._rest)
        return True
