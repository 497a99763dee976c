"""What the scorer reads from a trained worker: logits; and from them the held-out loss.

The loss is computed here with numpy, from tokens that the sandbox never held. That no logit knew what follows it is the
audit's part (training/scorer/audit.py). Not covered: a program that recognises held-out text it could only know from
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from training.scorer.client import Worker

__all__ = [
    "Call",
    "ForgedError",
    "HeldoutScores",
    "LogitServer",
    "NotFiniteError",
    "heldout_loss",
    "heldout_scores",
    "log_softmax",
    "picked_log_p",
]

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
        meta, answer = self._worker.call("train.logits", arrays=arrays, timeout=self._timeout)
        if "changed" in meta:
            raise ForgedError(
                f"parameter {str(meta['changed'])[:200]} was changed while the model was asked for logits"
            )
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


@dataclass(frozen=True)
class HeldoutScores:
    """What was said of every token of rows int32 [n, T + 1] but the first of each.

    Attributes:
        log_p: float32 [n, T], in nats.
        calls: int64 [n, T], the number of the call in `LogitServer.calls` whose answer it is.
        inside: int64 [n], the row's number in those calls.
    """

    log_p: np.ndarray
    calls: np.ndarray
    inside: np.ndarray

    @property
    def loss(self) -> dict[str, float | int | None]:
        """Mean loss in nats a token, as {value, n: tokens, se}.

        The standard error is over rows, since tokens of one row are not independent.
        """
        losses = -self.log_p.mean(axis=1, dtype=np.float64)
        se = float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else None
        return {"value": float(losses.mean()), "n": self.log_p.size, "se": se}


def heldout_scores(server: LogitServer, rows: np.ndarray) -> HeldoutScores:
    """Asks for rows int32 [n, T + 1] whole, several a call; a row whose logits are over MOST_BYTES in pieces.

    Raises:
        NotFiniteError: the loss of a row is not finite. Otherwise as LogitServer.
    """
    log_p = np.zeros((len(rows), rows.shape[1] - 1), dtype=np.float32)
    calls, inside = np.zeros(log_p.shape, dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    count = max(1, MOST_BYTES // (4 * server.vocab * rows.shape[1]))
    for first in range(0, len(rows), count):
        part = slice(first, min(first + count, len(rows)))
        inside[part] = np.arange(part.stop - first)
        for columns, answer in _pieces(server, rows[part]):
            calls[part, columns] = len(server.calls) - 1
            log_p[part, columns] = picked_log_p(answer, rows[part, 1:][:, columns])
    finite = np.isfinite(log_p).all(axis=1)
    if not finite.all():
        # Logits near the end of float32 are finite, and the loss that they make is not.
        raise NotFiniteError(f"the loss of {int((~finite).sum())} of {len(rows)} held-out rows is not finite")
    return HeldoutScores(log_p, calls, inside)


def heldout_loss(server: LogitServer, rows: np.ndarray) -> dict[str, float | int | None]:
    """`HeldoutScores.loss` of these rows. Raises as `heldout_scores`."""
    return heldout_scores(server, rows).loss


def _pieces(server: LogitServer, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(Positions, logits of all rows there [rows, positions, V]), in one call where that is within the bound."""
    tokens = rows[:, :-1]
    width = tokens.shape[1]
    step = max(1, MOST_BYTES // (4 * server.vocab * len(rows)))
    if step >= width:
        yield slice(0, width), server.all(tokens)
        return
    for start in range(0, width, step):
        stop = min(start + step, width)
        grid = np.stack(np.meshgrid(np.arange(len(rows)), np.arange(start, stop), indexing="ij"), -1).reshape(-1, 2)
        yield slice(start, stop), server.at(tokens, grid).reshape(len(rows), stop - start, -1)


def picked_log_p(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log-probability of each target [...], float32. logits [..., V] is used up as scratch space."""
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, targets[..., None].astype(np.int64), -1)[..., 0]
    np.exp(logits, out=logits)
    result: np.ndarray = chosen - np.log(logits.sum(-1))
    return result
