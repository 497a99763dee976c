"""What a job and all below it use, read by the host from /proc; nothing where there is none."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["oom_kills", "tree_usage"]


def oom_kills() -> int:
    """How often the kernel has killed for lack of memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def tree_usage(root: int) -> tuple[float, int]:
    """User and system seconds of `root` and all that descends from it, children that ended included, and the bytes
    that those which live hold in memory.
    """
    parents: dict[int, list[tuple[int, float, int]]] = {}
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    own, held = 0.0, 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue
            # fields[1] is the parent; 11-14 are user, system and the two of children that were waited for.
            used = sum(map(int, fields[11:15])) / ticks
            resident = int(fields[21]) * page
            parents.setdefault(int(fields[1]), []).append((int(entry.name), used, resident))
            if int(entry.name) == root:
                own, held = used, resident
    total, queue = own, [root]
    while queue:
        for pid, used, resident in parents.get(queue.pop(), []):
            total, held = total + used, held + resident
            queue.append(pid)
    return total, held
