"""Runs one command in a sandbox: `bubblewrap`, `docker`, or `process`, which only runs trusted programs. `auto` takes
the first of them whose probe job succeeds.

What `bubblewrap` and `docker` cover: no network (not even the host's loopback), own pid, ipc and uts namespaces,
another uid without capabilities, a system mounted read-only that holds the interpreter, the packages (without those
whose text is held out) and the few files of ours that a worker needs, no home, no /etc of the host, nothing in the
environment but what is listed, one temporary folder, limits on CPU and wall time, memory, disk, open files, processes
and output, a list of system calls that are refused, and the whole tree killed as one, with nothing left behind. What
they do not: the kernel is shared, so a kernel exploit gets out; timing and caches are visible. Where there is no
cgroup of version 2, a tree of processes may hold more memory than its limit until the host looks, ten times a second;
so it is with the number of files always. On a GPU there is no address-space limit, since CUDA reserves more than the
machine has: the host's look or the cgroup limits memory there, and nothing limits that of the card. The driver's device
files are visible, and of /sys the devices. `process` covers the limits only, which is why it refuses programs that
nobody vouches for.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from common.errors import SandboxError
from common.process import REPOSITORY
from training import bubblewrap, cgroup, docker_config, docker_sandbox
from training.bubblewrap import HELD_OUT_PACKAGES, driver_folders
from training.local_job import copy_readable, start_confined, start_limited
from training.programs import Program
from training.sandbox_job import Ending, Limits, SandboxedProcess
from training.worker.syscalls import outer

__all__ = [
    "HELD_OUT_PACKAGES",
    "Backend",
    "Ending",
    "Limits",
    "Sandbox",
    "SandboxedProcess",
    "choose",
    "on_device",
    "training_memory_mb",
    "worker_reads",
]

Backend = Literal["bubblewrap", "docker", "process"]
_FIRST_UID, _UIDS = 2_000_000_000, 100_000_000
_START_MB = 8192
"""Address space that importing torch takes before the worker sets the exact limit (measured: 3.1 GB for the CUDA
build)."""
_CUDA_MB, _CUDA_PROCESSES, _CUDA_FILES, _CUDA_ENTRIES = 8192, 256, 4096, 100_000
"""What a job on a GPU may use beyond (memory) or at least: libraries of CUDA count as memory once they are read, the
driver opens dozens of files a card, and every kernel that Triton compiles leaves about nine files for each way it is
tried. Estimates: no GPU was at hand."""


@dataclass
class Sandbox:
    """A backend that was seen to work here. Get one from `choose`.

    Attributes:
        backend: "bubblewrap", "docker" or "process".
        note: why `auto` did not take a better one, and the fix; empty otherwise.
        drop_uid: bubblewrap as root: the job gets a real uid of its own; else it is mapped to 65534 in a user
            namespace.
        device: "cpu" or "cuda".
        image: of docker.
        groups: folder where each job gets a cgroup of its own; None: the limits of each process have to do.
    """

    backend: Backend
    note: str = ""
    drop_uid: bool = False
    device: str = "cpu"
    image: str = docker_config.IMAGE
    groups: Path | None = None
    # The kernel's parent-death signal follows the thread that started the child, so one thread that lives as long as
    # this object and its jobs starts them all.
    _starter: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="sandbox-start"), repr=False, compare=False
    )
    _docker: docker_sandbox.Daemon | None = field(default=None, repr=False, compare=False)

    def admits(self, program: Program) -> bool:
        """Whether this backend may run `program`."""
        return self.backend != "process" or program.trust is not None

    def require(self, program: Program) -> None:
        """Raises:
        SandboxError: only a real sandbox may run `program`, and there is none.
        """
        if not self.admits(program):
            raise SandboxError(
                f"expected a real sandbox for {program.name}, which nobody vouches for; got the limited process"
                + (f" ({self.note})" if self.note else ""),
                f"{bubblewrap.FIX}; or, with docker, {docker_config.fix(self.image)}; or name it with --trust if you "
                "have read it",
            )

    def start(
        self,
        argv: Sequence[str],
        *,
        reads: Sequence[Path] = (),
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> SandboxedProcess:
        """Starts `argv` with pipes on stdin and stdout.

        Args:
            argv: where it starts with this interpreter, docker runs the image's.
            reads: host paths it may read, seen under the same names.
            env: all of its environment besides the few variables every job gets.
            limits: what it may use.

        Raises:
            SandboxError: it cannot be started.
        """
        limits = on_device(limits or Limits(), self.device).whole()
        reads = [Path(path) for path in reads]
        environment = {**_environment(self.device, self.backend), **(env or {})}
        if self.device == "cpu" and limits.memory_mb is not None:
            environment["ASI_MEMORY_MB"] = str(limits.memory_mb)
        start = {"bubblewrap": self._confined, "docker": self._contained, "process": self._limited}[self.backend]
        return start(list(argv), reads, environment, limits)

    def _confined(
        self, argv: list[str], reads: Sequence[Path], env: dict[str, str], limits: Limits
    ) -> SandboxedProcess:
        uid = _own_uid() if self.drop_uid else None
        places, copies = ({path: path for path in reads}, None) if uid is None else _copy_readable(reads)
        spec = {**self._limits(limits), "tasks": limits.processes} | ({} if uid is None else {"uid": uid})
        inner = _shimmed(sys.executable, spec, argv)

        def command(filter_fd: int | None, report_fd: int) -> list[str]:
            return bubblewrap.command(
                inner, places, env, limits.file_mb, uid is not None, self.device, filter_fd, report_fd
            )

        group = None if self.groups is None else cgroup.Group.make(self.groups, limits)
        try:
            handle = start_confined(self._run, command, outer(self.device), group, copies)
        except OSError as error:
            raise SandboxError(f"cannot start a bubblewrap job: {error}", bubblewrap.FIX) from error
        return SandboxedProcess(handle, limits, self)

    def _contained(
        self, argv: list[str], reads: Sequence[Path], env: dict[str, str], limits: Limits
    ) -> SandboxedProcess:
        if self._docker is None:
            self._docker = docker_sandbox.connect()
        if os.geteuid() == 0:
            uid = _own_uid()
            places, copies = _copy_readable(reads)
        else:  # no other uid could read what is private
            uid, places, copies = os.geteuid(), {path: path for path in reads}, None
        python = docker_config.PYTHON
        inner = _shimmed(
            python,
            {**self._limits(limits), "keep": ",".join(env)},
            [python, *argv[1:]] if argv[0] == sys.executable else argv,
        )
        config = docker_config.Job(inner, places, env, limits, uid, self.device, self.image, copies)
        return SandboxedProcess(self._docker.start(config), limits, self)

    def _limited(self, argv: list[str], reads: Sequence[Path], env: dict[str, str], limits: Limits) -> SandboxedProcess:
        inner = _shimmed(sys.executable, {**self._limits(limits), "parent": 1}, argv)
        group = None if self.groups is None else cgroup.Group.make(self.groups, limits)
        try:
            handle = start_limited(self._run, inner, {**env, "ASI_PARENT_PID": str(os.getpid())}, group)
        except OSError as error:
            raise SandboxError(f"cannot start a limited process: {error}", "see that this Python can be run") from error
        return SandboxedProcess(handle, limits, self)

    def _limits(self, limits: Limits) -> dict[str, int]:
        """What the shim sets, under its names."""
        spec = {
            "cpu": int(limits.cpu_seconds) + 1,
            "file": limits.file_mb << 20,
            "files": limits.files,
        }
        if self.device == "cpu" and limits.memory_mb is not None:
            spec["memory"] = (limits.memory_mb + _START_MB) << 20
        return spec

    def _run(self, command: list[str], env: Mapping[str, str], inherited: Sequence[int]) -> subprocess.Popen[bytes]:
        return self._starter.submit(_popen, command, env, inherited).result()


def choose(backend: str = "auto", device: str = "cpu", image: str = docker_config.IMAGE) -> Sandbox:
    """The best sandbox that works here, seen working by a probe job.

    Args:
        backend: "auto", "bubblewrap", "docker" or "process".
        device: "cpu" or "cuda", on which jobs compute.
        image: what docker runs.

    Raises:
        SandboxError: bubblewrap or docker was asked for and its probe fails: with the probe's error and the fix.
    """
    finders: dict[str, Callable[[], Sandbox]] = {
        "bubblewrap": functools.partial(_find_bubblewrap, device),
        "docker": functools.partial(_find_docker, device, image),
        "process": lambda: Sandbox("process", device=device, groups=cgroup.find()),
    }
    if backend in finders:
        return finders[backend]()
    if backend != "auto":
        raise SandboxError(f"expected auto, {', '.join(finders)}, got {backend!r}", "choose one of them")
    notes: list[str] = []
    for name in ("bubblewrap", "docker"):
        try:
            found = finders[name]()
            return replace(found, note="; ".join(notes))
        except SandboxError as error:
            notes.append(f"{error.message}; fix: {error.fix}")
    return replace(finders["process"](), note="; ".join(notes))


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


def _find_bubblewrap(device: str) -> Sandbox:
    if shutil.which("bwrap") is None:
        raise SandboxError("bubblewrap does not work here: the command bwrap is not installed", bubblewrap.FIX)
    groups = cgroup.find()
    errors = []
    for drop_uid in (True, False) if os.geteuid() == 0 else (False,):
        sandbox = Sandbox("bubblewrap", drop_uid=drop_uid, device=device, groups=groups)
        error = _probe(sandbox, ["-S", "-c", "import os, training; os.write(1, b'works')"], b"works")
        if error is None:
            return sandbox
        errors.append(error)
    raise SandboxError(f"bubblewrap does not work here: {errors[0]}", bubblewrap.FIX)


def _find_docker(device: str, image: str) -> Sandbox:
    daemon = docker_sandbox.connect()
    sandbox = Sandbox("docker", device=device, image=image, _docker=daemon)
    error = _probe(sandbox, ["-c", docker_config.PROBE], docker_config.expected())
    if error is not None:
        raise SandboxError(f"docker does not work here: {error}", docker_config.fix(image))
    return sandbox


def _probe(sandbox: Sandbox, arguments: Sequence[str], expected: bytes) -> str | None:
    """None when a job that imports our protocol's package and says what is `expected` does so, else what went wrong."""
    try:
        job = sandbox.start(
            [sys.executable, *arguments],
            reads=worker_reads(),
            limits=replace(Limits(), seconds=20, cpu_seconds=20),
        )
    except SandboxError as error:
        return error.message
    try:
        said = job.stdout.read(4096)
        job.wait(20)
        if said == expected:
            return None
        message = job.stderr_tail().strip()[-300:] or said.decode("utf-8", "replace").strip() or "no message"
        return f"its probe job ended with status {job.wait(0)}: {message}"
    finally:
        job.kill()


def _shimmed(python: str, spec: Mapping[str, object], argv: Sequence[str]) -> list[str]:
    """The command that sets limits and becomes `argv`."""
    return [python, "-I", "-S", str(bubblewrap.SHIM), *(f"{key}={value}" for key, value in spec.items()), "--", *argv]


def _own_uid() -> int:
    return _FIRST_UID + secrets.randbelow(_UIDS)


def _popen(command: list[str], env: Mapping[str, str], inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        pass_fds=inherited,
        cwd="/",
    )


def _environment(device: str, backend: Backend) -> dict[str, str]:
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
        if backend != "docker":  # which passes on the cards that are visible here, and has libraries of its own
            env |= {
                name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER") if name in os.environ
            }
            if folders := driver_folders():
                env["LD_LIBRARY_PATH"] = ":".join(map(str, folders))
    return env


def training_memory_mb(device: str, profile_mb: int, setting_mb: int) -> int:
    """`Limits.memory_mb` of a training job, from the profile's limits.memory_mb and sandbox.memory_mb. The setting is
    for CPU jobs, many of which may share a machine; on a GPU the profile's own number holds."""
    return min(profile_mb, setting_mb) if device == "cpu" else profile_mb


def on_device(limits: Limits, device: str) -> Limits:
    """What a job gets there: on a GPU more of what the driver, its threads and the compiled kernels take, each rank."""
    if device == "cpu":
        return limits
    memory = None if limits.memory_mb is None else limits.memory_mb + _CUDA_MB
    processes, files = max(limits.processes, _CUDA_PROCESSES), max(limits.files, _CUDA_FILES)
    return replace(limits, memory_mb=memory, processes=processes, files=files, entries=_CUDA_ENTRIES)


def _copy_readable(reads: Sequence[Path]) -> tuple[dict[Path, Path], Path | None]:
    try:
        return copy_readable(reads)
    except OSError as error:
        message = f"cannot read {error.filename} for a job: {error.strerror}"
        raise SandboxError(message, "see that it is there") from error
