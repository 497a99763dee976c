"""Fresh processes of a program that hold the weights of its trained one.

Only parameters and buffers cross over: what the trained process keeps elsewhere (attributes, closures, files) does not.
The weights are hostile as all that a worker sends: names, sizes and number are bounded here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from common.errors import SandboxError
from training.scorer.client import CandidateFault, Worker
from training.scorer.confirm import UnrepeatableError
from training.scorer.heldout import ForgedError

__all__ = ["Fresh", "Weights", "read_weights", "write_weights"]

_SPARE_BYTES = 64 << 20
_TENSOR_BYTES = 1 << 10
"""What a tensor counts beside its values, so that empty ones are bounded too."""
_PART = 1 << 28
_LONGEST_NAME = 500
_DTYPES = frozenset(
    {"float16", "bfloat16", "float32", "float64", "complex64", "complex128", "int8", "int16", "int32", "int64"}
    | {"uint8", "bool"}
)


@dataclass(frozen=True)
class Weights:
    """Every parameter and buffer of a model: (name, dtype) and value of each."""

    tensors: list[tuple[str, str]]
    arrays: list[np.ndarray]


def read_weights(worker: Worker, parameters: int) -> Weights:
    """The weights of a trained model.

    Raises:
        ForgedError: they are not what a model of so many parameters has. UnrepeatableError: they are more than fresh
            processes are given.
    """
    wrong = ForgedError(f"expected the weights of a model with {parameters:,} parameters, got something else")
    most = 16 * parameters + _SPARE_BYTES
    weights, left = Weights([], []), most
    while True:
        meta, part = worker.call("train.read", {"from": len(weights.arrays)})
        left -= sum(array.nbytes + _TENSOR_BYTES for array in part)
        total, told = meta.get("total"), meta.get("tensors")
        if not isinstance(total, int) or not isinstance(told, list) or len(told) != len(part):
            raise wrong
        if left < 0 or total > most // _TENSOR_BYTES:
            raise UnrepeatableError(
                f"expected parameters and buffers of at most {most >> 20} MB in all ({_TENSOR_BYTES} bytes more for "
                f"each), got more, in {total:,} tensors: no fresh process can be given them, so no score can be "
                "audited; make fewer or smaller buffers"
            )
        for entry in told:
            if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(text, str) for text in entry):
                raise wrong
            if len(entry[0]) > _LONGEST_NAME or entry[1] not in _DTYPES:
                raise wrong
            weights.tensors.append((entry[0], entry[1]))
        weights.arrays.extend(part)
        if len(weights.arrays) >= total:
            return weights
        if not part:
            raise wrong


def write_weights(worker: Worker, weights: Weights) -> None:
    """Gives a freshly built model these weights.

    Raises:
        ForgedError: its parameters are others, so the program built another model than before. UnrepeatableError: it
            has no module for one of them, also after it ran.
    """
    arrays, at = weights.arrays, 0
    while at < len(arrays):
        size, stop = 0, at
        while stop < len(arrays) and (stop == at or size + arrays[stop].nbytes < _PART):
            size += arrays[stop].nbytes
            stop += 1
        last = stop == len(arrays)
        meta, _ = worker.call("train.write", {"tensors": weights.tensors[at:stop], "last": last}, arrays[at:stop])
        if meta.get("unplaced"):
            raise UnrepeatableError(
                f"a fresh process of the program, run once, has no module for {str(meta['unplaced'])[:300]}, which the "
                "trained model has, so no score can be audited; make modules in __init__ or in the first forward"
            )
        if meta.get("refused"):
            raise ForgedError(f"a fresh process builds another model: {str(meta['refused'])[:300]}")
        at = stop


class Fresh:
    """Makes such processes. Close it, and the one that waits ends.

    Args:
        start: starts a process, with nothing of the program, that may live for so many seconds.
        build: lets it load the program and build its model.
        seconds: from now on in which all these processes have to end, or the run takes as long as it makes them.

    Attributes:
        overlapped: seconds that starting took beside other work.
    """

    def __init__(self, start: Callable[[float], Worker], build: Callable[[Worker], None], seconds: float) -> None:
        self._start, self._build = start, build
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self._waiting: Future[Worker] | None = None
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="fresh-worker")
        self.overlapped = 0.0
        self._started: list[Worker] = []

    def begin(self) -> None:
        """Starts the next process beside other work. No code of the program runs in it before `open`."""
        if self._waiting is None:
            self._waiting = self._starter.submit(self._timed)

    def open(self, weights: Weights) -> Worker:
        """The next process, with these weights, which the caller closes.

        Raises:
            ForgedError, UnrepeatableError: they do not fit the model that it builds. CandidateFault: it fails, or there
                is no time left for it.
        """
        self.begin()
        assert self._waiting is not None
        begun = time.perf_counter()
        waiting, self._waiting = self._waiting, None
        worker = waiting.result()
        self.overlapped -= time.perf_counter() - begun
        try:
            self._build(worker)
            write_weights(worker, weights)
        except BaseException:
            worker.close()
            raise
        return worker

    def _timed(self) -> Worker:
        begun = time.perf_counter()
        left = self._end - time.monotonic()
        if left <= 0:
            raise CandidateFault("timeout", f"scoring and its audit did not end within {self._seconds:g} s")
        try:
            self._started.append(self._start(left))
            return self._started[-1]
        finally:
            self.overlapped += time.perf_counter() - begun

    def cpu_seconds(self) -> float:
        """Of all these processes so far, read by the host."""
        return sum(worker.cpu_seconds() for worker in self._started)

    def close(self) -> None:
        """Ends the process that waits. Those that were opened are their callers'."""
        if self._waiting is not None:
            with contextlib.suppress(CandidateFault, SandboxError):
                self._waiting.result().close()
        self._starter.shutdown()

    def __enter__(self) -> Fresh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
