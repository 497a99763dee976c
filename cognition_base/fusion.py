"""One way to rank what a retriever found, whichever retriever it was."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cognition_base.corpus import Entry
from common.embeddings import DEFAULT_MODEL

__all__ = ["Found", "Retriever", "VectorSource", "calibrate", "fuse", "query_words", "reciprocal_rank"]

RANK_CONSTANT = 60
"""Cormack, Clarke and Büttcher, SIGIR 2009: the constant that keeps the first ranks from deciding alone."""

MAX_WORDS = 128
MAX_CHARACTERS = 1000
"""Fewer than the 1,024 clauses that a full-text query may have, even where each character is a word."""

CALIBRATION: dict[str, tuple[tuple[float, float], ...]] = {
    DEFAULT_MODEL: ((0.0, 0.0), (0.22, 0.3), (0.34, 0.5), (0.40, 0.6), (0.50, 0.75), (0.65, 0.9), (1.0, 1.0)),
}
"""Cosine -> score, by model: corners of a monotone piecewise-linear map.

The usual thresholds 0.5 and 0.6 were set for a model whose cosines lie at 0.7 to 1.0. With the packaged model, over
the queries in tests/cognition_base/queries.json, the paper that treats a symptom has a median cosine of 0.50 (nine in
ten lie above 0.42), an entry about something else in the field 0.30, and an unrelated text has at most 0.22 with any
entry. So 0.6 keeps what is clearly related, 0.5 also what is probably related, and nothing unrelated passes either.
A model without a row here is taken at its cosine.
"""


@dataclass(frozen=True)
class Found:
    """What a retriever found for one query.

    Attributes:
        cosines: entry id -> largest cosine of any window of the query and any key of the entry.
        lexical: entry ids by BM25, best first.
    """

    cosines: Mapping[str, float]
    lexical: Sequence[str]


class VectorSource(Protocol):
    """Gives the key vectors of entries: float32 [n, 2, dimension], unit norm."""

    def __call__(self, entries: Sequence[Entry]) -> np.ndarray: ...


class Retriever(Protocol):
    """Holds the entries and finds candidates among them. Thread-safe."""

    def index(self, entries: Sequence[Entry], *, model: str, vectors: VectorSource, fresh: bool = False) -> None:
        """Makes exactly `entries` findable, in one step for whoever searches meanwhile.

        An index of the same entries and model may be kept, unless `fresh`; `vectors` is called only when one is built.
        """
        ...

    def find(self, text: str, query: np.ndarray, limit: int) -> Found:
        """Candidates for a query.

        Args:
            text: the query.
            query: float32 [windows, dimension], its vectors.
            limit: entries wanted from each way of finding, at least.
        """
        ...

    def close(self) -> None: ...


def query_words(text: str) -> list[str]:
    """The different words of a query, lower case, in their order: the first MAX_WORDS, and 1,000 characters at most."""
    words: dict[str, None] = {}
    length = 0
    for match in re.finditer(r"\w+", text):
        word = match[0].lower()
        length += len(word)
        if len(words) >= MAX_WORDS or length > MAX_CHARACTERS:
            break
        if word.strip("_"):
            length -= len(word) if word in words else 0
            words[word] = None
    return list(words)


def fuse(found: Found, model: str) -> list[tuple[str, float]]:
    """(entry id, score in [0, 1]), best first: in order of reciprocal rank over both lists, scored by cosine."""
    by_cosine = sorted(found.cosines, key=lambda entry: (-found.cosines[entry], entry))
    lexical = [entry for entry in found.lexical if entry in found.cosines]
    return [(entry, calibrate(found.cosines[entry], model)) for entry in reciprocal_rank([by_cosine, lexical])]


def reciprocal_rank(rankings: Sequence[Sequence[str]]) -> list[str]:
    """Merges rankings: an item's weight is the sum of 1 / (60 + its rank), ranks from 1; ties go by name."""
    weights: dict[str, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            weights[item] = weights.get(item, 0.0) + 1.0 / (RANK_CONSTANT + rank)
    return sorted(weights, key=lambda item: (-weights[item], item))


def calibrate(cosine: float, model: str) -> float:
    """A cosine of `model` as a score in [0, 1]; monotone."""
    corners = CALIBRATION.get(model)
    if corners is None:
        return min(1.0, max(0.0, cosine))
    return float(np.interp(cosine, [x for x, _ in corners], [y for _, y in corners]))
