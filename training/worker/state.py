"""What a worker holds between calls, and the type of its operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from training.worker.ranks import Ranks

__all__ = ["Emit", "Op", "WorkerState"]


class Emit(Protocol):
    """Sends one event with this meta, and arrays, to the trusted side, while the operation runs."""

    def __call__(self, meta: dict[str, Any], arrays: Sequence[np.ndarray] = (), /) -> None: ...


@dataclass
class WorkerState:
    """One candidate in one process.

    Attributes:
        device: "cpu" or "cuda".
        ranks: this process among those that train together.
        text: the program, once the `load` operation sent it.
        cls: its class DeltaNet.
        instances: mixers or models that live across calls, by key. Operations of the verifier build fresh ones instead.
        values: whatever else an operation keeps (optimizer, data, counters), by its own key.
    """

    device: str = "cpu"
    ranks: Ranks = field(default_factory=Ranks)
    text: str | None = None
    cls: type | None = None
    instances: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


Op = Callable[[WorkerState, dict[str, Any], list[np.ndarray], Emit], tuple[dict[str, Any], list[np.ndarray]]]
"""One operation: (state, meta, arrays, emit) -> (meta, arrays) of the reply. An exception becomes an error reply."""
