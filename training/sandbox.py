"""Runs one command in a sandbox: `bubblewrap` where a probe job succeeds, else `process`, which only runs trusted
programs.

What `bubblewrap` covers: no network (not even the host's loopback), own pid, ipc and uts namespaces, another uid
without capabilities, a system mounted read-only that holds the interpreter, the packages (without those whose text is
held out) and the few files of ours that a worker needs, no home, no /etc but the loader's cache, a cleared
environment, one writable folder, limits on CPU and wall time, memory, file size, open files, processes and output,
and the whole tree killed as one. What it does not: the kernel is shared, so a kernel exploit gets out; timing and
caches are visible; memory of files in /tmp counts against its own small limit and not against the memory limit. On a
GPU there is no address-space limit, since CUDA reserves more than the machine has, and the driver's device files are
visible. `process` covers the limits only, which is why it refuses programs that nobody vouches for.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from common.errors import SandboxError
from common.process import REPOSITORY
from training import bubblewrap
from training.bubblewrap import HELD_OUT_PACKAGES
from training.programs import Program
from training.usage import oom_kills, tree_usage

__all__ = ["HELD_OUT_PACKAGES", "Ending", "Limits", "Sandbox", "SandboxedProcess", "choose", "worker_reads"]

Ending = Literal["finished", "crashed", "timeout", "memory", "output", "killed"]
"""How a job ended: by itself with status 0, by itself otherwise, over its time, memory or output limit, or ended by
us."""

_TAIL = 16384
_FIRST_UID, _UIDS = 2_000_000_000, 100_000_000


@dataclass(frozen=True)
class Limits:
    """What one job may use.

    Attributes:
        seconds: wall time, enforced by the host.
        cpu_seconds: CPU time of the whole tree, enforced by the host; one process is also stopped by the kernel.
        memory_mb: memory beyond what the interpreter and torch map at start (CPU only; None: no limit).
        file_mb: size of one file; the temporary folder of the sandbox has this size at most.
        output_mb: bytes on standard error.
        processes: processes and threads. Counted by the kernel for each uid, so only a real sandbox enforces it.
        files: open files.
    """

    seconds: float = 600.0
    cpu_seconds: float = 600.0
    memory_mb: int | None = 4096
    file_mb: int = 256
    output_mb: int = 4
    processes: int = 64
    files: int = 256


class SandboxedProcess:
    """A running job: pipes to its stdin and stdout, its usage, its end. Thread-safe; close it with `kill`."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits, owner: Sandbox) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._process, self.limits, self._owner = process, limits, owner
        self.stdin, self.stdout = process.stdin, process.stdout
        self.pid = process.pid
        self.started = time.monotonic()
        self._cpu, self._peak_bytes, self._oom_kills = 0.0, 0, oom_kills()
        self._reason: Ending | None = None
        self._ended = threading.Event()
        self._tail = bytearray()
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._drain, name=f"sandbox-stderr-{self.pid}", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name=f"sandbox-watch-{self.pid}", daemon=True)
        self._reader.start()
        self._watcher.start()

    def cpu_seconds(self) -> float:
        """CPU seconds of the whole tree so far, read by the host from /proc; after the end, the last reading."""
        with contextlib.suppress(OSError, ValueError):
            seconds, held = tree_usage(self.pid)
            self._cpu, self._peak_bytes = max(self._cpu, seconds), max(self._peak_bytes, held)
        return self._cpu

    def stderr_tail(self) -> str:
        """The last 16 KB of what it wrote to standard error."""
        return self._tail.decode("utf-8", "replace")

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit status (negative: a signal), or None when it still runs after `timeout` seconds."""
        self._ended.wait(timeout)
        return self._process.returncode if self._ended.is_set() else None

    def kill(self, reason: Ending = "killed") -> None:
        """Ends the whole group and waits for it. The first reason given is the one that `ending` tells."""
        with self._lock:
            if not self._ended.is_set() and self._reason is None:
                self._reason = reason
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
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
        code = self._process.returncode
        if code == 0:
            return "finished"
        if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
            return "timeout"
        tail = self.stderr_tail()
        said = any(words in tail for words in ("bad_alloc", "MemoryError", "out of memory"))
        return "memory" if said or (self.killed_from_outside() and self._short_of_memory()) else "crashed"

    def killed_from_outside(self) -> bool:
        """Whether it ended by a SIGKILL that was not ours: of the kernel, of somebody else, or of its own."""
        killed = self._process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        return self._ended.is_set() and self._reason is None and killed

    def _short_of_memory(self) -> bool:
        """Whether the kernel killed for lack of memory meanwhile, or the job was seen near its limit."""
        limit = self.limits.memory_mb
        return oom_kills() > self._oom_kills or (limit is not None and self._peak_bytes > 0.9 * (limit << 20))

    def _drain(self) -> None:
        assert self._process.stderr is not None
        total = 0
        with self._process.stderr as pipe:
            while part := os.read(pipe.fileno(), 65536):
                total += len(part)
                self._tail = (self._tail + part)[-_TAIL:]
                if total > self.limits.output_mb << 20 and self._reason is None:
                    self._reason = "output"
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.pid, signal.SIGKILL)

    def _watch(self) -> None:
        while True:
            try:
                self._process.wait(0.25)
                break
            except subprocess.TimeoutExpired:
                pass
            late = time.monotonic() - self.started > self.limits.seconds
            if (late or self.cpu_seconds() > self.limits.cpu_seconds) and self._reason is None:
                self._reason = "timeout"
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
        # Nothing of the group may live on, also not in the process backend, where no pid namespace ends with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._reader.join(5)
        self._ended.set()


@dataclass
class Sandbox:
    """A backend that was seen to work here. Get one from `choose`.

    Attributes:
        backend: "bubblewrap" or "process".
        note: why `auto` did not take bubblewrap, and the fix; empty otherwise.
        drop_uid: as root, the job gets a real uid of its own; else it is mapped to 65534 in a user namespace.
        device: "cpu" or "cuda".
    """

    backend: Literal["bubblewrap", "process"]
    note: str = ""
    drop_uid: bool = False
    device: str = "cpu"
    # The kernel's parent-death signal follows the thread that started the child, so one thread that lives as long as
    # this object and its jobs starts them all.
    _starter: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="sandbox-start"), repr=False, compare=False
    )

    def admits(self, program: Program) -> bool:
        """Whether this backend may run `program`."""
        return self.backend == "bubblewrap" or program.trust is not None

    def require(self, program: Program) -> None:
        """Raises:
        SandboxError: only a real sandbox may run `program`, and there is none.
        """
        if not self.admits(program):
            raise SandboxError(
                f"expected a real sandbox for {program.name}, which nobody vouches for; got the limited process"
                + (f" ({self.note})" if self.note else ""),
                f"{bubblewrap.FIX}; or name it with --trust if you have read it",
            )

    def start(
        self,
        argv: Sequence[str],
        *,
        reads: Sequence[Path] = (),
        work: Path | None = None,
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> SandboxedProcess:
        """Starts `argv` with pipes on stdin and stdout.

        Args:
            reads: host paths it may read, seen under the same names.
            work: folder it may write, seen under the same name; its owner changes where the job gets a uid of its own.
            env: all of its environment besides the few variables every job gets.
            limits: what it may use.

        Raises:
            SandboxError: it cannot be started.
        """
        limits = limits or Limits()
        # A file that only its owner may read is unreadable for another uid; in a user namespace the uid stays the
        # owner's.
        drop = self.drop_uid and all(_readable_by_others(path) for path in reads)
        uid = _FIRST_UID + secrets.randbelow(_UIDS) if drop else None
        command = self._command(argv, reads, work, {**_environment(self.device), **(env or {})}, limits, uid)
        if work is not None and uid is not None:
            _give(work, uid)
        environment = {"PATH": os.defpath} if self.backend == "bubblewrap" else dict(command[1])
        try:
            process = self._starter.submit(_popen, command[0], environment).result()
        except OSError as error:
            raise SandboxError(f"cannot start a {self.backend} job: {error}", bubblewrap.FIX) from error
        return SandboxedProcess(process, limits, self)

    def _command(
        self,
        argv: Sequence[str],
        reads: Sequence[Path],
        work: Path | None,
        env: Mapping[str, str],
        limits: Limits,
        uid: int | None,
    ) -> tuple[list[str], Mapping[str, str]]:
        spec = {**asdict(limits), "uid": uid, "memory": self.device == "cpu", "count": self.backend == "bubblewrap"}
        inner = [sys.executable, "-I", "-S", str(bubblewrap.SHIM), json.dumps(spec), *argv]
        if self.backend == "process":
            return inner, {**env, "ASI_PARENT_PID": str(os.getpid())}
        return bubblewrap.command(inner, reads, work, env, limits.file_mb, uid is not None, self.device), env


def choose(backend: str = "auto", device: str = "cpu") -> Sandbox:
    """The best sandbox that works here, seen working by a probe job.

    Args:
        backend: "auto", "bubblewrap" or "process".
        device: "cpu" or "cuda", on which jobs compute.

    Raises:
        SandboxError: bubblewrap was asked for and its probe fails: with the probe's error and the fix.
    """
    if backend == "process":
        return Sandbox("process", device=device)
    if backend not in ("auto", "bubblewrap"):
        raise SandboxError(f"expected auto, bubblewrap or process, got {backend!r}", "choose one of them")
    errors = []
    for drop_uid in (True, False) if os.geteuid() == 0 else (False,):
        sandbox = Sandbox("bubblewrap", drop_uid=drop_uid, device=device)
        error = _probe(sandbox)
        if error is None:
            return sandbox
        errors.append(error)
    message = f"bubblewrap does not work here: {errors[0]}"
    if backend == "bubblewrap":
        raise SandboxError(message, bubblewrap.FIX)
    return Sandbox("process", note=f"{message}; fix: {bubblewrap.FIX}", device=device)


def worker_reads() -> list[Path]:
    """The files of ours that a worker needs; the sandbox mounts them and nothing else of the repository."""
    ours = (
        "common/__init__.py",
        "common/errors.py",
        "common/process.py",
        "training/__init__.py",
        "training/protocol.py",
    )
    return [REPOSITORY / name for name in (*ours, "training/worker", "training/fla_compat")]


def _probe(sandbox: Sandbox) -> str | None:
    """None when a job that imports our protocol's package and prints a word does so, else what went wrong."""
    if shutil.which("bwrap") is None:
        return "the command bwrap is not installed"
    try:
        job = sandbox.start(
            [sys.executable, "-S", "-c", "import os, training; os.write(1, b'works')"],
            reads=worker_reads(),
            limits=replace(Limits(), seconds=20, cpu_seconds=20),
        )
    except SandboxError as error:
        return error.message
    try:
        said = job.stdout.read()
        job.wait(20)
        if said == b"works":
            return None
        return f"its probe job ended with status {job.wait(0)}: {job.stderr_tail().strip()[-300:] or 'no message'}"
    finally:
        job.kill()


def _popen(command: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        cwd="/",
    )


def _environment(device: str) -> dict[str, str]:
    env = {
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
    }
    if device == "cpu":
        env["TORCHDYNAMO_DISABLE"] = "1"
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:
        env |= {"PATH": os.defpath, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TRITON_CACHE_DIR": "/tmp/triton"}
    return env


def _readable_by_others(path: Path) -> bool:
    mode = path.stat().st_mode
    return bool(mode & 0o004) and (not path.is_dir() or bool(mode & 0o001))


def _give(folder: Path, uid: int) -> None:
    """Makes `folder` and what lies in it the job's. Links are changed, never followed: a job may have planted them."""
    os.chown(folder, uid, uid, follow_symlinks=False)
    for root, folders, files in os.walk(folder, followlinks=False):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                os.chown(Path(root) / name, uid, uid, follow_symlinks=False)
