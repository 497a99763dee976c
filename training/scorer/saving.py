"""Takes a run's snapshots from the worker, bounds what arrives, and writes them while the run goes on.

What the worker sends is hostile: names, sizes and order are checked here, and what has another form is forged. Writing
happens in one thread of the scorer; a disk that is full costs the checkpoint, not the run.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from training import checkpoints
from training.checkpoints import Checkpoint, Identity
from training.scorer.client import Worker
from training.scorer.heldout import ForgedError

__all__ = ["Saver", "send"]

_NAME = re.compile(r"(weights|first|second|sums|counts|rng|rng_cuda|tensor\.\d{1,4})\Z")
_SPARE_BYTES = 64 << 20
_PART = 256 << 20
Facts = Callable[[int], Checkpoint]
"""What the trusted side knows of the run at a step, without tensors."""


@dataclass(frozen=True)
class Place:
    """Where a run's checkpoints go, and how many of them stay."""

    folder: Path
    identity: Identity
    last: int
    stable: frozenset[int] = frozenset()


class Saver:
    """Collects pieces into checkpoints. `close` waits until the last one is on the disk.

    Args:
        parameters: of the model as built; bounds what a checkpoint may hold.
        steps: of the whole run.
        facts: asked when a snapshot begins to arrive: what is known of the run at its step.
        say: told what could not be written.
    """

    def __init__(self, place: Place, parameters: int, start: int, steps: int, facts: Facts, say: Any) -> None:
        self._place, self._most = place, 16 * parameters + _SPARE_BYTES
        self._last, self._steps, self._facts, self._say = start, steps, facts, say
        self._open: Checkpoint | None = None
        self._parts: dict[str, list[np.ndarray]] = {}
        self._bytes = 0
        self._waiting: queue.Queue[Checkpoint | None] = queue.Queue(1)
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def piece(self, meta: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> None:
        """One event of the worker.

        Raises:
            ForgedError: it is no piece of a checkpoint of this run.
        """
        step, name = meta.get("step"), meta.get("name")
        if type(step) is not int or not isinstance(name, str) or not _NAME.match(name) or len(arrays) != 1:
            raise ForgedError(f"expected a piece of a checkpoint, got {str(dict(meta))[:200]}")
        if self._open is None:
            if not self._last < step <= self._steps:
                raise ForgedError(f"expected a checkpoint after step {self._last} and up to {self._steps}, got {step}")
            self._open = self._facts(step)
        elif step != self._open.step:
            raise ForgedError(f"expected the checkpoint of step {self._open.step} to be completed, got step {step}")
        self._bytes += arrays[0].nbytes
        if arrays[0].ndim != 1 or self._bytes > self._most:
            raise ForgedError(f"expected flat arrays of at most {self._most} bytes in a checkpoint, got more")
        self._parts.setdefault(name, []).append(arrays[0])
        if meta.get("last") is True:
            self._complete()

    def _complete(self) -> None:
        assert self._open is not None
        for name, parts in self._parts.items():
            if len({part.dtype for part in parts}) != 1:
                raise ForgedError(f"expected one dtype in {name} of a checkpoint")
        tensors = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        self._waiting.put(replace(self._open, tensors=tensors))
        self._last, self._open, self._parts, self._bytes = self._open.step, None, {}, 0

    def close(self) -> None:
        """Writes what is complete and ends."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (checkpoint := self._waiting.get()) is not None:
            try:
                checkpoints.write(self._place.folder, checkpoint)
                if checkpoint.step in self._place.stable:
                    checkpoints.write(self._place.folder, checkpoint, stable=True)
                checkpoints.prune(self._place.folder, self._place.last)
            except OSError as error:
                self._say(f"the checkpoint of step {checkpoint.step} was not written: {error.strerror or error}")


def send(worker: Worker, checkpoint: Checkpoint) -> None:
    """Gives the arrays of `checkpoint` to a worker whose model is built; `train.run` puts them in place."""
    for name, array in checkpoint.tensors.items():
        count = max(1, _PART // array.itemsize)
        for start in range(0, max(len(array), 1), count):
            worker.call("train.restore", {"name": name}, [array[start : start + count]])
