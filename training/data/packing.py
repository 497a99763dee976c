"""The training stream: every row of every batch of one run, written by the host before the run and mapped by the
worker.

A file of int16 (uint16 where the vocabulary needs it) [steps * batch, seq_len + 1]: position t is input, t + 1 its
target.
In int16 files a token that must not be a target is stored as -1 - id. Text rows are windows of the training tokens, at
seeded random places or, where `data.order` is `epochs`, each once an epoch; task rows hold sequences of the generated
tasks, filled up with masked end tokens. The order is a function of the seed alone, so a candidate can neither choose
nor skip what it trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from training.data.shards import TokenFiles
from training.data.tasks import GENERATORS
from training.profiles import Profile, TaskSpec

__all__ = ["row_type", "task_row", "write_stream"]

_BLOCK = 4096
"""Rows made at once: bounds memory in the large profiles."""


def row_type(vocab: int) -> np.dtype:
    """Element type of the stream for a vocabulary of `vocab` ids."""
    return np.dtype(np.int16 if vocab < 2**15 else np.uint16)


def write_stream(
    profile: Profile,
    tokens: np.ndarray | TokenFiles,
    seed: int,
    target: Path,
    end: int = 0,
    go_on: Callable[[], None] | None = None,
) -> None:
    """Writes the stream of one run to `target`.

    Args:
        tokens: uint16 [n], the training tokens, at least seq_len + 1 of them; or the files that hold them.
        end: id of the end token.
        go_on: called now and then; what it raises ends the writing.
    """
    length = profile.train.seq_len + 1
    rows = profile.train.steps * profile.train.batch
    kind = row_type(profile.model.vocab)
    places = np.random.default_rng([seed, 1])
    epochs = _Epochs((len(tokens) - 1) // (length - 1), places) if profile.data.order == "epochs" else None
    choice = np.random.default_rng([seed, 2])
    generated = np.random.default_rng([seed, 3])
    with target.open("wb") as handle:
        for start in range(0, rows, _BLOCK):
            if go_on is not None:
                go_on()
            count = min(_BLOCK, rows - start)
            tasked = choice.random(count) < profile.tasks.share
            text = np.flatnonzero(~tasked)
            if epochs is None:
                starts = places.integers(0, len(tokens) - length + 1, count)[text]
            else:
                starts = epochs.take(len(text)) * (length - 1)
            block = np.empty((count, length), kind)
            block[text] = _windows(tokens, starts, length)
            for row in np.flatnonzero(tasked):
                block[row] = task_row(profile.tasks, profile.tasks.names, generated, length, end)
            block.tofile(handle)


class _Epochs:
    """Numbers of disjoint windows without end: all of them once an epoch, each epoch in a random order of its own.

    Memory: 8 bytes a window, 4 MB for a billion tokens in windows of 2048. Only the process that writes the stream
    holds it.
    """

    def __init__(self, windows: int, random: np.random.Generator) -> None:
        self._windows, self._random = windows, random
        self._left = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> np.ndarray:
        """int64 [count]: the next ones."""
        taken = [self._left[:count]]
        self._left = self._left[count:]
        while (missing := count - sum(map(len, taken))) > 0:
            order = self._random.permutation(self._windows)
            taken.append(order[:missing])
            self._left = order[missing:]
        return np.concatenate(taken)


def _windows(tokens: np.ndarray | TokenFiles, starts: np.ndarray, length: int) -> np.ndarray:
    if isinstance(tokens, TokenFiles):
        return tokens.windows(starts, length)
    rows: np.ndarray = tokens[starts[:, None] + np.arange(length)]
    return rows


def task_row(spec: TaskSpec, names: Sequence[str], random: np.random.Generator, length: int, end: int) -> np.ndarray:
    """int16 [length]: whole sequences of the tasks `names`, each begun as in scoring by the end token of the one
    before. What is no answer is -1 - id."""
    row: list[int] = []
    while True:
        sequence = GENERATORS[names[int(random.integers(len(names)))]](spec, random)
        ids = sequence.ids
        if len(row) + 1 + len(ids) > length:
            return np.array(row + [-1 - end] * (length - len(row)), dtype=np.int16)
        coded = [-1 - end, *(-1 - token for token in ids)]  # the end token before it
        for answer in sequence.answers:
            coded[answer + 1] = ids[answer]
        row += coded
