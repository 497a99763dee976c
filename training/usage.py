"""What a job and all below it use, read by the host from /proc; nothing where there is none."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HIDDEN", "Usage", "disk_usage", "oom_kills", "own_memory", "stat_fields", "tree_usage"]

HIDDEN = 1 << 30


@dataclass(frozen=True)
class Usage:
    """What a job uses at one moment.

    Attributes:
        seconds: user and system CPU time, of processes that ended too where somebody waited for them.
        held: bytes in memory. A page that two processes share counts twice.
        tasks: living processes and threads.
        pids: the processes, from the root down.
    """

    seconds: float = 0.0
    held: int = 0
    tasks: int = 0
    pids: tuple[int, ...] = ()


def oom_kills() -> int:
    """How often the kernel has killed for lack of memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def stat_fields(pid: int | str) -> list[str] | None:
    """What the kernel says of a process behind its name: 0 is the state, 1 the parent, and the fields of proc(5) have
    their number less 3. None where it is gone, or there is no /proc.

    The name may hold any bytes, brackets among them: a process gives it to itself.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].decode().split()
    except (OSError, IndexError):
        return None


def tree_usage(root: int, most: int | None = None) -> Usage:
    """What `root` and all that descends from it use. Ends once it has seen more than `most` tasks: to look at all of a
    fork bomb takes longer than the bomb takes to grow."""
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    seconds, held, tasks = 0.0, 0, 0
    pids: list[int] = []
    queue = [root]
    while queue and (most is None or tasks <= most):
        pid = queue.pop()
        if (fields := stat_fields(pid)) is None:
            continue
        pids.append(pid)
        # After the name: 11 to 14 are user, system and the two of children that were waited for.
        seconds += sum(map(int, fields[11:15])) / ticks
        tasks += int(fields[17])
        held += int(fields[21]) * page
        queue += _children(pid)
    return Usage(seconds, held, tasks, tuple(pids))


def _children(pid: int) -> list[int]:
    """Its child processes. Where the kernel keeps no list, the parent of every process is read."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
        return found
    if Path("/proc/self/task").is_dir() and not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        for entry in Path("/proc").iterdir():
            fields = stat_fields(entry.name) if entry.name.isdigit() else None
            if fields is not None and int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def own_memory(pids: Iterable[int]) -> int:
    """Bytes that these processes hold, each shared page divided among those that share it. Slower than `Usage.held`."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


def disk_usage(folder: Path, pids: Iterable[int] = (), enough: int = HIDDEN) -> tuple[int, int]:
    """Bytes on disk below `folder` and how many files and folders, links not followed. Files that were removed but
    are open in one of `pids` count. A folder that cannot be looked into, or lies deeper than a path can name, counts
    as `HIDDEN` entries, since anything may be in it. Stops to count at `enough` entries.
    """
    used, entries = 0, 0
    queue = [str(folder)]
    while queue and entries < enough:
        try:
            with os.scandir(queue.pop()) as found:
                for entry in itertools.islice(found, enough):
                    entries += 1
                    with contextlib.suppress(FileNotFoundError):
                        facts = entry.stat(follow_symlinks=False)
                        used += facts.st_blocks * 512
                        if stat.S_ISDIR(facts.st_mode):
                            queue.append(entry.path)
        except FileNotFoundError:
            continue
        except OSError:
            entries += HIDDEN
    removed = _removed(folder.stat().st_dev, pids)
    return used + sum(removed.values()), entries + len(removed)


def _removed(device: int, pids: Iterable[int]) -> dict[int, int]:
    """Inode -> bytes of the files of `device` without a name that are open in one of `pids`."""
    removed: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    facts = descriptor.stat()
                    if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 0 and facts.st_dev == device:
                        removed[facts.st_ino] = facts.st_blocks * 512
    return removed
