"""Child processes that never outlive their parent, and the line by which a service says where it listens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

__all__ = [
    "LISTENING",
    "PARENT",
    "REPOSITORY",
    "announce",
    "end_on_closed_pipe",
    "end_on_interrupt",
    "exit_with_parent",
    "kill_group",
    "leave",
    "on_interrupt",
    "piped",
    "raise_on_interrupt",
    "spawn",
    "terminate",
]

REPOSITORY = Path(__file__).resolve().parent.parent
LISTENING = "listening on "
PARENT = "ASI_PARENT_PID"
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a child of ours in its own session, told whose child it is so that `exit_with_parent` can watch.

    Its own session keeps a Ctrl-C at the terminal from reaching it: the parent decides when it ends.
    """
    environment = dict(os.environ if env is None else env)
    environment[PARENT] = str(os.getpid())
    return subprocess.Popen(
        list(argv), env=environment, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True, cwd=REPOSITORY
    )


def exit_with_parent(
    interval: float = 0.5, before: Callable[[], None] | None = None, parent: int | None = None
) -> None:
    """Ends this process within about a second of its parent's death, after `before` was called.

    Polling works on every platform and, unlike a parent-death signal, does not fire when only the thread that
    started us ends. Does nothing in a process that was not started by `spawn`, unless `parent` is given.

    Args:
        parent: process id of the parent, where it is not `spawn` that started us.
    """
    named = os.environ.get(PARENT)
    expected = parent if parent is not None else int(named) if named else None
    if expected is None:
        return

    def watch() -> None:
        while os.getppid() == expected:
            time.sleep(interval)
        try:
            if before is not None:
                before()
        finally:
            os._exit(70)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()


def end_on_interrupt(status: int | None = None) -> None:
    """Ctrl-C ends this process with one line and status 130, until a command takes the signal over.

    For the seconds of imports and set-up, in which nothing is begun and a traceback would tell nobody anything.

    Args:
        status: in place of 130, and for SIGTERM too: of a command which ends so once it listens to both.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(sys.stderr.fileno(), b"\ninterrupted\n")
        os._exit(128 + number if status is None else status)

    if status is not None:
        signal.signal(signal.SIGTERM, end)

    # A shell that starts a job in the background lets it ignore the signal: it goes on doing so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def raise_on_interrupt() -> None:
    """Ctrl-C is a KeyboardInterrupt again: what has been begun is ended by its own clean-up."""
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def on_interrupt(told: Callable[[int], None]) -> Iterator[None]:
    """Calls `told` with the number of each SIGINT and SIGTERM, in a thread of its own. For the main thread.

    A handler in Python runs in the main thread, between any two of its instructions: it may need a lock which that
    thread holds, and a signal that comes while the thread is about to wait (for a lane, for a lock) is not heard until
    the wait ends. The byte that the interpreter writes at once, whoever got the signal, has neither fault.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def listen() -> None:
        while number := os.read(reading, 1):
            if number[0] in _INTERRUPTS:
                told(number[0])

    listener = threading.Thread(target=listen, name="interrupts", daemon=True)
    listener.start()
    other = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(other)
        os.close(writing)
        listener.join()
        os.close(reading)


def leave(status: int) -> NoReturn:
    """Ends this process with `status`, without waiting for a thread that was left behind in foreign code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as it is after `>&-`
            stream.flush()
    os._exit(status)


def end_on_closed_pipe() -> int:
    """Exit status of a command whose reader is gone (`| head`), which is no fault: that of a process ended by SIGPIPE.

    What is still to be flushed goes nowhere.
    """
    _stdout_to_nowhere()
    return 128 + signal.SIGPIPE


def piped(command: Callable[[], int]) -> int:
    """Exit status of `command`; where its output cannot be written, that of `end_on_closed_pipe`, or 3 with a line that
    says why."""
    try:
        status = command()
        if sys.stdout is not None:  # as it is after `>&-`
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        return end_on_closed_pipe()
    except OSError as error:
        _stdout_to_nowhere()
        print(f"error: {error}\n  fix: see whether the output can be written where it goes", file=sys.stderr)
        return 3


def announce(url: str) -> None:
    """Prints the line by which a service tells whoever started it that it answers at `url`. Where stdout is closed or
    takes nothing, that is no reason not to serve: then stderr has the line."""
    line = f"{LISTENING}{url}\n"
    if sys.stdout is not None:
        try:
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        except OSError:
            _stdout_to_nowhere()
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(line)
            sys.stderr.flush()


def _stdout_to_nowhere() -> None:
    """What is still to be flushed is no error of the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def terminate(process: subprocess.Popen[bytes], grace: float = 3.0) -> None:
    """Ends a child started by `spawn`: SIGTERM, then SIGKILL to its whole group after `grace` seconds."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            kill_group(process)
    process.wait()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a child started by `spawn` with all that it started in its session, also where the child itself is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
