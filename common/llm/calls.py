"""The record of model calls: one JSON line an attempt, and totals by role."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from common.errors import StoreError

__all__ = ["Call", "CallLog", "Outcome", "Stopwatch", "Totals"]

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
        line = json.dumps(asdict(call), ensure_ascii=True, allow_nan=False) + "\n"
        with self._lock:
            self._totals[call.role] = self._totals.get(call.role, Totals()).plus(call)
            if self.path is not None:
                _append(self.path, line.encode())
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


def _append(path: Path, line: bytes) -> None:
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
