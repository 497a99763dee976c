"""The audit: no scored answer may depend on the tokens after it.

A candidate runs in the process that answers, so nothing it says of itself is believed, and it may have been written by
someone who read this file. What it cannot do is know a token before it is shown. So three processes of the same program
are kept apart (training/scorer/verdict.py):

1. The trained process gives its weights away before it is shown any text that is scored. Then it is scored on whole
   rows. It does not know which places will be audited: they are drawn afterwards, with randomness made in this run.
2. It is ended. Only then a fresh process gets the program and the weights, and is asked for the logits at the audited
   places, each in a row whose later tokens are random. It never sees a row with its future. It knows what is audited,
   and has nobody to tell.
3. What it says of the token that follows must be what was scored.

The order matters. Weights that were read later could carry the text; a process that is asked first could be honest
there and cheat elsewhere; two that live at once could signal through locks or load.

**Not a fact about the program, but about the number.** What is compared is the log-probability of the token that
follows, in nats, since the score is the mean of nothing else. Its tolerance is absolute: multiplying all logits widens
nothing. A program whose honest rounding is larger than that is no forger and does not fail; it is only asked more
(training/scorer/confirm.py), where equal questions leave no room for rounding.

**How many places.** A forgery of g nats a token on average lies on places that are worth something. Places are drawn
with probability proportional to what they can be worth: an upper bound of the loss without forgery less the loss that
was scored. A draw then hits forged places with probability g / mean worth at least, whichever the program chose; the
number of draws makes two hits 99 % certain for g = `eval.audit_gain` of the profile.

**What counts.** A suspect is a place where the two differ by more than `TOLERANCE`; two are needed. What lies below is
judged together: the mean gain, estimated from the draws with the weights that make it unbiased, may be a quarter of
`audit_gain`, or three of its standard errors. Noise of variance v hides 3 sqrt(v / n) from n draws, but a mean of log-
probabilities falls by v / 2 through it: what is left is 4.5 / n at best. Suspects are no verdict.

**Benchmarks** are audited alike, one place a row. Sight of a continuation raises all choices of an item, so it can
hardly gain anything: no mean is tested there.

Not covered: what a program knows of held-out text from elsewhere, signals through caches of the machine that outlive a
process, and what training itself may do, which is no matter of the future (training/worker/guard.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from training.scorer.heldout import MOST_BYTES, LogitServer, picked_log_p
from training.scorer.scored import Places, Scored

__all__ = ["FEWEST", "TOLERANCE", "Audit", "Suspect", "changed_futures", "draws_needed"]

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Change of a log-probability, in nats, that rounding explains where shapes differ (docs/verifier-evidence.md)."""
FEWEST = 2
"""Places that must differ: one may be an accident. They may be in one row, which can be worth a gain by itself."""
_TWO_HITS = 6.64
"""Poisson mean at which fewer than two hits have probability 1 %."""
_MEAN_SHARE, _MEAN_ERRORS = 0.25, 3.0
_MOST_TOKENS = 1 << 12
"""Tokens of one question."""
_CHOICES = 128
"""Rows of benchmarks that are audited."""


@dataclass(frozen=True)
class Suspect:
    """A scored place that a fresh process without its future answers otherwise.

    Attributes:
        number: in `Audit.places`.
        gained: log-probability as scored less the one said without the future, in nats.
    """

    number: int
    gained: float


class Audit:
    """Draws places of what was scored, asks a fresh process for them without their future, and compares.

    Args:
        random: not to be guessed by the program.
        gain: smallest forged gain, in nats a token, that is to be found with 99 % probability.
        tolerance: in nats.

    Attributes:
        places: that were drawn, those of held-out rows first.
    """

    def __init__(self, scored: Scored, random: np.random.Generator, gain: float, tolerance: float) -> None:
        self._calls, self._random, self._gain, self._tolerance = scored.calls, random, gain, tolerance
        drawn, self._counts = _drawn(scored.heldout, random, gain)
        self._heldout, self._mean_worth = len(drawn), float(scored.heldout.worth.mean()) if len(drawn) else 0.0
        self.places = Places.joined([drawn, _one_a_row(scored.choices, random)])
        self._gained = np.full(len(self.places), np.nan)

    def ask(self, server: LogitServer) -> None:
        """Asks for every place. A row's places come one a question, in ascending order."""
        for chosen in self._questions(server.vocab):
            places = self.places.take(chosen)
            width = int(places.place.max()) + 2
            tokens = self._random.integers(0, server.vocab, (len(places), width)).astype(np.int32)
            for number, (call, row, place) in enumerate(zip(places.call, places.row, places.place, strict=True)):
                tokens[number, : place + 1] = self._calls[call].tokens[row, : place + 1]
            asked = np.stack([np.arange(len(places)), places.place], axis=1).astype(np.int32)
            self._gained[chosen] = places.said - picked_log_p(server.at(tokens, asked), places.target)

    def _questions(self, vocab: int) -> Iterator[np.ndarray]:
        """Numbers of places that are asked together.

        Rows that have nothing in common may stand in one question. Places of rows that begin alike, as the choices of
        one benchmark item do, come one a question, the lower ones first: no row shows what follows a place that has
        still to be asked.
        """
        most_rows = max(1, MOST_BYTES // (4 * vocab))
        heldout, choices = np.arange(self._heldout), np.arange(self._heldout, len(self.places))
        rounds = [*self._rounds(heldout, self.places.owner[heldout]), *self._rounds(choices, self._beginnings(choices))]
        for chosen in rounds:
            batch: list[int] = []
            for number in chosen[np.argsort(self.places.place[chosen], kind="stable")].tolist():
                if batch and (len(batch) + 1 > most_rows or (len(batch) + 1) * (self._width(number)) > _MOST_TOKENS):
                    yield np.array(batch)
                    batch = []
                batch.append(number)
            yield np.array(batch)

    def _rounds(self, numbers: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
        """`numbers` of places in rounds with at most one of each group, whose places come in ascending order."""
        order = np.lexsort((self.places.place[numbers], groups))
        ranks = _ranks(groups[order])
        return [numbers[order[ranks == rank]] for rank in range(int(ranks.max(initial=-1)) + 1)]

    def _beginnings(self, numbers: np.ndarray) -> np.ndarray:
        """A number for each place, equal where rows are equal as far as all of them are shown: such a row can show what
        follows the place of another. Text that two items share elsewhere can as well (a few in a hundred places where
        a benchmark repeats itself); the other places still tell."""
        shown = int(self.places.place[numbers].min()) + 1 if len(numbers) else 0
        rows = (
            self._calls[call].tokens[row, :shown].astype(np.int32).tobytes()
            for call, row in zip(self.places.call[numbers], self.places.row[numbers], strict=True)
        )
        known: dict[bytes, int] = {}
        return np.array([known.setdefault(row, len(known)) for row in rows], dtype=np.int64)

    def _width(self, number: int) -> int:
        return int(self.places.place[number]) + 2

    def mean_gain(self) -> tuple[float, float]:
        """(Nats a token that the held-out loss is lower than the fresh process would have it, estimated; its standard
        error)."""
        if not self._heldout:
            return 0.0, 0.0
        each = self._gained[: self._heldout] / self.places.worth[: self._heldout] * self._mean_worth
        mean = float(np.average(each, weights=self._counts))
        return mean, math.sqrt(float((self._counts * (each - mean) ** 2).sum())) / float(self._counts.sum())

    def suspects(self) -> list[Suspect]:
        """What cannot be rounding, or accident: all drawn places, the most suspicious first; none where nothing is."""
        order = np.argsort(-np.abs(self._gained), kind="stable")
        found = [Suspect(int(number), float(self._gained[number])) for number in order]
        mean, error = self.mean_gain()
        gained = mean > _MEAN_SHARE * self._gain and mean > _MEAN_ERRORS * error
        return found if gained or self._differing() >= FEWEST else []

    def said(self) -> str:
        """What was found, for a person."""
        differing = self._differing()
        return (
            f"{len(self.places):,} scored places were asked of a fresh process without their future; "
            f"{differing if differing else 'no'} place{'s' if differing > 1 else ''} differed, the held-out loss by "
            f"{self.mean_gain()[0]:.2g} nats on average"
        )

    def _differing(self) -> int:
        """Places that differ by more than the tolerance."""
        return int((np.abs(self._gained) > self._tolerance).sum())


def _drawn(places: Places, random: np.random.Generator, gain: float) -> tuple[Places, np.ndarray]:
    """(Places drawn by their worth, each once, how often each was drawn)."""
    if not len(places):
        return places, np.zeros(0, dtype=np.int64)
    draws = min(draws_needed(float(places.worth.mean()), gain), 8 * len(places))
    picked = random.choice(len(places), size=draws, p=places.worth / places.worth.sum())
    chosen, counts = np.unique(picked, return_counts=True)
    return places.take(chosen), counts


def _one_a_row(places: Places, random: np.random.Generator) -> Places:
    """One place of each of at most _CHOICES rows."""
    shuffled = places.take(random.permutation(len(places)))
    _, first = np.unique(shuffled.owner, return_index=True)
    return shuffled.take(np.sort(first)[:_CHOICES])


def _ranks(groups: np.ndarray) -> np.ndarray:
    """For sorted `groups`, from 0: how many equal ones stand before each."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))


def changed_futures(tokens: np.ndarray, cuts: Mapping[int, int], vocab: int, random: np.random.Generator) -> np.ndarray:
    """`tokens` with random ones after the place of each row in `cuts`."""
    changed = tokens.copy()
    for row, cut in cuts.items():
        changed[row, cut + 1 :] = random.integers(0, vocab, tokens.shape[1] - cut - 1)
    return changed


def draws_needed(mean_worth: float, gain: float) -> int:
    """Draws after which two or more hit a forged gain of `gain` nats a token with 99 % probability."""
    return math.ceil(_TWO_HITS * mean_worth / gain)
