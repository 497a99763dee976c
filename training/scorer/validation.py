"""The validation loss while a run trains: which held-out text it is measured on, and the loss from what came back.

The sample is shown during training, so nothing of it is scored afterwards: its windows lie between those of the
held-out loss. The loss is computed here, from logits; they are not audited as scored ones are, and no score depends on
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from training.profiles import Profile
from training.scorer.heldout import ForgedError, log_softmax

__all__ = ["Sample", "sample_of", "validation_windows"]

MOST_BYTES = 64 << 20
"""Logits of one answer: where the whole sample would take more, every n-th place is asked for."""


@dataclass(frozen=True)
class Sample:
    """Rows int32 [n, T + 1] that the loss is measured on, and the size of the vocabulary."""

    rows: np.ndarray
    vocab: int

    @cached_property
    def places(self) -> np.ndarray:
        """int32 [m, 2] of (row, position), the same in every run of a profile."""
        count, length = len(self.rows), self.rows.shape[1] - 1
        stride = -(-count * length * 4 * self.vocab // MOST_BYTES)
        flat = np.arange(stride - 1, count * length, stride)
        return np.stack(np.divmod(flat, length), axis=1).astype(np.int32)

    def asked(self) -> list[np.ndarray]:
        """What the worker is given: tokens int32 [n, T] and the places."""
        return [np.ascontiguousarray(self.rows[:, :-1]), self.places]

    def loss(self, answer: list[np.ndarray]) -> float | None:
        """Mean nats a token over the places, from logits float32 [m, V]; None where it is not finite.

        Raises:
            ForgedError: the answer has another shape.
        """
        wanted = (len(self.places), self.vocab)
        if len(answer) != 1 or answer[0].shape != wanted or answer[0].dtype != np.float32:
            got = [(array.dtype.name, array.shape) for array in answer]
            raise ForgedError(f"expected float32 logits of shape {wanted} of the validation sample, got {got}")
        targets = self.rows[self.places[:, 0], self.places[:, 1] + 1]
        with np.errstate(all="ignore"):
            picked = log_softmax(answer[0])[np.arange(len(targets)), targets]
            value = -float(picked.mean(dtype=np.float64))
        return value if np.isfinite(value) else None


def sample_of(profile: Profile, tokens: np.ndarray) -> Sample | None:
    """The sample of a profile from its held-out tokens; None where it asks for none, or the text is too short."""
    spec = profile.eval
    if spec.validation_every is None:
        return None
    rows = validation_windows(tokens, spec.heldout_sequences, profile.train.seq_len, spec.validation_sequences)
    return Sample(rows, profile.model.vocab) if len(rows) else None


def validation_windows(tokens: np.ndarray, scored: int, seq_len: int, count: int) -> np.ndarray:
    """int32 [n, seq_len + 1], n at most `count`: evenly spaced windows in the middle of the gaps that `scored` windows
    of the same length leave (training.scorer.scoring.heldout_windows). Empty where no gap has room."""
    width = seq_len + 1
    starts = np.linspace(0, len(tokens) - width, scored).astype(np.int64)
    gaps = np.diff(starts) - width
    free = np.flatnonzero(gaps >= width)
    chosen = free[np.unique(np.linspace(0, len(free) - 1, min(count, len(free))).astype(np.int64))]
    middle = starts[chosen] + width + (gaps[chosen] - width) // 2
    return tokens[middle[:, None] + np.arange(width)].astype(np.int32)
