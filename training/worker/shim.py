"""Sets the limits of a sandboxed job, gives up its rights, and becomes the job: `python -I -S shim.py LIMITS
COMMAND...`.

Started by training/sandbox.py as the first thing inside the sandbox. Needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from typing import Any

_START_MB = 8192
"""Address space that importing torch takes before the worker sets the exact limit (measured: 3.1 GB for the CUDA
build)."""


def limit(kind: int, value: float) -> None:
    """Sets soft and hard limit, never above the hard limit that holds already."""
    hard = resource.getrlimit(kind)[1]
    wanted = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses some of them
        resource.setrlimit(kind, (wanted, wanted))


def apply(spec: dict[str, Any]) -> None:
    """Applies the limits of `spec` (the fields of training.sandbox.Limits, and uid, memory, count)."""
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, spec["cpu_seconds"] + 1)
    limit(resource.RLIMIT_FSIZE, spec["file_mb"] << 20)
    limit(resource.RLIMIT_NOFILE, spec["files"])
    if spec["memory"] and spec["memory_mb"] is not None:
        limit(resource.RLIMIT_AS, (spec["memory_mb"] + _START_MB) << 20)
    if spec["count"]:
        limit(resource.RLIMIT_NPROC, spec["processes"])
    else:
        _die_with_parent()
    if spec["uid"] is not None:
        os.setgroups([])
        os.setgid(spec["uid"])
        os.setuid(spec["uid"])


def _die_with_parent() -> None:
    """Without a pid namespace: the kernel kills this process when the thread that started it is gone (Linux)."""
    if sys.platform.startswith("linux"):
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    limits = json.loads(sys.argv[1])
    apply(limits)
    if limits["memory"] and limits["memory_mb"] is not None:
        os.environ["ASI_MEMORY_MB"] = str(limits["memory_mb"])
    os.execv(sys.argv[2], sys.argv[2:])
