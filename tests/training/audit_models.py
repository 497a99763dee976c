"""Models for the audit's tests: causal, leaking and unsteady ones, and the processes in which they are asked.

A model sees what a program sees: the tokens of the questions, their shapes and how many there were.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, cast

import numpy as np

from tests.training.models import Hashed
from training.scorer.client import Worker
from training.scorer.heldout import LogitServer, heldout_scores
from training.scorer.scored import Places, Scored, heldout_places
from training.scorer.verdict import Bench, Verdict, verdict

__all__ = ["VOCAB", "Counting", "Judged", "Noisy", "Peeking", "When", "judge", "rows", "score"]

VOCAB = 50
When = Callable[[int, int, tuple[int, ...], np.ndarray], bool]
"""(Questions so far, number of the row in the question, shape of its tokens, the row up to the place)."""


def always(number: int, row: int, shape: tuple[int, ...], seen: np.ndarray) -> bool:
    return True


class Peeking(Hashed):
    """Gives the token that follows `by` nats more, or less, wherever it is in sight and `when` holds."""

    def __init__(self, when: When = always, by: float = 3.0) -> None:
        super().__init__(VOCAB)
        self.when, self.by = when, by

    def all(self, tokens: np.ndarray) -> np.ndarray:
        super().all(tokens)
        return np.stack([[self.seen(tokens, row, at) for at in range(tokens.shape[1])] for row in range(len(tokens))])

    def at(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        super().at(tokens, places)
        return np.stack([self.seen(tokens, row, at) for row, at in places])

    def seen(self, tokens: np.ndarray, row: int, at: int) -> np.ndarray:
        logits = self.plain(tokens, row, at)
        if at + 1 < tokens.shape[1] and self.when(len(self.calls), row, tokens.shape, tokens[row, : at + 1]):
            logits[tokens[row, at + 1]] += self.by
        return logits

    def plain(self, tokens: np.ndarray, row: int, at: int) -> np.ndarray:
        return self.next(tokens[row, : at + 1])


class Counting(Peeking):
    """Its answers drift with every question, whatever it is asked: a step counter in the model."""

    def __init__(self, start: int = 0, when: When = lambda *_: False) -> None:
        super().__init__(when)
        self.start = start

    def plain(self, tokens: np.ndarray, row: int, at: int) -> np.ndarray:
        return super().plain(tokens, row, at) * (1 + 0.01 * (self.start + len(self.calls)))


class Noisy(Peeking):
    """Adds noise of size `by`: the same for a place of a question of one shape (rounding), or never the same."""

    def __init__(self, size: float, *, steady: bool, when: When = lambda *_: False, by: float = 3.0) -> None:
        super().__init__(when, by)
        self.size, self.steady = size, steady
        self.random = np.random.default_rng()

    def plain(self, tokens: np.ndarray, row: int, at: int) -> np.ndarray:
        exact = self.next(tokens[row, : at + 1])
        random = np.random.default_rng([*tokens.shape, row, at]) if self.steady else self.random
        return exact + random.normal(0, self.size, VOCAB).astype(np.float32)


class Process:
    """Where a model is asked; tells `log` of its start and end."""

    def __init__(self, model: LogitServer, name: str, log: list[str]) -> None:
        self.model, self.name, self._log = model, name, log
        log.append(f"{name} starts")

    def close(self) -> None:
        self._log.append(f"{self.name} ends")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, t: TracebackType | None) -> None:
        self.close()


def rows(count: int = 12, length: int = 33, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (count, length)).astype(np.int32)


def score(model: LogitServer, data: np.ndarray) -> Scored:
    scores = heldout_scores(model, data)
    places, owners = heldout_places(scores, data)
    return Scored(scores.loss, {}, list(model.calls), places, Places.joined([]), owners)


class Judged:
    """How a program was judged that is `trained` in the process that was trained, and `again` in every other."""

    def __init__(self, trained: LogitServer, again: Callable[[], LogitServer], data: np.ndarray, **spec: Any) -> None:
        self.log: list[str] = []
        self.asked: list[LogitServer] = []
        self._again, self._data, self._spec = again, data, spec
        process = Process(trained, "trained", self.log)
        bench = Bench(
            fresh=cast("Callable[[], Worker]", self._fresh),
            serve=lambda worker: cast("Process", worker).model,
            score=lambda server: score(server, data),
            random=np.random.default_rng(spec.get("seed", 1)),
            gain=spec.get("gain", 0.3),
            dtype=spec.get("dtype", "float32"),
        )
        self.trained = score(trained, data)
        self.verdict: Verdict = verdict(cast("Worker", process), trained, self.trained, bench)

    def _fresh(self) -> Process:
        self.asked.append(self._again())
        return Process(self.asked[-1], f"process {len(self.asked)}", self.log)


def judge(model: Callable[[], LogitServer], data: np.ndarray | None = None, **spec: Any) -> Judged:
    """Judges a program that is the same model in every process."""
    return Judged(model(), model, rows() if data is None else data, **spec)
