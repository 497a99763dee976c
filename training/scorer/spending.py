"""What the parts of scoring cost: wall seconds, and CPU seconds of the scorer and of the trained worker it asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Spending"]


class Spending:
    """Counts by part.

    Args:
        cpu_seconds: of the worker that is asked, so far.

    Attributes:
        seconds: part -> wall seconds, and part_cpu -> CPU seconds.
    """

    def __init__(self, cpu_seconds: Callable[[], float]) -> None:
        self._worker = cpu_seconds
        self._within = False
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """What is spent in here counts for `part`, also what other parts spend within it."""
        if self._within:
            yield
            return
        self._within, wall, cpu = True, time.perf_counter(), self._cpu()
        try:
            yield
        finally:
            self._within = False
            self.add(part, time.perf_counter() - wall, self._cpu() - cpu)

    def add(self, part: str, wall: float, cpu: float) -> None:
        """What was spent on `part` elsewhere."""
        for name, spent in ((part, wall), (f"{part}_cpu", cpu)):
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def _cpu(self) -> float:
        return time.process_time() + self._worker()
