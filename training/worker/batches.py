"""Batches of the packed stream as tensors, and the mean losses over them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Means", "Part", "batches"]


@dataclass(frozen=True)
class Part:
    """Rows of one forward pass: tokens int64 [rows, T]; flat places that are predicted, their targets and weights;
    text: 1 where the place is in a row of text, 0 where it is an answer of a task; counts of both.

    Every row of a batch weighs the same, so the few answers of a task row count as much as a row of text.
    """

    tokens: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor
    text: Tensor
    counts: Tensor


class Means:
    """Mean losses since the last report, summed on the device so that no step waits for a number."""

    def __init__(self, device: str) -> None:
        self._sums, self._counts = torch.zeros(2, device=device), torch.zeros(2, dtype=torch.int64)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"sums": self._sums, "counts": self._counts}

    def add(self, losses: Tensor, part: Part) -> None:
        text = losses @ part.text
        self._sums += torch.stack([text, losses.sum() - text])
        self._counts += part.counts

    def absorb(self, other: Means) -> None:
        """Adds what `other` holds, and empties it."""
        self._sums += other._sums
        self._counts += other._counts
        other._sums.zero_()
        other._counts.zero_()

    def take(self) -> dict[str, float | None]:
        """{loss, task_loss}, and begins anew. Where there was no row of text, loss is that of the answers."""
        sums, counts = self._sums.tolist(), self._counts.tolist()
        means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        self._sums.zero_()
        self._counts.zero_()
        finite = [mean if mean is not None and math.isfinite(mean) else None for mean in means]
        return {"loss": finite[0] if means[0] is not None else finite[1], "task_loss": finite[1]}


def batches(
    rows: np.ndarray, batch: int, micro: int, device: str, first: int = 0, share: slice | None = None
) -> Iterator[list[Part]]:
    """For each step from number `first` (0 is the first) its parts of at most `micro` rows.

    Args:
        rows: [steps * batch, T + 1] of the stream, so a step is a place in the data.
        share: of each batch, the rows that this process takes; None: all.
    """
    begin, end, _ = (share or slice(0, batch)).indices(batch)
    for start in range(first * batch, len(rows), batch):
        parts = []
        for at in range(start + begin, start + end, micro):
            block = np.asarray(rows[at : min(at + micro, start + end)], dtype=np.int64)
            predicted = block[:, 1:] >= 0
            places, inside = np.flatnonzero(predicted), predicted.sum(axis=1)
            text = np.repeat(inside == predicted.shape[1], inside)
            weights = np.repeat(1.0 / (batch * np.maximum(inside, 1)), inside)
            arrays = (
                np.where(block < 0, -1 - block, block)[:, :-1],
                places,
                block[:, 1:].ravel()[places],
                weights.astype(np.float32),
                text.astype(np.float32),
            )
            tokens, *rest = (torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True) for x in arrays)
            written = int(text.sum())
            counts = torch.tensor([written, len(text) - written])
            parts.append(Part(tokens, rest[0], rest[1], rest[2], rest[3], counts))
        yield parts
