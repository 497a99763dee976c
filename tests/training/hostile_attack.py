"""What a hostile program is: each tries to break one promise of the sandbox, and says BREACH where it got through.

Run by test_sandbox_attacks.py with `python -S -c`, PRELUDE before each, inside a job of their own. What a program
cannot know (whether the listener heard something, whether a file of the host changed, what is left behind) the test
looks at from outside. The machine they attack is the one they run on: the only network target is a loopback listener
of the test, whose address comes in the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.sandbox import Ending, Limits

__all__ = ["PRELUDE", "SMALL", "Attack", "short"]

SMALL = Limits(seconds=20, cpu_seconds=20, memory_mb=64, file_mb=4, output_mb=1, processes=24, files=64)


@dataclass(frozen=True)
class Attack:
    """One hostile program.

    Attributes:
        code: after PRELUDE.
        expected: how its job may end.
        limits: what its job may use.
        says: words that its output must hold, to see that the attack was really tried.
    """

    code: str
    expected: tuple[Ending, ...] = ("finished",)
    limits: Limits = SMALL
    says: str = "held"


PRELUDE = r"""
import os, sys
def tried(what, call, *arguments):
    try:
        result = call(*arguments)
    except BaseException as error:
        return print('held', what, type(error).__name__, error, flush=True)
    print('BREACH', what, repr(result)[:300], flush=True)
    return result
def libc():
    import ctypes
    return ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    import ctypes
    wide = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments]
    result = libc().syscall(ctypes.c_long(number), *wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def write(path, data=b'x'):
    with open(path, 'wb', 0) as file:
        return file.write(data)
def opened(path):  # only opened: were it possible, nothing of the machine may change
    os.close(os.open(path, os.O_WRONLY))
    return path
def read(path):
    with open(path, 'rb') as file:
        return file.read(200)
VICTIM = os.environ['ATTACK_VICTIM']
NONCE = os.environ['ATTACK_NONCE']
HOST = int(os.environ['ATTACK_HOST'])
PORT = int(os.environ['ATTACK_PORT'])
ARM = os.uname().machine == 'aarch64'
"""


def short(seconds: float = 1.0, **limits: int) -> Limits:
    """SMALL with less time."""
    return replace(SMALL, seconds=seconds, **limits)
