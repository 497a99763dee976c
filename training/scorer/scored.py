"""What a process was scored on: every question, every answer that a score is made of, and where these had a future."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from training.scorer.heldout import Call, HeldoutScores, LogitServer, picked_log_p

__all__ = ["Places", "Recorder", "Scored", "heldout_places", "surprisal"]

_MARGIN = 2.0
_LEAST_WORTH = 0.25


@dataclass(frozen=True)
class Places:
    """Scored places of rows that go on after the next token's place was predicted, as arrays of one length.

    Attributes:
        call, row, place: int64, where the answer is: number of the call, row and position there.
        owner: int64, which row it is: the same row in several calls has one owner.
        target: int64, the token that follows, which the score is about.
        said: float64, its log-probability as scored, in nats.
        worth: float64, how much a forgery can have gained there, in nats.
    """

    call: np.ndarray
    row: np.ndarray
    place: np.ndarray
    owner: np.ndarray
    target: np.ndarray
    said: np.ndarray
    worth: np.ndarray

    def __len__(self) -> int:
        return len(self.call)

    def take(self, index: np.ndarray) -> Places:
        return Places(*(values[index] for values in vars(self).values()))

    @staticmethod
    def joined(parts: list[Places]) -> Places:
        if not parts:
            none, nothing = np.zeros(0, dtype=np.int64), np.zeros(0)
            return Places(none, none, none, none, none, nothing, nothing)
        return Places(
            *(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True))
        )


@dataclass(frozen=True)
class Scored:
    """One process's scores, and all that was asked for them.

    Attributes:
        loss, benchmarks: as in result.json.
        calls: every question, in order.
        heldout, choices: places with a future: of held-out rows, and of benchmark rows.
        owners: number of a call -> the owner of each of its rows.
    """

    loss: dict[str, float | int | None]
    benchmarks: dict[str, dict[str, Any]]
    calls: list[Call]
    heldout: Places
    choices: Places
    owners: dict[int, np.ndarray]


def heldout_places(scores: HeldoutScores, rows: np.ndarray) -> tuple[Places, dict[int, np.ndarray]]:
    """(Every place of rows int32 [n, T + 1] but the last, which has no future; the owners of each call's rows).

    A forgery gains no more at a token than its loss without the forgery less the loss that was scored. What the former
    would have been is bounded by the token's unigram surprisal plus 2 nats.
    """
    count, width = scores.log_p.shape
    owner, place = (axis.ravel() for axis in np.indices((count, width - 1)))
    worth = np.maximum(surprisal(rows[:, 1:]) + _MARGIN + scores.log_p, _LEAST_WORTH)
    found = Places(
        call=scores.calls[:, :-1].ravel(),
        row=scores.inside[owner],
        place=place,
        owner=owner,
        target=rows[:, 1:-1].ravel().astype(np.int64),
        said=scores.log_p[:, :-1].ravel().astype(np.float64),
        worth=worth[:, :-1].ravel(),
    )
    owners = {int(call): np.flatnonzero((scores.calls == call).any(axis=1)) for call in np.unique(scores.calls)}
    return found, owners


class Recorder(LogitServer):
    """Passes benchmark questions on to a server and keeps what it said at places that have a future.

    Most questions of a benchmark end at the place that is scored. Where a continuation has several tokens, all but the
    last are predicted in a row that goes on with them.

    Args:
        first: number of the first owner to give out.

    Attributes:
        owners: number of a call -> the owner of each of its rows, each its own.
    """

    def __init__(self, server: LogitServer, first: int) -> None:
        self._server, self.vocab, self.padding = server, server.vocab, server.padding
        self.calls = server.calls
        self.owners: dict[int, np.ndarray] = {}
        self._next = first
        self._found: list[Places] = []

    def all(self, tokens: np.ndarray) -> np.ndarray:
        return self._server.all(tokens)

    def at(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        answer = self._server.at(tokens, places)
        number = len(self.calls) - 1
        self.owners[number] = self._next + np.arange(len(tokens))
        self._next += len(tokens)
        ends = np.array([_last_token(row, self.padding) for row in tokens])
        chosen = np.flatnonzero(places[:, 1] < ends[places[:, 0]])
        if len(chosen):
            row, place = places[chosen].astype(np.int64).T
            target = tokens[row, place + 1].astype(np.int64)
            self._found.append(
                Places(
                    call=np.full(len(chosen), number),
                    row=row,
                    place=place,
                    owner=self.owners[number][row],
                    target=target,
                    said=picked_log_p(answer[chosen], target).astype(np.float64),
                    worth=np.ones(len(chosen)),
                )
            )
        return answer

    def places(self) -> Places:
        """All of them so far."""
        return Places.joined(self._found)


def surprisal(tokens: np.ndarray) -> np.ndarray:
    """-ln of each token's frequency among `tokens`, counted with one more each: float64 of the same shape."""
    counts = np.bincount(tokens.ravel()) + 1.0
    nats: np.ndarray = -np.log(counts / counts.sum())[tokens]
    return nats


def _last_token(row: np.ndarray, padding: int) -> int:
    """Position of the last token that is no padding; 0 for an empty row."""
    filled = np.flatnonzero(row != padding)
    return int(filled[-1]) if len(filled) else 0
