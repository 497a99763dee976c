"""What a worker may not ask of the kernel once the candidate is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common.process import REPOSITORY

ATTACK = """
import ctypes, errno, fcntl, os, struct, sys
from training.worker.syscalls import deny

numbers = {"inotify_init1": (294, 26), "mincore": (27, 232), "preadv2": (327, 286), "cachestat": (451, 451)}
file = open(deny.__code__.co_filename)
libc = ctypes.CDLL(None, use_errno=True)
assert deny()
fcntl.fcntl(file, fcntl.F_GETFD)  # the rest of fcntl goes on working
lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 1, 0)
for name, call in {
    "flock": lambda: fcntl.flock(file, fcntl.LOCK_SH),
    "lockf": lambda: fcntl.lockf(file, fcntl.LOCK_SH),
    "getlk": lambda: fcntl.fcntl(file, fcntl.F_GETLK, lock),
    "notify": lambda: fcntl.fcntl(file, fcntl.F_NOTIFY, 1),
}.items():
    try:
        call()
    except PermissionError:
        continue
    print("BREACH", name)
for name, pair in numbers.items():
    ctypes.set_errno(0)
    if libc.syscall(pair[os.uname().machine == "aarch64"], 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != errno.EPERM:
        print("BREACH", name, ctypes.get_errno())
print("held")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the filter is of Linux")
def test_jobs_have_no_way_to_signal_one_another_through_files() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", ATTACK], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "held\n", done.stdout + done.stderr
