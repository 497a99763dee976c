"""The trusted end of a worker: starts it in the sandbox, calls its operations, and never believes it lived."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from training.programs import Program
from training.protocol import Channel, Frame, ProtocolError
from training.sandbox import Ending, Limits, Sandbox, worker_reads

__all__ = ["CandidateFault", "OperationFailed", "Worker", "WorkerDied"]


_PIPE = 1 << 20


class CandidateFault(Exception):  # noqa: N818 - the candidate's fault, no error of ours
    """Something the candidate did. It becomes a refused check or a failed run and never leaves the training package.

    Attributes:
        reason: "crashed", "timeout", "memory", "output" or "killed".
        detail: what happened, for a person.
    """

    def __init__(self, reason: Ending, detail: str, stderr: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.stderr = reason, detail, stderr


class WorkerDied(CandidateFault):
    """The worker ended, hung, or sent something that is no frame. `stderr` is the end of what it wrote there.

    `from_outside`: it ended by a SIGKILL that was not ours, by somebody else's hand or its own: worth another try.
    """

    def __init__(self, reason: Ending, detail: str, stderr: str = "", *, from_outside: bool = False) -> None:
        super().__init__(reason, detail, stderr)
        self.from_outside = from_outside


class OperationFailed(CandidateFault):
    """An operation raised; the worker lives. `error` is {type, message, line, source, memory, traceback}."""

    def __init__(self, error: dict[str, Any], stderr: str = "") -> None:
        where = f" (line {error['line']})" if error.get("line") else ""
        detail = f"{error.get('type', 'Exception')}: {error.get('message', '')}{where}"
        super().__init__("memory" if error.get("memory") else "crashed", detail, stderr)
        self.error = error


class Worker:
    """One candidate in one sandboxed process. A context manager; not thread-safe, but `close` is from any thread.

    Args:
        sandbox: from `training.sandbox.choose`.
        program: its text is sent by `load`.
        reads, limits, env: as in `Sandbox.start`; our own files are added to `reads`.
        timeout, cpu_timeout: wall and CPU seconds of one call; None: only the limits of the whole job hold.

    Raises:
        SandboxError: this sandbox may not run the program, or cannot be started.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        program: Program,
        *,
        reads: Sequence[Path] = (),
        limits: Limits | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
        cpu_timeout: float | None = None,
    ) -> None:
        sandbox.require(program)
        self.program, self.timeout, self.cpu_timeout = program, timeout, cpu_timeout
        self.process = sandbox.start(
            [sys.executable, "-m", "training.worker"],
            reads=[*worker_reads(), *reads],
            env={"ASI_DEVICE": sandbox.device, **(env or {})},
            limits=limits,
        )
        _widen(self.process.stdout.fileno())
        self._channel = Channel(self.process.stdout.fileno(), self.process.stdin.fileno(), timeouts=True)
        self._ids = itertools.count(1)
        self._closed = threading.Event()

    def load(self, timeout: float | None = None) -> dict[str, Any]:
        """Sends the program and lets the worker execute it once. Raises as `call`."""
        return self.call("load", {"text": self.program.text}, timeout=timeout)[0]

    def call(
        self,
        op: str,
        meta: dict[str, Any] | None = None,
        arrays: Sequence[np.ndarray] = (),
        *,
        timeout: float | None = None,
        on_event: Callable[[dict[str, Any], list[np.ndarray]], None] | None = None,
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Runs one operation and returns its meta and arrays.

        Args:
            timeout: seconds until the worker is ended and `WorkerDied("timeout")` raised.
            on_event: called with the meta and the arrays of each event that comes before the reply.

        Raises:
            OperationFailed: it raised; the worker lives. WorkerDied: the worker does not.
        """
        number = next(self._ids)
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        if self.cpu_timeout is not None:
            self.process.allow(self.cpu_timeout)
        try:
            self._channel.send(Frame("call", number, op, meta or {}, list(arrays)), deadline)
            while True:
                frame = self._channel.receive(deadline)
                if frame.id != number:
                    raise ProtocolError(f"expected an answer to call {number}, got one to {frame.id}")
                if frame.kind == "event" and on_event is not None:
                    on_event(frame.meta, frame.arrays)
                if frame.kind == "reply":
                    return frame.meta, frame.arrays
                if frame.kind == "error":
                    raise OperationFailed(frame.meta, self.process.stderr_tail())
        except TimeoutError:
            self.process.kill("timeout")
            raise WorkerDied("timeout", f"{op} did not end within {limit:g} s", self.process.stderr_tail()) from None
        except ProtocolError as error:
            self.process.kill("crashed")
            raise WorkerDied(
                "crashed", f"malformed answer to {op}: {error.message}", self.process.stderr_tail()
            ) from None
        except (EOFError, OSError, ValueError) as error:
            raise self._died(op, error) from None

    def _died(self, op: str, error: BaseException) -> WorkerDied:
        if self.process.wait(5) is None:  # closed its pipe but lives on
            self.process.kill("crashed")
        reason = self.process.ending() or "crashed"
        code, limits = self.process.wait(0), self.process.limits
        said = {
            "timeout": f"over its limit of {limits.seconds:g} s wall or {self._cpu_limit():g} s CPU time during {op}",
            "output": f"over its limit of {limits.output_mb} MB of output during {op}",
            "memory": f"ended for lack of memory (status {code}) during {op}",
        }.get(reason, f"the process ended with status {code} during {op}")
        outside = reason == "crashed" and self.process.killed_from_outside()
        if outside:
            said = f"killed from outside (signal 9) during {op}"
        tail = self.process.stderr_tail()
        return WorkerDied("crashed" if reason == "finished" else reason, said, tail, from_outside=outside)

    def _cpu_limit(self) -> float:
        return min(self.process.limits.cpu_seconds, self.cpu_timeout or float("inf"))

    def cpu_seconds(self) -> float:
        """CPU seconds it used so far, read by the host."""
        return self.process.cpu_seconds()

    def peak_memory_mb(self) -> float:
        """The most MB that it and all it started held so far, read by the host now and then; a peak between two looks
        is missed."""
        return self.process.peak_memory_mb()

    def close(self) -> None:
        """Ends the worker and all it started. Repeating it does nothing."""
        if not self._closed.is_set():
            self._closed.set()
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            self.process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _widen(pipe: int) -> None:
    """Lets `pipe` hold a megabyte of logits: fewer changes between reader and writer. One that may not be widened (a
    user has so many bytes in pipes) stays as it is."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
