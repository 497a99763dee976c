"""Sets the limits of a sandboxed job, gives up its rights, and becomes the job: `python -I -S shim.py KEY=VALUE... --
COMMAND...`.

Started by training/sandbox.py as the first thing inside the sandbox. Needs nothing but the standard library, and
little of that, since its start is paid for every job. Keys, all numbers but the last: cpu (seconds), file (bytes of
one file), files (open files), tasks (processes and threads), memory (bytes of address space), uid (to change to),
parent (1: die with the process that started it), keep (names of the variables that stay in the environment).
"""

from __future__ import annotations

import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def limit(kind: int, value: float, more: int = 0) -> None:
    """Sets the soft limit, and the hard one `more` above it, never above the hard limit that holds already."""
    hard = resource.getrlimit(kind)[1]
    wanted, most = (int(v) if hard == resource.RLIM_INFINITY else min(int(v), hard) for v in (value, value + more))
    try:  # noqa: SIM105 - the module for it costs a third of this program's start
        resource.setrlimit(kind, (wanted, most))
    except (ValueError, OSError):  # macOS refuses some of them
        pass


def apply(spec: Mapping[str, str]) -> None:
    """Applies the limits that `spec` names."""
    limit(resource.RLIMIT_CORE, 0)
    for key, name in (
        ("cpu", "RLIMIT_CPU"),
        ("file", "RLIMIT_FSIZE"),
        ("files", "RLIMIT_NOFILE"),
        ("memory", "RLIMIT_AS"),
        ("tasks", "RLIMIT_NPROC"),
    ):
        if key in spec and hasattr(resource, name):
            # At the hard CPU limit the kernel kills without the signal that says why.
            limit(getattr(resource, name), int(spec[key]), 1 if key == "cpu" else 0)
    for name in ("RLIMIT_MSGQUEUE", "RLIMIT_MEMLOCK", "RLIMIT_RTPRIO", "RLIMIT_NICE"):
        # A CUDA driver pins memory, so only jobs with a memory limit lose the right to.
        if hasattr(resource, name) and (name != "RLIMIT_MEMLOCK" or "memory" in spec):
            limit(getattr(resource, name), 0)
    if "parent" in spec:
        _die_with_parent()
    if "uid" in spec:
        uid = int(spec["uid"])
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def _die_with_parent() -> None:
    """Without a pid namespace: the kernel kills this process when the thread that started it is gone (Linux)."""
    if sys.platform.startswith("linux"):
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


def main(argv: list[str]) -> None:
    """Applies the limits and becomes the command; never returns."""
    end = argv.index("--")
    spec = dict(pair.split("=", 1) for pair in argv[1:end])
    apply(spec)
    env = dict(os.environ)
    if "keep" in spec:
        kept = spec["keep"].split(",")
        env = {name: value for name, value in env.items() if name in kept}
    os.execve(argv[end + 1], argv[end + 1 :], env)


if __name__ == "__main__":
    main(sys.argv)
