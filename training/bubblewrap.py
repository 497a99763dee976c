"""The bubblewrap command line of one job: what is mounted, what is masked, which namespaces are new."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import SandboxError

__all__ = ["FIX", "HELD_OUT_PACKAGES", "JUDGING_PACKAGES", "SHIM", "SHM_MB", "command", "driver_folders"]

HELD_OUT_PACKAGES = ("scipy", "sklearn", "pandas", "matplotlib")
"""Held-out text comes from these, so no sandbox mounts them."""

JUDGING_PACKAGES = ("lm_eval",)
"""What scores a program outside. No mixer has a use for it, so a program that reaches for it fails."""

SHM_MB = {"cpu": 64, "cuda": 1024}
"""Size of /dev/shm by device: through it NCCL passes what cards cannot send each other directly."""

_ABSENT = Path(__file__).resolve().parent / "worker" / "absent"

SHIM = Path(__file__).resolve().parent / "worker" / "shim.py"
"""Sets limits and drops rights inside the sandbox."""

FIX = (
    "install it with `apt-get install bubblewrap` (or dnf, pacman, apk add); where it is installed, allow user "
    "namespaces with `sysctl -w kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0`, "
    "or run as root"
)


def command(
    inner: Sequence[str],
    reads: Mapping[Path, Path],
    env: Mapping[str, str],
    file_mb: int,
    drop_uid: bool,
    device: str,
    filter_fd: int | None = None,
    report_fd: int | None = None,
) -> list[str]:
    """The command line that runs `inner` in new namespaces.

    Args:
        reads: path in the sandbox -> host path, mounted read-only.
        env: the whole environment of the job.
        file_mb: size of its temporary folder, which is memory.
        drop_uid: leave out the user namespace; the shim changes to a real uid of the job's own.
        device: "cuda" mounts the driver's devices and a C compiler as well.
        filter_fd, report_fd: inherited descriptors: where bubblewrap reads the system call filter of the job, and
            where it says which process is the first of the new pid namespace.

    Raises:
        SandboxError: bwrap or torch is not installed.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError("the command bwrap is not installed", FIX)
    line = [bwrap, "--die-with-parent", "--new-session", "--clearenv"]
    if drop_uid:
        # Without a user namespace the uid is a real one, so its files, signals and process count are apart from root's.
        line += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        line += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        line += ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    line += ["--hostname", "sandbox", "--proc", "/proc", "--dev", "/dev"]
    # Settings of the whole machine, which a process mapped to the host's root could write.
    for name in ("sys", "sysrq-trigger", "irq", "bus", "fs", "acpi"):
        line += ["--ro-bind-try", f"/proc/{name}", f"/proc/{name}"]
    line += ["--perms", "1777", "--size", str(SHM_MB[device] << 20), "--tmpfs", "/dev/shm"]
    # Before every bind, since what is bound may lie under /tmp.
    line += ["--perms", "1777", "--size", str(file_mb << 20), "--tmpfs", "/tmp"]
    line += _system_binds(device)
    for path, source in {SHIM: SHIM, **reads}.items():
        line += _bind("--ro-bind", path, source)
    if filter_fd is not None:
        line += ["--seccomp", str(filter_fd)]
    if report_fd is not None:
        line += ["--info-fd", str(report_fd)]
    line += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    line += itertools.chain.from_iterable(("--setenv", name, value) for name, value in env.items())
    return [*line, "--", *inner]


@functools.cache
def _system_binds(device: str) -> tuple[str, ...]:
    """Read-only mounts of the system libraries, the interpreter and the packages, with other packages masked. The
    same for every job of this process; finding out takes 15 ms.
    """
    binds: list[str] = []
    # Triton asks /sbin/ldconfig where the CUDA driver's library is.
    for name in ("bin", "lib", "lib32", "lib64", *(["sbin"] if device == "cuda" else [])):
        path = Path("/") / name
        if path.is_symlink():
            binds += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            binds += _bind("--ro-bind", path)
    # A CUDA job compiles kernels, which needs the C compiler and its headers.
    system = ("/usr",) if device == "cuda" else ("/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64")
    wanted = [Path(name) for name in (*system, "/etc/ld.so.cache", "/etc/alternatives", "/sys/devices/system/cpu")]
    packages = _packages()
    interpreter = Path(sys.executable).resolve()
    wanted += [Path(sys.base_prefix), Path(sys.prefix), interpreter.parent.parent, packages]
    if device == "cuda":
        # How cards are connected, which NCCL reads from the tree of PCI devices; links in it point into /sys/devices.
        wanted += [Path(name) for name in ("/sys/devices", "/sys/bus/pci", "/sys/class/pci_bus")]
        wanted += [*driver_folders(), *sorted(Path("/dev").glob("nvidia*"))]
    done: list[Path] = []
    for path in wanted:
        if path.exists() and path not in done:
            done.append(path)
            binds += _bind("--dev-bind" if path.is_relative_to("/dev") else "--ro-bind", path)
    views = _views(packages, done)
    for path in _masked(views, done):
        binds += ["--tmpfs", str(path), "--remount-ro", str(path)]
    # An empty folder could still be imported, as a namespace.
    for path in (view / name for view in views for name in JUDGING_PACKAGES):
        if path.is_dir():
            binds += ["--ro-bind", str(_ABSENT), str(path)]
    return tuple(binds)


def driver_folders() -> list[Path]:
    """Folders of LD_LIBRARY_PATH that hold the CUDA driver: of a machine where the linker's cache does not name it."""
    named = (Path(name) for name in os.environ.get("LD_LIBRARY_PATH", "").split(":") if name.startswith("/"))
    return [folder for folder in dict.fromkeys(named) if any(folder.glob("libcuda.so*"))]


def _bind(kind: str, path: Path, source: Path | None = None) -> list[str]:
    """Mounts `source`, or what has the same name on the host, as `path`. Folders above it are made first, since bwrap
    makes them for their owner only."""
    above = [parent for parent in reversed(path.parents) if parent != Path("/")]
    folders = itertools.chain.from_iterable(("--perms", "0755", "--dir", str(parent)) for parent in above)
    return [*folders, kind, str(source or path), str(path)]


def _packages() -> Path:
    """The folder that torch is imported from, found without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise SandboxError("torch is not installed for this interpreter", "run `make setup`, and use .venv/bin/python")
    return Path(found.origin).resolve().parent.parent


def _views(packages: Path, mounted: Sequence[Path]) -> list[Path]:
    """Every name under which the folder of packages is mounted: a virtual environment may be a link to another."""
    inside = ((root, root.resolve()) for root in mounted)
    views = [root / packages.relative_to(real) for root, real in inside if packages.is_relative_to(real)]
    return list(dict.fromkeys([packages, *views]))


def _masked(views: Sequence[Path], mounted: Sequence[Path]) -> list[Path]:
    """Package folders under what is mounted, other than torch's own, and the held-out packages beside torch."""
    masked = [view / name for view in views for name in HELD_OUT_PACKAGES]
    for root in {Path("/usr"), Path("/usr/local"), *mounted}:
        for pattern in ("lib*/python*/site-packages", "lib*/python*/dist-packages"):
            masked += (path for path in root.glob(pattern) if path.resolve() != views[0])
    # Only what a mount makes visible can be masked: nothing may be created in a read-only tree.
    visible = (path for path in masked if path.is_dir() and any(path.is_relative_to(root) for root in mounted))
    return sorted(set(visible))
