"""What a run is asked while it trains: the loss on a sample of held-out text, and how many answers of each generated
task it knows.

The sample is shown during training, so nothing of it is scored afterwards: its windows lie between those of the
held-out loss, its task sequences come from another generator seed. Loss and accuracies are computed here, from logits;
they are not audited as scored ones are, and no score depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from training.data.packing import task_row
from training.profiles import Profile
from training.scorer.heldout import ForgedError, log_softmax

__all__ = ["Sample", "Told", "sample_of", "validation_windows"]

MOST_BYTES = 64 << 20
"""Logits of one answer: where the whole text would take more, every n-th place of it is asked for."""
_TASK_ROWS, _TASK_PLACES = 2, 64
"""Rows of each task, and answers in them, that are asked for at most."""
_SEED = 13


@dataclass(frozen=True)
class Told:
    """Loss on text, nats a token, and the share of right answers of each task; None where it is not finite."""

    loss: float | None
    tasks: dict[str, float | None]


@dataclass(frozen=True)
class Sample:
    """Rows int32 [n, T + 1] of text that the loss is measured on, the size of the vocabulary, and by task rows
    int32 [k, T + 1] of its sequences with the places int32 [m, 2] of answers in them."""

    rows: np.ndarray
    vocab: int
    tasks: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @cached_property
    def _text(self) -> np.ndarray:
        count, length = len(self.rows), self.rows.shape[1] - 1
        stride = -(-count * length * 4 * self.vocab // MOST_BYTES)
        flat = np.arange(stride - 1, count * length, stride)
        return np.stack(np.divmod(flat, length), axis=1).astype(np.int32)

    @cached_property
    def places(self) -> np.ndarray:
        """int32 [m, 2] of (row, position), the same in every run of a profile: those of the text, then of each task."""
        found, before = [self._text], len(self.rows)
        for rows, places in self.tasks.values():
            found.append(places + np.array([before, 0], dtype=np.int32))
            before += len(rows)
        return np.concatenate(found)

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.concatenate([self.rows, *(rows for rows, _ in self.tasks.values())])

    def asked(self) -> list[np.ndarray]:
        """What the worker is given: tokens int32 [n, T] and the places."""
        return [np.ascontiguousarray(self._rows[:, :-1]), self.places]

    def told(self, answer: list[np.ndarray]) -> Told:
        """What logits float32 [m, V] of the places say.

        Raises:
            ForgedError: the answer has another shape.
        """
        wanted = (len(self.places), self.vocab)
        if len(answer) != 1 or answer[0].shape != wanted or answer[0].dtype != np.float32:
            got = [(array.dtype.name, array.shape) for array in answer]
            raise ForgedError(f"expected float32 logits of shape {wanted} of the validation sample, got {got}")
        targets = self._rows[self.places[:, 0], self.places[:, 1] + 1]
        text, start, tasks = len(self._text), len(self._text), {}
        with np.errstate(all="ignore"):
            picked = log_softmax(answer[0][:text])[np.arange(text), targets[:text]]
            value = -float(picked.mean(dtype=np.float64))
        for name, (_, places) in self.tasks.items():
            logits, end = answer[0][start : start + len(places)], start + len(places)
            right = float((logits.argmax(-1) == targets[start:end]).mean())
            tasks[name] = right if np.isfinite(logits).all() else None
            start = end
        return Told(value if np.isfinite(value) else None, tasks)


def sample_of(profile: Profile, tokens: np.ndarray) -> Sample | None:
    """The sample of a profile from its held-out tokens; None where it asks for none, or the text is too short."""
    spec = profile.eval
    if spec.validation_every is None:
        return None
    rows = validation_windows(tokens, spec.heldout_sequences, profile.train.seq_len, spec.validation_sequences)
    return Sample(rows, profile.model.vocab, _task_rows(profile)) if len(rows) else None


def _task_rows(profile: Profile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By generated task that the profile trains: rows int32 [k, T + 1] and the places int32 [m, 2] before answers."""
    found = {}
    for number, name in enumerate(profile.tasks.names if profile.tasks.share > 0 else []):
        random = np.random.default_rng([_SEED, number])
        coded = np.stack(
            [task_row(profile.tasks, [name], random, profile.train.seq_len + 1, 0) for _ in range(_TASK_ROWS)]
        )
        places = np.argwhere(coded[:, 1:] >= 0)[:_TASK_PLACES].astype(np.int32)
        found[name] = np.where(coded < 0, -1 - coded, coded).astype(np.int32), places
    return found


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
