"""A running job of any backend: its pipes, its limits as the host enforces them, and the reason why it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from typing import IO, Literal, Protocol, get_args

from training.usage import Usage, own_memory

__all__ = ["REASONS", "Ending", "Handle", "Limits", "SandboxedProcess"]

Ending = Literal["finished", "crashed", "timeout", "memory", "output", "disk", "processes", "killed"]
"""How a job ended: by itself with status 0, by itself otherwise, over its limit of time, memory, output, disk or
processes, or ended by us."""
REASONS: tuple[Ending, ...] = get_args(Ending)

_TAIL = 16384
_POLL = 0.1
_START_BYTES = 768 << 20
"""Memory that Python and torch themselves hold (measured: 0.6 GB on CPU), beyond the limit of a job."""


@dataclass(frozen=True)
class Limits:
    """What one job may use.

    Attributes:
        seconds: wall time, enforced by the host.
        cpu_seconds: CPU time of the whole tree, enforced by the host; one process is also stopped by the kernel.
        memory_mb: memory beyond what the interpreter and torch map at start (None: no limit). Of the whole tree where
            the kernel counts it (cgroup v2, docker); else of each process (on CPU: CUDA reserves more address space
            than any limit could allow), and the host, which looks ten times a second, ends a tree that holds more.
        file_mb: size of one file; also the size of its temporary folder. The limited process has a folder on disk, at
            whose size the host looks ten times a second.
        output_mb: bytes on standard error.
        processes: processes and threads. Counted by the kernel for each uid but root's, so a sandbox with a uid of its
            own, or of an ordinary user, enforces it at once; elsewhere the host, which looks ten times a second, ends a
            job that has more.
        files: open files.
        entries: files and folders that it may make: each costs memory of the kernel that nothing else counts.
        ranks: processes that share the work of the job; memory_mb and processes are for each of them.
    """

    seconds: float = 600.0
    cpu_seconds: float = 600.0
    memory_mb: int | None = 4096
    file_mb: int = 256
    output_mb: int = 4
    processes: int = 64
    files: int = 256
    entries: int = 10_000
    ranks: int = 1

    def whole(self) -> Limits:
        """The same as limits of the job as one, in which the ranks are not told apart."""
        started = (self.ranks - 1) * (_START_BYTES >> 20)
        memory = None if self.memory_mb is None else self.memory_mb * self.ranks + started
        return replace(self, memory_mb=memory, processes=self.processes * self.ranks, ranks=1)


class Handle(Protocol):
    """What a backend gives for a started job."""

    pid: int
    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]

    def wait(self) -> int:
        """Its exit status, negative for a signal, once it ended."""

    def kill(self) -> None:
        """Ends everything of the job with SIGKILL. Returns at once; repeating it does nothing."""

    def usage(self, most: int) -> Usage:
        """What it uses now; once it has more than `most` tasks, of which so many may do. `pids` is empty where the
        host cannot see them."""

    def scratch(self, pids: tuple[int, ...], enough: int) -> list[tuple[int, int]]:
        """Bytes and entries of each of its temporary folders, which need not be counted beyond `enough`."""

    def starved(self) -> bool:
        """Whether the kernel ended something of it for lack of memory."""

    def clean(self) -> None:
        """Called once after the end: waits until nothing of it lives, and removes what it left."""


class SandboxedProcess:
    """A running job: pipes to its stdin and stdout, its usage, its end. Thread-safe; close it with `kill`.

    Args:
        owner: kept alive as long as the job, since the job may end with it.
    """

    def __init__(self, handle: Handle, limits: Limits, owner: object = None) -> None:
        self._handle, self.limits, self._owner = handle, limits, owner
        self.stdin, self.stdout = handle.stdin, handle.stdout
        self.pid = handle.pid
        self.started = time.monotonic()
        self._cpu, self._peak_bytes = 0.0, 0
        self._allowed = limits.cpu_seconds
        self._most_tasks = limits.processes + 8  # the sandbox itself has a few
        self._code: int | None = None
        self._reason: Ending | None = None
        self._exited, self._ended = threading.Event(), threading.Event()
        self._tail = bytearray()
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._drain, name=f"sandbox-stderr-{self.pid}", daemon=True)
        self._reader.start()
        for target in (self._reap, self._watch):
            threading.Thread(target=target, name=f"sandbox{target.__name__}-{self.pid}", daemon=True).start()

    def cpu_seconds(self) -> float:
        """CPU seconds of the whole tree so far, read by the host; after the end, the last reading."""
        self._look()
        return self._cpu

    def allow(self, cpu_seconds: float) -> None:
        """Ends the job, as over its limit of time, once it used so many CPU seconds more than at the last look, a
        tenth of a second ago. Calling it again replaces that; `Limits.cpu_seconds` holds in any case."""
        self._allowed = min(self.limits.cpu_seconds, self._cpu + cpu_seconds)

    def peak_memory_mb(self) -> float:
        """The most MB that the whole tree was seen to hold, a look now included."""
        self._look()
        return self._peak_bytes / 2**20

    def stderr_tail(self) -> str:
        """The last 16 KB of what it wrote to standard error."""
        return self._tail.decode("utf-8", "replace")

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit status (negative: a signal), or None when it still runs after `timeout` seconds."""
        self._ended.wait(timeout)
        return self._code if self._ended.is_set() else None

    def kill(self, reason: Ending = "killed") -> None:
        """Ends the whole group and waits for it. The first reason given is the one that `ending` tells."""
        self._end(reason)
        self._ended.wait(10)
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def ending(self) -> Ending | None:
        """Why it ended; None while it runs."""
        if not self._ended.is_set():
            return None
        if self._reason is not None:
            return self._reason
        if self._code == 0:
            return "finished"
        by_signal: dict[int, Ending] = {signal.SIGXCPU: "timeout", signal.SIGXFSZ: "disk"}
        for number, reason in by_signal.items():
            if self._code in (-number, 128 + number):
                return reason
        tail = self.stderr_tail()
        said = any(words in tail for words in ("bad_alloc", "MemoryError", "out of memory"))
        return "memory" if said or (self.killed_from_outside() and self._short_of_memory()) else "crashed"

    def killed_from_outside(self) -> bool:
        """Whether it ended by a SIGKILL that was not ours: of the kernel, of somebody else, or of its own."""
        killed = self._code in (-signal.SIGKILL, 128 + signal.SIGKILL)
        return self._ended.is_set() and self._reason is None and killed

    def _short_of_memory(self) -> bool:
        """Whether the kernel killed for lack of memory meanwhile, or the job was seen near its limit."""
        limit = self.limits.memory_mb
        return self._handle.starved() or (limit is not None and self._peak_bytes > 0.9 * (limit << 20))

    def _end(self, reason: Ending) -> None:
        with self._lock:
            if not self._exited.is_set() and self._reason is None:
                self._reason = reason
        self._handle.kill()

    def _look(self) -> Usage:
        if self._exited.is_set():
            return Usage(self._cpu)
        usage = self._handle.usage(self._most_tasks)
        self._cpu, self._peak_bytes = max(self._cpu, usage.seconds), max(self._peak_bytes, usage.held)
        return usage

    def _drain(self) -> None:
        total = 0
        with self._handle.stderr as pipe:
            while part := os.read(pipe.fileno(), 65536):
                total += len(part)
                self._tail = (self._tail + part)[-_TAIL:]
                if total > self.limits.output_mb << 20 and self._reason is None:
                    self._end("output")

    def _reap(self) -> None:
        """Waits for the end, apart from the looks at its usage, so that a short job is not held up by them."""
        self._code = self._handle.wait()
        self._exited.set()
        self._handle.kill()
        self._handle.clean()
        self._reader.join(5)
        self._ended.set()

    def _watch(self) -> None:
        while not self._exited.wait(_POLL):
            with contextlib.suppress(OSError, ValueError):
                # The clock first: on a machine that a job keeps busy, to look at it may take long.
                late = time.monotonic() - self.started > self.limits.seconds
                reason = "timeout" if late else self._over(self._look())
                if reason is not None:
                    self._end(reason)

    def _over(self, usage: Usage) -> Ending | None:
        """The limit that it is over now."""
        limits = self.limits
        if self._cpu > self._allowed:
            return "timeout"
        if usage.tasks > self._most_tasks:
            return "processes"
        if limits.memory_mb is not None:
            allowed = (limits.memory_mb << 20) + _START_BYTES
            if usage.held > allowed and (not usage.pids or own_memory(usage.pids) > allowed):
                return "memory"
        used = self._handle.scratch(usage.pids, limits.entries + 1)
        if any(size > limits.file_mb << 20 or entries > limits.entries for size, entries in used):
            return "disk"
        return None
