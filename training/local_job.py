"""Jobs that are processes of this machine: started by bubblewrap, or as a limited process.

Killing reaches everything of a job. With bubblewrap all of it lives in one pid namespace, which the kernel ends with
its first process; with a cgroup one write kills it; in the limited process, whatever left the group by a daemon's
double fork is found by a variable that only this job has in its environment (it can hide by starting a program without
it, which is one reason why that backend runs trusted programs only).

A scorer that is killed takes its jobs with it, but for the moment of their start: until bubblewrap has built the
sandbox its processes do not die with their parent, and one of them may wait for ever to be let into its namespace. So
whoever started the scorer ends what still bears its mark, and a scorer whose own parent is gone ends its jobs first.
Where both are killed at once, what was being started stays behind (nothing of a candidate is in it, and a worker ends
when its input does); it bears the name of its owner, and the next process that starts a job on this machine ends what
belongs to none that lives.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.errors import AsiError
from training.cgroup import Group
from training.usage import Usage, disk_usage, oom_kills, stat_fields, tree_usage

__all__ = [
    "SCORER",
    "Local",
    "abandon",
    "copy_readable",
    "kill_marked",
    "make_folder",
    "start_confined",
    "start_limited",
]

SCORER = "ASI_SCORER"
"""Variable by which a scorer and the bubblewrap jobs that it starts are known to whoever started it."""

Run = Callable[..., subprocess.Popen[bytes]]
"""Starts a process in a thread that lives as long as its jobs: a parent-death signal follows the thread."""
_TAG = "ASI_JOB"
_OWNER = "ASI_JOB_OWNER"
"""Variable that names the process to which a job belongs: namespace of its pid, pid, time of birth."""
_FOLDER = "asi-arch-job-"
_FOLDERS: set[Path] = set()
"""Temporary folders of jobs that this process has made and not yet removed."""
_GROUPS: set[int] = set()
"""Process groups of its jobs that were not yet cleaned up after."""


class Local:
    """The handle of a job that is a process here; see `training.sandbox_job.Handle`.

    Args:
        first: host pid of the first process of its pid namespace, if it has one.
        tag: value of the variable that marks its processes, if they have no pid namespace.
        folder: its temporary folder on the host, removed with it.
        copies: folder with copies of what it reads, removed with it.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        group: Group | None,
        first: int | None = None,
        tag: str = "",
        folder: Path | None = None,
        copies: Path | None = None,
    ) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._process, self._group, self._tag, self._folder, self._copies = process, group, tag, folder, copies
        self.pid = process.pid
        _GROUPS.add(self.pid)
        self.stdin, self.stdout, self.stderr = process.stdin, process.stdout, process.stderr
        self._oom_kills, self._starved = oom_kills(), False
        self._first = -1
        if first is not None:
            with contextlib.suppress(OSError):  # it has ended already
                self._first = os.pidfd_open(first)

    def wait(self) -> int:
        return self._process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._first >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
        if self._group is not None:
            self._group.kill()

    def usage(self, most: int) -> Usage:
        return tree_usage(self.pid, most)

    def scratch(self, pids: tuple[int, ...], enough: int) -> list[tuple[int, int]]:
        if self._folder is not None:
            return [disk_usage(self._folder, pids, enough)]
        found = []
        for place in ("tmp", "dev/shm"):
            for pid in reversed(pids[1:]):
                with contextlib.suppress(OSError):
                    path = f"/proc/{pid}/root/{place}"
                    # Until the sandbox is built, its processes still see the host's folder.
                    if os.stat(path).st_dev != os.stat(f"/{place}").st_dev:  # noqa: PTH116 - ten times a second
                        facts = os.statvfs(path)
                        found.append((0, facts.f_files - facts.f_ffree))  # their sizes are limits of the mounts
                        break
        return found

    def starved(self) -> bool:
        return self._starved or oom_kills() > self._oom_kills

    def clean(self) -> None:
        if self._first >= 0:
            # Readable once the first process is gone, and that goes after all others of its namespace.
            poller = select.poll()
            poller.register(self._first, select.POLLIN)
            poller.poll(5000)
            os.close(self._first)
            self._first = -1
        if self._tag:
            kill_marked(_TAG, self._tag)
        if self._group is not None:
            self._starved = self._group.starved()
            self._group.remove()
        for path in (self._folder, self._copies):
            if path is not None:
                _remove(path)
        _GROUPS.discard(self.pid)


def abandon() -> None:
    """Ends every job of this process and removes what they have on disk, without waiting: for a process that was told
    to end at once. What hides from its group dies with this process, as its parent."""
    for group in list(_GROUPS):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for folder in list(_FOLDERS):
        _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _FOLDERS.discard(folder)


def start_confined(
    run: Run,
    command: Callable[[int | None, int], list[str]],
    code: bytes | None,
    group: Group | None,
    copies: Path | None = None,
) -> Local:
    """Starts a bubblewrap job.

    Args:
        command: from the descriptor of the system call filter (None: no filter) and of the pipe for bubblewrap's own
            report, the command line.
        code: the filter.
        copies: folder to remove at the end.

    Raises:
        OSError, SandboxError: the command cannot be started.
    """
    _sweep_jobs()
    told, tell = os.pipe()
    inherited = [tell]
    loaded: int | None = None
    try:
        if code is not None:
            loaded, fill = os.pipe()  # far smaller than a pipe's buffer
            inherited.append(loaded)
            os.write(fill, code)
            os.close(fill)
        line = command(loaded, tell)
        # Of bubblewrap; the job in it has its own.
        env = {"PATH": os.defpath, SCORER: os.environ.get(SCORER, ""), _OWNER: _owner()}
        process = run(group.entered(line) if group is not None else line, env, inherited)
        _GROUPS.add(process.pid)
    except (AsiError, OSError):
        os.close(told)
        _give_up(group, copies)
        raise
    finally:
        for descriptor in inherited:
            os.close(descriptor)
    return Local(process, group, _first_process(told), copies=copies)


def _give_up(group: Group | None, folder: Path | None) -> None:
    if group is not None:
        group.remove()
    if folder is not None:
        _remove(folder)


def start_limited(run: Run, line: Sequence[str], env: Mapping[str, str], group: Group | None) -> Local:
    """Starts a limited process with a temporary folder of its own.

    Raises:
        OSError: the command cannot be started.
    """
    _sweep_jobs()
    folder = make_folder()
    tag = secrets.token_hex(16)
    env = {**env, "HOME": str(folder), "TMPDIR": str(folder), _TAG: tag, _OWNER: _owner()}
    if "TRITON_CACHE_DIR" in env:
        env["TRITON_CACHE_DIR"] = str(folder / "triton")
    try:
        process = run(group.entered(list(line)) if group is not None else list(line), env, ())
    except OSError:
        _give_up(group, folder)
        raise
    return Local(process, group, tag=tag, folder=folder)


def make_folder() -> Path:
    """A new temporary folder of this host process. Those of host processes that were killed are removed."""
    _sweep(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
    _FOLDERS.add(folder)
    return folder


def copy_readable(paths: Sequence[Path]) -> tuple[dict[Path, Path], Path | None]:
    """For a job with another uid: path -> where it finds it, and the folder with copies of those which only their
    owner may read (None when there is none). As root only: a job must not get root's uid to read them.
    """
    places, folder = {path: path for path in paths}, None
    for number, path in enumerate(paths):
        mode = path.stat().st_mode
        if mode & 0o004 and (mode & 0o001 or not path.is_dir()):
            continue
        folder = folder or make_folder()
        places[path] = copy = folder / str(number)
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copyfile(path, copy)
        for found in (copy, *copy.rglob("*")):
            found.chmod(0o755 if found.is_dir() else 0o644)
    return places, folder


def _first_process(told: int) -> int | None:
    """The pid in bubblewrap's report, None when it failed before it made the namespace. Closes the descriptor."""
    report = b""
    with contextlib.suppress(OSError):
        poller = select.poll()
        poller.register(told, select.POLLIN)
        deadline = time.monotonic() + 10
        while poller.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            part = os.read(told, 4096)
            report += part
            if not part or b"}" in part:
                break
    os.close(told)
    try:
        return int(json.loads(report)["child-pid"])
    except (ValueError, KeyError, TypeError):
        return None


@functools.cache
def _sweep(place: str) -> None:
    """Removes temporary folders of jobs whose host process was killed before it could. Once a process."""
    for folder in Path(place).glob(f"{_FOLDER}*-*"):
        owner = folder.name.removeprefix(_FOLDER).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def kill_marked(variable: str, value: str) -> bool:
    """Kills every process that was started with this variable in its environment; False where some may be left, since
    there were new ones at every look."""
    wanted = f"{variable}={value}".encode()
    return _kill_all(lambda environ: wanted in environ)


def _kill_all(meant: Callable[[bytes], bool]) -> bool:
    """Kills every process whose environment is `meant`, until two looks find none (True): a daemon may fork and end
    between the list of processes and the look at it. Gives up (False) after 50 looks."""
    empty = 0
    for _ in range(50):
        found = False
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if meant((entry / "environ").read_bytes()) and _born(entry.name) is not None:
                    os.kill(int(entry.name), signal.SIGKILL)
                    found = True
        empty = 0 if found else empty + 1
        if empty == 2:
            return True
        time.sleep(0.002)
    return False


@functools.cache
def _sweep_jobs() -> None:
    """Ends what is left of jobs whose owner was killed while it started them. Once a process."""
    _kill_all(_is_orphan)


def _is_orphan(environ: bytes) -> bool:
    for entry in environ.split(b"\0"):
        name, _, owner = entry.decode("utf-8", "replace").partition("=")
        if name == _OWNER:
            space, _, rest = owner.partition(":")
            pid, _, born = rest.partition(":")
            # A process writes its own environment. What is no name of ours says nothing, and neither does a pid of
            # another namespace, a container's.
            ours = all(part.isascii() and part.isdigit() for part in (space, pid, born))
            return ours and space == _pid_space() and _born(pid) != born
    return False


def _owner() -> str:
    pid = str(os.getpid())
    return f"{_pid_space()}:{pid}:{_born(pid) or ''}"


def _pid_space() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)  # noqa: PTH116
    except OSError:
        return ""


def _born(pid: str) -> str | None:
    """When a process began, in clock ticks since the machine did, by which another with its number is known; None
    where it has ended, or the system does not tell."""
    fields = stat_fields(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]
