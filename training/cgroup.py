"""One cgroup (version 2) a job, where the host lets us make one: memory and processes of the whole tree counted and
limited by the kernel, and all of it killed with one write.

Covers: memory of every process of the job together with its temporary files, which an address-space limit does not;
forks in any number. Does not cover: machines with cgroup version 1, or where neither our own group nor the one above
it hands down the memory and pids controllers and lets us write. There the limits of each process and the looks of the
host remain. Nothing is moved or enabled in groups that are not ours.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

from training.sandbox_job import Limits

__all__ = ["Group", "find"]

_START_MB = 1024
"""Memory of Python and torch themselves, with the pages of their libraries that the job reads first."""
_NAME = "asi-arch-"
_numbers = itertools.count(1)


def find(mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Path | None:
    """The folder in which groups can be made: our own group or the one above it.

    Only a group made and removed again proves that it can be: writable is what the mount, the kernel and a delegating
    manager say together.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return None
    group = mount / own.lstrip("/")
    for folder in (group, group.parent) if group != mount else (group,):
        try:
            handed_down = (folder / "cgroup.subtree_control").read_text().split()
        except OSError:
            continue
        if {"memory", "pids"} <= set(handed_down):
            made = Group.make(folder, Limits(memory_mb=64))
            if made is not None:
                _sweep(folder)
                made.remove()
                return folder
    return None


def _sweep(parent: Path) -> None:
    """Removes the empty groups of host processes that were killed."""
    for path in parent.glob(f"{_NAME}*"):
        owner = path.name.removeprefix(_NAME).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                path.rmdir()


@dataclass
class Group:
    """One job's group; remove it with `remove`."""

    path: Path

    @classmethod
    def make(cls, parent: Path, limits: Limits) -> Group | None:
        """A new group below `parent` with the limits of one job, None where that is not allowed."""
        path = parent / f"{_NAME}{os.getpid()}-{next(_numbers)}"
        made = cls(path)
        try:
            path.mkdir()
        except OSError:
            return None
        try:
            (path / "pids.max").write_text(str(limits.processes + 8))  # the sandbox itself has a few
            if limits.memory_mb is not None:
                memory = limits.memory_mb + limits.file_mb + _START_MB
                (path / "memory.max").write_text(str(memory << 20))
                for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
                    with contextlib.suppress(OSError):  # not on every kernel
                        (path / name).write_text(value)
        except OSError:
            made.remove()
            return None
        return made

    def entered(self, command: list[str]) -> list[str]:
        """`command`, started so that its first process is in the group before it has children."""
        return ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def starved(self) -> bool:
        """Whether the kernel killed in this group for lack of memory."""
        with contextlib.suppress(OSError, ValueError):
            for line in (self.path / "memory.events").read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1]) > 0
        return False

    def kill(self) -> None:
        """Kills every process in it (Linux 5.14; before, the caller's own kill has to do)."""
        with contextlib.suppress(OSError):
            (self.path / "cgroup.kill").write_text("1")

    def remove(self) -> None:
        """Removes it once it is empty, within two seconds."""
        self.kill()
        deadline = time.monotonic() + 2
        while True:
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.005)
