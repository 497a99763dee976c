"""Takes away system calls that no mixer needs, as seccomp filters in two layers.

`outer` is a filter for every bubblewrap job from its first instruction: tracing, mounts, namespaces, keys, clocks,
kernel interfaces, and memory that no limit counts (System V and memfd). `deny` is for the worker once torch is
imported: also no new processes, no other programs, no sockets, no locks of files and no questions about the page cache,
by which one job could tell another what it was shown. It is what turns a fork bomb or a connection into an exception
with a line number.

A second wall behind the sandbox. Linux on x86-64 and arm64; elsewhere it does nothing. It is a list of what is
denied, so what it does not name (files, memory, signals) is the sandbox's part. On CUDA `deny` is not used, since
kernels are compiled by child processes, and `outer` leaves memfd, which the driver shares memory by. A docker job has
docker's own list of what is allowed in place of `outer`.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys

__all__ = ["deny", "outer"]

# Name: (x86-64, arm64); None where the architecture has no such call.
_Calls = dict[str, tuple[int | None, int | None]]
_OUTER: _Calls = {
    # looking into and steering other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "perf_event_open": (298, 241),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # interfaces to the kernel that were holes before
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "modify_ldt": (154, None),
    "vmsplice": (278, 75),
    # the machine
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "acct": (163, 89),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "iopl": (172, None),
    "ioperm": (173, None),
    # memory outside every limit, which may outlive a process
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "memfd_secret": (447, 447),
}
_MEMFD: _Calls = {"memfd_create": (319, 279)}
_WORKER: _Calls = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "socket": (41, 198),
    "socketpair": (53, 199),
    # what processes that share nothing but a read-only file could signal through
    "flock": (73, 32),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "mincore": (27, 232),
    "preadv2": (327, 286),
    "cachestat": (451, 451),
}
_FCNTL, _FCNTL_COMMANDS = (72, 25), (5, 6, 7, 36, 37, 38, 1024, 1025, 1026)
"""Locks of files (F_GETLK, F_SETLK, F_SETLKW and those of open descriptions), leases and notifications."""
_CLONE, _CLONE3 = (56, 220), (435, 435)
_AUDIT_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_X32 = 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2


def outer(device: str) -> bytes | None:
    """The filter of a whole job on `device` ("cpu" or "cuda") as struct sock_filter records; None on a machine whose
    numbers are not known.
    """
    found = _here()
    return None if found is None else _program(*found, _OUTER if device == "cuda" else _OUTER | _MEMFD, threads=False)


def deny() -> bool:
    """Installs the filter for this thread and all it will start; it cannot be taken off. Whether it is in place."""
    import ctypes

    found = _here()
    if found is None:
        return False
    code = _program(*found, _OUTER | _MEMFD | _WORKER, threads=True)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack(
        "HxxxxxxP" if ctypes.sizeof(ctypes.c_void_p) == 8 else "HP", len(code) // 8, ctypes.addressof(buffer)
    )
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    return libc.prctl(_SET_SECCOMP, _FILTER, ctypes.c_char_p(program), 0, 0) == 0


def _here() -> tuple[int, int] | None:
    return _AUDIT_ARCH.get(platform.machine()) if sys.platform.startswith("linux") else None


def _program(column: int, architecture: int, denied: _Calls, threads: bool) -> bytes:
    """The BPF program: seccomp_data holds nr at byte 0, arch at 4, the arguments from 16 on, 8 bytes each.

    Args:
        threads: new tasks must be threads, and no file is locked; else only new namespaces are refused.
    """
    numbers = [number for pair in denied.values() if (number := pair[column]) is not None]
    lines: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if column == 0:  # the other calling convention of x86-64 has other numbers
        lines += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    for number in numbers:
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    # clone3 hides its flags in memory; without it libc uses clone, whose flags say what the new task shares.
    lines += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    refused = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    allowed = (_RETURN, 0, 0, _ALLOW)
    if threads:
        lines += [(_EQUAL, 0, 2 + 2 * len(_FCNTL_COMMANDS), _FCNTL[column]), (_LOAD, 0, 0, 24)]
        for command in _FCNTL_COMMANDS:
            lines += [(_EQUAL, 0, 1, command), refused]
        lines.append(allowed)
    lines += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, 16)]
    if threads:
        lines += [(_ANY_BIT, 1, 0, _CLONE_THREAD), refused, allowed]
    else:
        lines += [(_ANY_BIT, 0, 1, _CLONE_NAMESPACES), refused, allowed]
    return b"".join(struct.pack("HBBI", *line) for line in lines)
