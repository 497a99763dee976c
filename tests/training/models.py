"""Models whose logits are plain functions of the tokens seen, behind the scorer's interface to a worker."""

from __future__ import annotations

import numpy as np

from training.scorer.heldout import Call, LogitServer


class Model(LogitServer):
    """Logits as a function of the tokens seen so far; counts the rows asked for."""

    def __init__(self, vocab: int = 384) -> None:
        self.vocab, self.padding, self.rows = vocab, 0, 0
        self.calls: list[Call] = []

    def next(self, seen: np.ndarray) -> np.ndarray:
        return np.zeros(self.vocab, dtype=np.float32)

    def all(self, tokens: np.ndarray) -> np.ndarray:
        self.rows += len(tokens)
        self.calls.append(Call(tokens, None))
        return np.stack([[self.next(row[: at + 1]) for at in range(len(row))] for row in tokens])

    def at(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        self.rows += len(tokens)
        self.calls.append(Call(tokens, places))
        return np.stack([self.next(tokens[row, : at + 1]) for row, at in places])


class Hashed(Model):
    """Pseudo-random logits that depend on every token seen."""

    def next(self, seen: np.ndarray) -> np.ndarray:
        return np.random.default_rng([*seen.tolist()]).normal(size=self.vocab).astype(np.float32)
