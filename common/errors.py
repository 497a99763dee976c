"""The one exception tree. A message says what was expected, what came, and what to do.

AsiError                 exit 3   anything this project raises on purpose
├── UsageError           exit 2   a wrong flag, file or setting: the person at the keyboard can fix it
│   └── SettingsError    exit 2   a setting is unknown, malformed or impossible
├── BusyError            exit 2   another process holds what this one needs (a data-dir, a port)
├── StoreError           exit 3   the database or a file that holds results cannot be read or written
│   └── JournalError     exit 3   an experiment's journal is damaged
├── ServiceError         exit 3   one of the HTTP services does not answer, or answers with an error
├── SandboxError         exit 3   no sandbox may run this program here
├── JobError             exit 3   a check, training or scoring job failed through a fault of ours
└── LLMError             exit 3   the LLM endpoint failed, or answered with something unusable
"""

from __future__ import annotations

import errno

__all__ = [
    "AsiError",
    "BusyError",
    "JobError",
    "JournalError",
    "LLMError",
    "SandboxError",
    "ServiceError",
    "SettingsError",
    "StoreError",
    "UsageError",
    "cannot_listen",
    "first_line",
    "message_of",
]


class AsiError(Exception):
    """Root of the tree.

    Args:
        message: what was expected and what came, for a person.
        fix: what to do about it: a command to type, a setting to change.
    """

    exit_code = 3

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


def message_of(error: BaseException) -> str:
    """What an error says without its fix: to be part of another message, which has its own."""
    return error.message if isinstance(error, AsiError) else str(error)


def first_line(error: BaseException) -> str:
    """What an error of a foreign library says, in one line: its type's name where it says nothing, as TimeoutError()
    does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class UsageError(AsiError):
    exit_code = 2


class SettingsError(UsageError):
    pass


class BusyError(AsiError):
    exit_code = 2


def cannot_listen(host: str, port: int, error: OSError) -> BusyError:
    """The error of a service whose address cannot be had, with the flag that mends it."""
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        fix = "choose another --port; 0 takes a free one"
    else:
        fix = "choose another --host: an address of this machine, such as 127.0.0.1"
    return BusyError(f"cannot listen on {host}:{port}: {error.strerror}", fix)


class StoreError(AsiError):
    pass


class JournalError(StoreError):
    pass


class ServiceError(AsiError):
    """A service failed. `status` is the HTTP status it answered with, None when it did not answer."""

    def __init__(self, message: str, fix: str = "", status: int | None = None) -> None:
        super().__init__(message, fix)
        self.status = status


class SandboxError(AsiError):
    pass


class JobError(AsiError):
    pass


class LLMError(AsiError):
    pass
