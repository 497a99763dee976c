"""What a run tells while it goes on, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Event", "OnEvent"]


@dataclass(frozen=True)
class Event:
    """Something to show while it happens. Missing numbers are None.

    Attributes:
        kind: "stage" (name: corpus, size, check, data, benchmarks, start, train, score), "progress" (of training) or
        "note" (text to show).
    """

    kind: Literal["stage", "progress", "note"]
    name: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    text: str = ""


OnEvent = Callable[[Event], None]
