"""The worker: `python -m training.worker`, started by training/scorer/client.py inside the sandbox.

Answers calls on its standard input with frames on its standard output (training/protocol.py). Both are moved to other
descriptors before anything of the candidate runs, and 1 points to standard error, so prints cannot break a frame.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.process import exit_with_parent
from training.protocol import Channel, Frame, ProtocolError
from training.worker import syscalls
from training.worker.ranks import FollowerError, Ranks
from training.worker.state import Op, WorkerState

__all__ = ["main"]

MODULES = ("training.worker.inspection", "training.worker.train", "training.worker.decoding", "training.worker.weights")
"""Where operations are registered, each in a table OPS. Imported before the candidate, so that they hold torch
unpatched."""


def main() -> int:
    """Serves calls until the trusted side closes the pipe. Returns the exit status."""
    exit_with_parent()
    channel = Channel(os.dup(0), os.dup(1))
    with open(os.devnull) as null:  # noqa: PTH123
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)
    # The worker is killed when it is done, so a line that waits in a buffer would be lost.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    state = WorkerState(device=os.environ.get("ASI_DEVICE", "cpu"), ranks=Ranks.launch())
    # What is imported here stays: looking through it for garbage would take a seventh of the start, and time later.
    gc.disable()
    import torch  # captured by the operations before the candidate is imported

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    operations = _operations()
    gc.freeze()
    gc.enable()
    state.ranks.connect(state.device, channel)
    _limit_memory()
    if state.device == "cpu":
        syscalls.deny()
    while True:
        try:
            frame = channel.receive()
        except EOFError:
            return 0
        if not _answer(channel, state, operations, frame) and state.ranks.rank > 0:
            # The others wait for this rank's part; its end tells them.
            return 1


def _answer(channel: Channel, state: WorkerState, operations: dict[str, Op], frame: Frame) -> bool:
    """Answers one call; whether it succeeded."""

    def emit(meta: dict[str, Any], arrays: Sequence[np.ndarray] = (), /) -> None:
        channel.send(Frame("event", frame.id, frame.op, meta, list(arrays)))

    try:
        if frame.op not in operations:
            raise LookupError(f"the worker has no operation {frame.op!r}")
        shared = state.ranks.forward(frame)
        try:
            meta, arrays = operations[frame.op](state, frame.meta, frame.arrays, emit)
        except Exception as error:
            other = state.ranks.blame() if shared else None
            if other is None:
                raise
            raise other from error
        if shared:
            state.ranks.collect()
            if frame.op == "train.run":
                state.ranks.release()
        reply = Frame("reply", frame.id, frame.op, meta, [np.ascontiguousarray(array) for array in arrays])
        channel.send(reply)
    except ProtocolError:
        raise
    except FollowerError as error:
        channel.send(Frame("error", frame.id, frame.op, error.error))
        return False
    except BaseException as error:  # noqa: BLE001 - the process boundary: whatever the candidate raises becomes a reply
        channel.send(Frame("error", frame.id, frame.op, describe(error)))
        return False
    return True


def _operations() -> dict[str, Op]:
    found: dict[str, Op] = {}
    for name in MODULES:
        if importlib.util.find_spec(name) is not None:
            found |= importlib.import_module(name).OPS
    return found


def describe(error: BaseException) -> dict[str, Any]:
    """The exception as JSON: its type, message, the candidate's line where it arose, and the end of its traceback."""
    from training.worker.program import FILE

    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - a candidate's exception class may itself be broken
        message = "(its message cannot be shown)"
    lines = [item for item in traceback.extract_tb(error.__traceback__) if item.filename == FILE]
    memory = isinstance(error, MemoryError) or "allocate memory" in message or "out of memory" in message
    return {
        "type": type(error).__name__,
        "message": message[:2000],
        "line": lines[-1].lineno if lines else getattr(error, "lineno", None),
        "source": (lines[-1].line or "")[:200] if lines else None,
        "memory": memory,
        "traceback": "".join(traceback.format_exception(error)[-6:])[-4000:],
    }


def _limit_memory() -> None:
    """From here on, so many MB more than what Python and torch have mapped: what is mapped differs between builds."""
    allowed = os.environ.get("ASI_MEMORY_MB")
    if not allowed or not sys.platform.startswith("linux"):
        return
    import resource
    from pathlib import Path

    from training.worker.shim import limit

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit(resource.RLIMIT_AS, pages * resource.getpagesize() + (int(allowed) << 20))


if __name__ == "__main__":
    sys.exit(main())
