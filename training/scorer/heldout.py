"""What the scorer reads from a trained worker: logits. From them: the held-out loss, and an audit of causality.

The loss is computed here, from tokens that the sandbox never held, with numpy. The audit rides on the very calls that
are scored: each is asked a second time, same operation and same shape, with other futures. Not covered: a program that
recognises held-out text it could only know from elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from training.scorer.client import Worker

__all__ = ["AuditedServer", "ForgedError", "LogitServer", "NotFiniteError", "heldout_loss", "log_softmax"]

MOST_BYTES = 32 << 20
"""Logits asked for at once."""
MOST_CAUGHT = 1
"""Rows that may show a difference by accident; one more ends the run."""


class NotFiniteError(Exception):
    """The trained model answers with NaN or infinite logits."""


class ForgedError(Exception):
    """What came back cannot be the output of a causal model on the tokens sent."""


class LogitServer:
    """Asks a worker for logits and checks that they have the right shape and are finite.

    Args:
        vocab: size of the last dimension.
        padding: token that fills rows on the right.
    """

    def __init__(self, worker: Worker, vocab: int, padding: int, timeout: float = 300.0) -> None:
        self._worker, self.vocab, self.padding, self._timeout = worker, vocab, padding, timeout

    def at(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        """float32 [N, V]: logits of tokens int32 [B, T] at places int32 [N, 2] of (row, position)."""
        return self._ask([tokens.astype(np.int32), places.astype(np.int32)], (len(places), self.vocab))

    def all(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [B, T, V]: logits of tokens int32 [B, T]."""
        return self._ask([tokens.astype(np.int32)], (*tokens.shape, self.vocab))

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


def heldout_loss(server: LogitServer, rows: np.ndarray) -> dict[str, float | int | None]:
    """Mean loss in nats a token over rows int32 [n, T + 1], as {value, n: tokens, se}.

    The standard error is over rows, since tokens of one row are not independent.
    """
    losses = np.concatenate([_row_losses(server, part) for part in _parts(rows, server.vocab)])
    se = float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else None
    return {"value": float(losses.mean()), "n": int(rows[:, 1:].size), "se": se}


def _parts(rows: np.ndarray, vocab: int) -> Iterator[np.ndarray]:
    count = max(1, MOST_BYTES // (4 * vocab * rows.shape[1]))
    for start in range(0, len(rows), count):
        yield rows[start : start + count]


def _row_losses(server: LogitServer, rows: np.ndarray) -> np.ndarray:
    """float64 [rows]: mean loss of each row. A row whose logits are over the bound is asked for in pieces."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    width = tokens.shape[1]
    step = max(1, MOST_BYTES // (4 * server.vocab * len(rows)))
    if step >= width:
        picked = _picked(server.all(tokens), targets)
        return -picked.mean(axis=1, dtype=np.float64)
    total = np.zeros(len(rows))
    for start in range(0, width, step):
        stop = min(start + step, width)
        grid = np.stack(np.meshgrid(np.arange(len(rows)), np.arange(start, stop), indexing="ij"), -1).reshape(-1, 2)
        picked = _picked(server.at(tokens, grid), targets[:, start:stop].ravel())
        total -= picked.reshape(len(rows), -1).sum(axis=1, dtype=np.float64)
    return total / width


def _picked(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log-probability of each target. logits [..., V] is used up as scratch space."""
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, targets[..., None].astype(np.int64), -1)[..., 0]
    np.exp(logits, out=logits)
    result: np.ndarray = chosen - np.log(logits.sum(-1))
    return result


class AuditedServer(LogitServer):
    """A server whose calls are asked twice: as they are, and with every token after a random place of some rows
    replaced. What changes at or before such a place can only come from the future.

    Both questions have the same operation and the same shape, and come in random order, so a program cannot tell which
    of them is scored. A difference counts when it is over `tolerance` (in logits, relative to their spread), and again
    with other replacements over `tolerance` and four times the change between two equal calls.

    Covers every call of the held-out loss and a share of those of the benchmarks. Not covered: a program that keeps
    what it answered for a prefix and says it again; what that wins on one order it loses on the other.

    Args:
        secret: bytes that the sandbox never saw, from which rows and places are drawn; the same in every run.
        rows: rows of each call that get another future.

    Raises:
        ForgedError: two rows of a run were caught. Otherwise as LogitServer.
    """

    def __init__(self, server: LogitServer, secret: bytes, tolerance: float, rows: int) -> None:
        self._server, self.vocab, self.padding = server, server.vocab, server.padding
        self._tolerance, self._rows, self._caught = tolerance, rows, 0
        self._random = np.random.default_rng(list(hashlib.sha256(secret).digest()))
        self.share = 1.0
        """Share of the calls that are audited."""

    def at(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        if self._random.random() >= self.share:
            return self._server.at(tokens, places)
        return self._audited(tokens, places)

    def all(self, tokens: np.ndarray) -> np.ndarray:
        if self._random.random() >= self.share:
            return self._server.all(tokens)
        return self._audited(tokens, None)

    def _audited(self, tokens: np.ndarray, places: np.ndarray | None) -> np.ndarray:
        cuts = self._cuts(tokens, places)
        changed_first = bool(self._random.random() < 0.5)
        early = self._plain(self._changed(tokens, cuts), places) if changed_first else None
        answer = self._plain(tokens, places)
        other = early if early is not None else self._plain(self._changed(tokens, cuts), places)
        bound = self._tolerance * max(float(answer.std()), 1e-6)
        over = {row for row, change in self._changes(answer, other, cuts, places).items() if change > bound}
        if not over:
            return answer
        again, other = self._plain(tokens, places), self._plain(self._changed(tokens, cuts), places)
        noise, second = self._changes(answer, again, cuts, places), self._changes(answer, other, cuts, places)
        caught = sorted(row for row in over if second[row] > bound + 4 * noise[row])
        self._caught += len(caught)
        if self._caught > MOST_CAUGHT:
            raise ForgedError(
                f"the trained model sees the future: in {self._caught} rows its logits at or before a place changed "
                f"when only later tokens did (last: position {cuts[caught[-1]]} of {tokens.shape[1]}, by "
                f"{second[caught[-1]]:.3g}, tolerance {bound:.3g})"
            )
        return answer

    def _plain(self, tokens: np.ndarray, places: np.ndarray | None) -> np.ndarray:
        return self._server.all(tokens) if places is None else self._server.at(tokens, places)

    def _cuts(self, tokens: np.ndarray, places: np.ndarray | None) -> dict[int, int]:
        """Row -> the last place that must not change. With places it is one of those that are asked for."""
        last = tokens.shape[1] - 1
        if places is None:
            rows = self._random.permutation(len(tokens))[: self._rows if last > 0 else 0]
            return {int(row): int(self._random.integers(last)) for row in rows}
        open_places = self._random.permutation(places[places[:, 1] < last])
        cuts: dict[int, int] = {}
        for row, at in open_places.tolist():
            if len(cuts) < self._rows:
                cuts.setdefault(row, at)
        return cuts

    def _changed(self, tokens: np.ndarray, cuts: dict[int, int]) -> np.ndarray:
        """Tokens with other futures: random ones, or those of another row, which look like any other text."""
        changed = tokens.copy()
        for row, cut in cuts.items():
            source = int(self._random.integers(len(tokens)))
            drawn = self._random.integers(0, self.vocab, tokens.shape[1] - cut - 1)
            copied = source != row and self._random.random() < 0.5
            changed[row, cut + 1 :] = tokens[source, cut + 1 :] if copied else drawn
        return changed

    def _changes(
        self, one: np.ndarray, two: np.ndarray, cuts: dict[int, int], places: np.ndarray | None
    ) -> dict[int, float]:
        """Row -> largest change of a logit at or before its cut."""
        found: dict[int, float] = {}
        for row, cut in cuts.items():
            if places is None:
                change = np.abs(one[row, : cut + 1] - two[row, : cut + 1])
            else:
                kept = (places[:, 0] == row) & (places[:, 1] <= cut)
                change = np.abs(one[kept] - two[kept])
            found[row] = float(change.max())
        return found
