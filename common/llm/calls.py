"""The record of model calls: one JSON line an attempt, and totals by role."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from common.errors import StoreError
from common.records import Usage

__all__ = ["Call", "CallLog", "Outcome", "Stopwatch", "Totals", "append_call", "metered", "usage_of"]

Outcome = Literal[
    "ok",
    "unusable",
    "truncated",
    "declined",
    "rejected",
    "rate_limited",
    "server_error",
    "malformed",
    "lost",
    "timeout",
    "cancelled",
]
"""How an attempt ended: a usable answer; one that does not fit the schema; cut at the token limit; declined by a
content filter; refused by the endpoint (4xx); 429; 5xx; a body that is no completion; no connection; no answer in time;
closed while it ran."""

HIDDEN = "[secret]"
_MOST_TOKENS = 2**53


@dataclass(frozen=True)
class Call:
    """One attempt at one question. Tokens are None where the endpoint did not report them."""

    call: str
    """Identifies the question: the attempts at one question share it."""
    attempt: int
    role: str
    model: str
    mode: str
    output: str
    system: str
    prompt: str
    answer: str | None
    outcome: Outcome
    seconds: float
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: float | None = None
    """US dollars by the prices set; None without prices or usage."""
    finish_reason: str | None = None
    error: str | None = None
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


@dataclass(frozen=True)
class Totals:
    """Sums over attempts. `unreported` counts the attempts for which no usage came."""

    attempts: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    unreported: int = 0
    seconds: float = 0.0
    cost: float | None = None

    def plus(self, call: Call) -> Totals:
        return Totals(
            attempts=self.attempts + 1,
            failed=self.failed + (call.outcome != "ok"),
            input_tokens=self.input_tokens + (call.input_tokens or 0),
            output_tokens=self.output_tokens + (call.output_tokens or 0),
            unreported=self.unreported + (call.input_tokens is None and call.output_tokens is None),
            seconds=self.seconds + call.seconds,
            cost=self.cost if call.cost is None else (self.cost or 0.0) + call.cost,
        )


_listener: ContextVar[Callable[[Call], None] | None] = ContextVar("_listener", default=None)


@contextmanager
def metered(listener: Callable[[Call], None]) -> Iterator[None]:
    """Tells `listener` of each attempt that this thread asks for within the block, as soon as it is over: in the thread
    that the backend works in, one after the other."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def usage_of(calls: Iterable[Call], index: int | None = None) -> list[Usage]:
    """Sums by role and model, in the order of their first attempt; each attempt counts as a call. Tokens that were not
    reported count as none, and the cost is that of the attempts whose cost is known.

    Args:
        index: the element that they led to.
    """
    sums: dict[tuple[str, str], Totals] = {}
    for call in calls:
        key = (call.role, call.model)
        sums[key] = sums.get(key, Totals()).plus(call)
    return [
        Usage(
            role=role,
            model=model,
            calls=total.attempts,
            failed=total.failed,
            input_tokens=min(total.input_tokens, _MOST_TOKENS),
            output_tokens=min(total.output_tokens, _MOST_TOKENS),
            seconds=round(total.seconds, 4),
            cost=total.cost,
            index=index,
        )
        for (role, model), total in sums.items()
    ]


class CallLog:
    """Appends calls to a JSONL file (none: keeps totals only). Safe from several threads and processes.

    Secrets are replaced wherever they occur. A secret that the model was shown in pieces or encoded is not recognised.
    """

    def __init__(self, path: Path | None = None, secrets: Sequence[str] = ()) -> None:
        self.path = path
        self._secrets = [secret for secret in secrets if secret]
        self._lock = threading.Lock()
        self._totals: dict[str, Totals] = {}

    def hide(self, secret: str) -> None:
        """Never writes `secret` from now on."""
        if secret:
            with self._lock:
                self._secrets.append(secret)

    def redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return text

    def add(self, call: Call) -> Call:
        """Records one attempt and returns it as recorded.

        Raises:
            StoreError: the file cannot be written.
        """
        texts = {
            key: self.redact(value)
            for key, value in asdict(call).items()
            if isinstance(value, str) and key in ("system", "prompt", "answer", "error")
        }
        call = replace(call, **texts)  # type: ignore[arg-type]
        with self._lock:
            self._totals[call.role] = self._totals.get(call.role, Totals()).plus(call)
            if self.path is not None:
                append_call(self.path, call)
        listener = _listener.get()
        if listener is not None:
            listener(call)
        return call

    def totals(self) -> dict[str, Totals]:
        """Sums by role, of this object's calls."""
        with self._lock:
            return dict(self._totals)

    @staticmethod
    def read(path: Path) -> Iterable[Call]:
        """The calls in a log, oldest first. A line that a kill cut short is left out."""
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    call = Call(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                yield call


def append_call(path: Path, call: Call) -> None:
    """Appends one line to a file that `CallLog.read` reads.

    Raises:
        StoreError: the file cannot be written.
    """
    line = (json.dumps(asdict(call), ensure_ascii=True, allow_nan=False) + "\n").encode()
    # One write to a file opened for appending: lines of several processes do not mix.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreError(f"cannot write the call log {path}: {error.strerror}", "free disk space") from error


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 4)
