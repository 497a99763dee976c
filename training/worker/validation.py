"""Logits of a fixed sample while training goes on, for the validation loss; the scorer computes the loss.

Asking must leave no trace in the run (training/worker/trial.py), so that training with and without it gives the same
weights to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from training.worker.state import Emit
from training.worker.trial import undone

__all__ = ["Validation"]


class Validation:
    """Decides when the sample is asked for, and sends what the model says of it.

    Args:
        every: steps between two answers; None: never.
        asked: the arguments of `train.logits`: tokens int32 [B, T] and places int32 [N, 2].
        ask: that operation.
    """

    def __init__(
        self,
        every: int | None,
        asked: Sequence[np.ndarray],
        ask: Callable[[list[np.ndarray]], Sequence[np.ndarray]],
        emit: Emit,
    ) -> None:
        self._every, self._asked, self._ask, self._emit = every, list(asked), ask, emit

    @classmethod
    def of(
        cls, meta: Mapping[str, Any], arrays: Sequence[np.ndarray], ask: Callable[..., Any], emit: Emit
    ) -> Validation:
        """As `train.run` is told: meta {validation: {every}} with two arrays, or without either."""
        spec = meta.get("validation")
        return cls(int(spec["every"]) if spec else None, arrays, ask, emit)

    def look(self, model: torch.nn.Module, step: int, steps: int) -> None:
        """Emits {validation: step} with logits float32 [N, V] where `step` is a multiple of `every`, or the last."""
        if self._every is None or (step % self._every and step != steps):
            return
        with undone(model):
            answer = self._ask(self._asked)
        self._emit({"validation": step}, answer)
