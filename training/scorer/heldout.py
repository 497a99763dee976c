"""What the scorer reads from a trained worker: logits; and from them the held-out loss.

The loss is computed here with numpy, from tokens that the sandbox never held. That no logit knew what follows it is the
audit's part (training/scorer/audit.py). Not covered: a program that recognises held-out text it could only know from
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from training.scorer.client import Worker

__all__ = ["Call", "ForgedError", "LogitServer", "NotFiniteError", "OnLogits", "heldout_loss", "log_softmax"]

MOST_BYTES = 32 << 20
"""Logits asked for at once."""


class NotFiniteError(Exception):
    """The trained model answers with NaN or infinite logits."""


class ForgedError(Exception):
    """What came back cannot be the output of a causal model on the tokens sent."""


@dataclass(frozen=True)
class Call:
    """One question to the model: tokens int32 [B, T], and places int32 [N, 2] of (row, position), None for all."""

    tokens: np.ndarray
    places: np.ndarray | None


class LogitServer:
    """Asks a worker for logits and checks that they have the right shape and are finite.

    Args:
        vocab: size of the last dimension.
        padding: token that fills rows on the right.

    Attributes:
        calls: every question so far, so that a fresh process can be asked the same in the same order.
    """

    def __init__(self, worker: Worker, vocab: int, padding: int, timeout: float = 300.0) -> None:
        self._worker, self.vocab, self.padding, self._timeout = worker, vocab, padding, timeout
        self.calls: list[Call] = []

    def at(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        """float32 [N, V]: logits of tokens int32 [B, T] at places int32 [N, 2] of (row, position)."""
        self.calls.append(Call(tokens, places))
        return self._ask([tokens.astype(np.int32), places.astype(np.int32)], (len(places), self.vocab))

    def all(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [B, T, V]: logits of tokens int32 [B, T]."""
        self.calls.append(Call(tokens, None))
        return self._ask([tokens.astype(np.int32)], (*tokens.shape, self.vocab))

    def ask(self, call: Call) -> np.ndarray:
        """The answer to `call`: float32 [N, V] where it has places, else [B, T, V]."""
        return self.all(call.tokens) if call.places is None else self.at(call.tokens, call.places)

    def _ask(self, arrays: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        _, answer = self._worker.call("train.logits", arrays=arrays, timeout=self._timeout)
        if len(answer) != 1 or answer[0].shape != shape or answer[0].dtype != np.float32:
            got = [(array.dtype.name, array.shape) for array in answer]
            raise ForgedError(f"expected float32 logits of shape {shape}, got {got}")
        if not np.isfinite(answer[0]).all():
            raise NotFiniteError(
                f"{int((~np.isfinite(answer[0])).sum()):,} of {answer[0].size:,} logits are not finite"
            )
        return answer[0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last dimension, float32 in and out."""
    shifted = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


OnLogits = Callable[[int, int, int, np.ndarray], None]
"""Sees scored logits: (number of the call in server.calls, first row, first position, logits [rows, positions, V])."""


def heldout_loss(
    server: LogitServer, rows: np.ndarray, on_logits: OnLogits | None = None
) -> dict[str, float | int | None]:
    """Mean loss in nats a token over rows int32 [n, T + 1], as {value, n: tokens, se}.

    The standard error is over rows, since tokens of one row are not independent.

    Raises:
        NotFiniteError: the loss of a row is not finite.
    """
    means, first = [], 0
    for part in _parts(rows, server.vocab):
        means.append(_row_losses(server, part, first, on_logits))
        first += len(part)
    losses = np.concatenate(means)
    if not np.isfinite(losses).all():
        # Logits near the end of float32 are finite, and the loss that they make is not.
        raise NotFiniteError(
            f"the loss of {int((~np.isfinite(losses)).sum())} of {len(losses)} held-out rows is not finite"
        )
    se = float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else None
    return {"value": float(losses.mean()), "n": int(rows[:, 1:].size), "se": se}


def _parts(rows: np.ndarray, vocab: int) -> Iterator[np.ndarray]:
    count = max(1, MOST_BYTES // (4 * vocab * rows.shape[1]))
    for start in range(0, len(rows), count):
        yield rows[start : start + count]


def _row_losses(server: LogitServer, rows: np.ndarray, first: int, on_logits: OnLogits | None) -> np.ndarray:
    """float64 [rows]: mean loss of each row. A row whose logits are over the bound is asked for in pieces."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    width = tokens.shape[1]
    step = max(1, MOST_BYTES // (4 * server.vocab * len(rows)))
    if step >= width:
        logits = server.all(tokens)
        if on_logits is not None:
            on_logits(len(server.calls) - 1, first, 0, logits)
        picked = _picked(logits, targets)
        return -picked.mean(axis=1, dtype=np.float64)
    total = np.zeros(len(rows))
    for start in range(0, width, step):
        stop = min(start + step, width)
        grid = np.stack(np.meshgrid(np.arange(len(rows)), np.arange(start, stop), indexing="ij"), -1).reshape(-1, 2)
        logits = server.at(tokens, grid)
        if on_logits is not None:
            on_logits(len(server.calls) - 1, first, start, logits.reshape(len(rows), stop - start, -1))
        picked = _picked(logits, targets[:, start:stop].ravel())
        total -= picked.reshape(len(rows), -1).sum(axis=1, dtype=np.float64)
    return total / width


def _picked(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log-probability of each target. logits [..., V] is used up as scratch space."""
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, targets[..., None].astype(np.int64), -1)[..., 0]
    np.exp(logits, out=logits)
    result: np.ndarray = chosen - np.log(logits.sum(-1))
    return result
