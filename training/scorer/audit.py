"""The audit: no scored logit may depend on the tokens after it.

A candidate runs in the process that answers, so nothing it says of itself is believed. What it cannot do is know the
future before it is shown. So the scorer asks first for logits at sampled places of the held-out rows, each in a row
whose later tokens are random, and only then for the rows as they are. What the model says of a place with its true
future in sight must be what it said before. One row is never asked twice in one call, and its places come in
ascending order, so no earlier answer could have used a later one's tokens.

**How many places.** A leak pays only where it lowers the loss, and it lowers a token's loss by no more than the loss.
Places are drawn with probability proportional to a bound of that, the token's unigram surprisal plus 2 nats. A forged
gain of g nats a token then lies on places that a draw hits with probability g / mean bound at least, whatever places
the program chose; the number of draws makes two hits 99 % certain for g = `eval.audit_gain` of the profile.

**What counts.** A suspect is a place where some logit moved by more than `tolerance` (relative to the spread of
logits), which is what rounding does at other shapes. Changes below it are judged together: where the loss at audited
places is lower with the future in sight by over five standard errors and over half the gain, the worst places are
suspects. Suspects are no verdict: see training/scorer/confirm.py.

**Who remembers.** The process that is asked is the one that is scored, so it could keep what it was asked and be honest
there only. As many places, drawn alike, are never asked for; a model that does far better on those is `forged` (see
`HeldoutAudit.preference`). What that test cannot see is a preference below six standard errors.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from training.scorer.heldout import LogitServer, log_softmax

__all__ = ["TOLERANCE", "BenchmarkAudit", "HeldoutAudit", "Suspect", "changed_futures", "draws_needed"]

TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""Change of a logit, relative to the spread of logits, that rounding explains."""
_TWO_HITS = 6.64
"""Poisson mean at which fewer than two hits have probability 1 %."""
_MARGIN = 2.0
_MOST_TOKENS = 1 << 14
"""Tokens of one question."""
_MOST_COLUMNS = 4096
"""Logits of a place that are kept and compared; of a larger vocabulary a secret choice."""


@dataclass(frozen=True)
class Suspect:
    """A place of a scored call whose logits changed when only later tokens did.

    Attributes:
        call: index in `LogitServer.calls`.
        row, place: in that call's tokens.
        change: largest change of a logit; bound: what rounding explains.
    """

    call: int
    row: int
    place: int
    change: float
    bound: float


class HeldoutAudit:
    """Asks places of held-out rows without their future, and compares when the rows are scored.

    Args:
        rows: int32 [n, T + 1], as scored.
        secret: bytes that the sandbox never saw, from which places and futures are drawn: the same in every run.
        gain: smallest forged gain, in nats a token, that is to be found with 99 % probability.
        tolerance: change of a logit relative to the spread of logits that rounding explains.

    Attributes:
        places: int64 [m, 2] of (row, position), each once, ascending in each row.
        controls: as many, drawn alike, which nobody asks for: see `preference`.
    """

    def __init__(self, rows: np.ndarray, secret: bytes, gain: float, tolerance: float) -> None:
        self._rows, self._gain, self._tolerance = rows, gain, tolerance
        self._random = np.random.default_rng(list(hashlib.sha256(secret).digest()))
        drawn = self._drawn()
        asked = self._random.random(len(drawn)) < 0.5
        self.places, self.controls = drawn[asked], drawn[~asked]
        self._losses: tuple[list[float], list[float]] = ([], [])
        self._early: dict[tuple[int, int], tuple[np.ndarray, float]] = {}
        self._columns: np.ndarray | slice = slice(None)
        self._found: list[tuple[Suspect, float]] = []

    def _drawn(self) -> np.ndarray:
        tokens = self._rows[:, :-1].shape[1]
        if tokens < 2:
            return np.zeros((0, 2), dtype=np.int64)
        bounds = surprisal(self._rows[:, 1:])[:, :-1] + _MARGIN  # at the last place there is no future to see
        flat = bounds.ravel() / bounds.sum()
        draws = draws_needed(float(bounds.mean()), self._gain)
        picked = np.unique(self._random.choice(flat.size, size=min(2 * draws, 8 * flat.size), p=flat))
        return np.stack(np.unravel_index(picked, bounds.shape), axis=1)

    def ask(self, server: LogitServer) -> None:
        """Asks for every place, before any row is shown whole."""
        if server.vocab > _MOST_COLUMNS:
            self._columns = self._random.choice(server.vocab, _MOST_COLUMNS, replace=False)
        for batch in self._batches():
            shown = self._rows[batch[:, 0], : int(batch[:, 1].max()) + 2]
            tokens = changed_futures(shown, dict(enumerate(batch[:, 1].tolist())), server.vocab, self._random)
            asked = np.stack([np.arange(len(batch)), batch[:, 1]], axis=1).astype(np.int32)
            for (row, place), logits in zip(batch.tolist(), server.at(tokens, asked), strict=True):
                self._early[row, place] = self._kept(logits, row, place)

    def _batches(self) -> Iterator[np.ndarray]:
        """Questions in which no row occurs twice, places of a row ascending, similar lengths together."""
        ranks: Counter[int] = Counter()
        rounds: dict[int, list[tuple[int, int]]] = {}
        for row, place in self.places.tolist():
            rounds.setdefault(ranks[row], []).append((row, place))
            ranks[row] += 1
        for number in sorted(rounds):
            batch: list[tuple[int, int]] = []
            for item in sorted(rounds[number], key=lambda pair: pair[1]):
                if batch and (len(batch) + 1) * (item[1] + 2) > _MOST_TOKENS:
                    yield np.array(batch)
                    batch = []
                batch.append(item)
            yield np.array(batch)

    def _kept(self, logits: np.ndarray, row: int, place: int) -> tuple[np.ndarray, float]:
        """The logits that are compared, and the log-probability of the token that follows."""
        return logits[self._columns].copy(), float(log_softmax(logits.copy())[int(self._rows[row, place + 1])])

    def see(self, call: int, first: int, start: int, logits: np.ndarray) -> None:
        """Compares the logits [rows, positions, V] of a scored call; an OnLogits of `heldout_loss`."""
        spread = max(float(logits.std()), 1e-6)
        for row, place in _within(self.controls, first, start, logits):
            self._losses[1].append(-self._kept(logits[row - first, place - start], row, place)[1])
        for row, place in _within(self.places, first, start, logits):
            late, said = self._kept(logits[row - first, place - start], row, place)
            self._losses[0].append(-said)
            early, said_early = self._early[row, place]
            # The scored token is compared too, whichever columns are.
            change = max(float(np.abs(late - early).max()), abs(said - said_early))
            suspect = Suspect(call, row - first, place, change, self._tolerance * spread)
            self._found.append((suspect, said - said_early))

    @property
    def compared(self) -> int:
        """Places that were compared so far."""
        return len(self._found)

    def preference(self) -> tuple[float, float] | None:
        """(mean scored loss at the places that were asked for, the same at the controls), where they differ by more
        than six standard errors and half the gain; else None.

        A fair coin chose which of the drawn places were asked for, so an honest model does as well on either half. One
        that remembers what it was asked, and sees the future elsewhere, does not.
        """
        asked, controls = (np.array(losses) for losses in self._losses)
        if min(len(asked), len(controls)) < 2:
            return None
        error = math.sqrt(asked.var(ddof=1) / len(asked) + controls.var(ddof=1) / len(controls))
        better = float(asked.mean() - controls.mean())
        if better > 6 * error and better > self._gain / 2:
            return float(asked.mean()), float(controls.mean())
        return None

    def suspects(self) -> list[Suspect]:
        """What cannot be rounding, the largest change first."""
        found = [suspect for suspect, _ in self._found if suspect.change > suspect.bound]
        if len(self._found) > 1:
            gains = np.array([gained for _, gained in self._found])
            error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
            if gains.mean() > 5 * error and gains.mean() > self._gain / 2:
                order = np.argsort(-gains)[: max(2, len(gains) // 20)]
                found += [self._found[int(number)][0] for number in order]
        return sorted(set(found), key=lambda suspect: -suspect.change)


class BenchmarkAudit(LogitServer):
    """Asks a share of the benchmark calls first with other futures after one open place of some rows.

    Most questions of a benchmark end at the place that is scored: there is no future to see. Where a continuation has
    several tokens the first of them has one.

    Args:
        share: of the calls with open places; rows: of each such call that are audited.
    """

    def __init__(self, server: LogitServer, secret: bytes, tolerance: float, share: float, rows: int = 32) -> None:
        self._server, self.vocab, self.padding = server, server.vocab, server.padding
        self.calls = server.calls
        self._tolerance, self._share, self._rows = tolerance, share, rows
        self._random = np.random.default_rng(list(hashlib.sha256(b"benchmarks" + secret).digest()))
        self.compared = 0
        self.found: list[Suspect] = []

    def all(self, tokens: np.ndarray) -> np.ndarray:
        return self._server.all(tokens)

    def at(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        cuts = self._cuts(tokens, places) if self._random.random() < self._share else {}
        if not cuts:
            return self._server.at(tokens, places)
        early = self._server.at(changed_futures(tokens, cuts, self.vocab, self._random), places)
        answer = self._server.at(tokens, places)
        bound = self._tolerance * max(float(answer.std()), 1e-6)
        for row, cut in cuts.items():
            kept = (places[:, 0] == row) & (places[:, 1] <= cut)
            change = float(np.abs(early[kept] - answer[kept]).max())
            self.compared += 1
            if change > bound:
                self.found.append(Suspect(len(self.calls) - 1, row, cut, change, bound))
        return answer

    def _cuts(self, tokens: np.ndarray, places: np.ndarray) -> dict[int, int]:
        """Row -> an asked place after which the row still has tokens."""
        ends = np.array([_last_token(row, self.padding) for row in tokens])
        cuts: dict[int, int] = {}
        for row, place in self._random.permutation(places[places[:, 1] < ends[places[:, 0]]]).tolist():
            if len(cuts) < self._rows:
                cuts.setdefault(row, place)
        return cuts


def _within(places: np.ndarray, first: int, start: int, logits: np.ndarray) -> list[list[int]]:
    """Those of `places` that lie in the block of logits [rows, positions, V]."""
    inside = (places[:, 0] >= first) & (places[:, 0] < first + len(logits))
    inside &= (places[:, 1] >= start) & (places[:, 1] < start + logits.shape[1])
    found: list[list[int]] = places[inside].tolist()
    return found


def changed_futures(tokens: np.ndarray, cuts: dict[int, int], vocab: int, random: np.random.Generator) -> np.ndarray:
    """`tokens` with random ones after the place of each row in `cuts`."""
    changed = tokens.copy()
    for row, cut in cuts.items():
        changed[row, cut + 1 :] = random.integers(0, vocab, tokens.shape[1] - cut - 1)
    return changed


def surprisal(tokens: np.ndarray) -> np.ndarray:
    """-ln of each token's frequency among `tokens`, counted with one more each: float64 of the same shape."""
    counts = np.bincount(tokens.ravel()) + 1.0
    bits: np.ndarray = -np.log(counts / counts.sum())[tokens]
    return bits


def draws_needed(mean_bound: float, gain: float) -> int:
    """Draws after which two or more hit a forged gain of `gain` nats a token with 99 % probability."""
    return math.ceil(_TWO_HITS * mean_bound / gain)


def _last_token(row: np.ndarray, padding: int) -> int:
    """Position of the last token that is no padding; 0 for an empty row."""
    filled = np.flatnonzero(row != padding)
    return int(filled[-1]) if len(filled) else 0
