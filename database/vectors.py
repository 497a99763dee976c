"""Windows of motivations and who they belong to: exact search while there are few, approximate beyond.

A window has a position. The first positions may lie in an approximate index (inverted lists, IVF), the rest in an exact
one, so that whatever came after the last build is found exactly. Positions of removed elements are dead: they are
skipped, until a rebuild drops them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from database.exact_index import ExactIndex, load_faiss
from database.store import VectorRow

__all__ = ["RECALL", "Vectors", "approximate"]

RECALL = 0.95
"""Share of the ten nearest that an approximate index has to find of its own sample, when it is built."""
_QUERIES = 100
_NEIGHBOURS = 10
_TRAIN_PER_LIST = 40
_SEED = 20250701


@dataclass
class Vectors:
    """Not thread-safe. Row i of `owners` and `sequences` (int64 [n]) and of `alive` (bool [n]) is position i."""

    flat: ExactIndex | None = None
    lists: Any = None
    recall: float | None = None
    owners: np.ndarray = None  # type: ignore[assignment]
    sequences: np.ndarray = None  # type: ignore[assignment]
    alive: np.ndarray = None  # type: ignore[assignment]
    widest: int = 1

    def __post_init__(self) -> None:
        if self.owners is None:
            self.owners = np.zeros(0, dtype=np.int64)
            self.sequences = np.zeros(0, dtype=np.int64)
            self.alive = np.zeros(0, dtype=bool)

    @property
    def total(self) -> int:
        """Positions, dead ones included."""
        return len(self.owners)

    @property
    def listed(self) -> int:
        """Positions in the approximate index; they come first."""
        return 0 if self.lists is None else int(self.lists.ntotal)

    @property
    def dead(self) -> int:
        return self.total - int(self.alive.sum())

    @property
    def dimension(self) -> int:
        part = self.flat if self.flat is not None else self.lists
        return 0 if part is None else int(part.d)

    def add(self, rows: Sequence[VectorRow]) -> None:
        if not rows:
            return
        if self.flat is None:
            self.flat = ExactIndex(rows[0].windows.shape[1])
        counts = [len(row.windows) for row in rows]
        self.flat.add(np.ascontiguousarray(np.concatenate([row.windows for row in rows]), dtype=np.float32))
        self.owners = np.concatenate([self.owners, np.repeat([row.index for row in rows], counts)])
        self.sequences = np.concatenate([self.sequences, np.repeat([row.sequence for row in rows], counts)])
        self.alive = np.concatenate([self.alive, np.ones(sum(counts), dtype=bool)])
        self.widest = max(self.widest, *counts)

    def keep(self, sequences: np.ndarray) -> None:
        """Only windows with these sequence numbers are alive from now on."""
        self.alive = np.isin(self.sequences, sequences)

    def search(
        self, query: np.ndarray, k: int, before: int | None = None, among: np.ndarray | None = None
    ) -> list[tuple[int, float]]:
        """The `k` elements whose nearest window is nearest to any window of `query`, float32 [w, dimension], unit norm.

        Args:
            before: only elements with a lower index.
            among: bool [n], only these positions, dead or alive; None for those that are alive.

        Returns:
            (index, cosine) nearest first, one entry an element.
        """
        allowed = self.alive if among is None else among
        if before is not None:
            allowed = allowed & (self.owners < before)
        possible = int(allowed.sum())
        if not possible or query.shape[1] != self.dimension:
            return []
        # An element holds at most `widest` windows, so that many a wanted element cannot miss one.
        many = min(possible, k * self.widest)
        block = np.ascontiguousarray(query, dtype=np.float32)
        best: dict[int, float] = {}
        for part, start in ((self.lists, 0), (self.flat, self.listed)):
            if part is None or not part.ntotal:
                continue
            inside = allowed[start : start + part.ntotal]
            cosines, positions = part.search(block, many, params=self._parameters(part, inside))
            for cosine, position in zip(cosines.ravel().tolist(), positions.ravel().tolist(), strict=True):
                if position >= 0:
                    owner = int(self.owners[start + position])
                    best[owner] = max(best.get(owner, -1.0), min(cosine, 1.0))
        return sorted(best.items(), key=lambda item: (-item[1], item[0]))[:k]

    def _parameters(self, part: Any, allowed: np.ndarray) -> Any:
        """Search parameters that skip what is not allowed; None where nothing has to be skipped."""
        if allowed.all():
            return None
        faiss = load_faiss()
        selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if part is self.lists:
            return faiss.SearchParametersIVF(sel=selector, nprobe=part.nprobe)
        return faiss.SearchParameters(sel=selector)


def approximate(exact: Vectors) -> Vectors:
    """The same windows in an approximate index, which looks into as many lists as `RECALL` takes.

    Takes seconds at 100,000 windows, without holding the interpreter.
    """
    faiss = load_faiss()
    assert exact.flat is not None
    matrix = exact.flat.reconstruct_n(0, exact.flat.ntotal)
    count, dimension = matrix.shape
    number = max(1, int(2 * math.sqrt(count)))
    rng = np.random.default_rng(_SEED)
    lists = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, number, faiss.METRIC_INNER_PRODUCT)
    lists.cp.niter = 8
    lists.cp.spherical = True
    lists.cp.seed = _SEED
    sample = rng.choice(count, min(count, _TRAIN_PER_LIST * number), replace=False)
    lists.train(np.ascontiguousarray(matrix[np.sort(sample)]))
    lists.add(matrix)
    chosen = rng.choice(count, min(count, _QUERIES), replace=False)
    # Its own nearest is the query itself: not counted.
    wanted = exact.flat.search(matrix[chosen], min(count, _NEIGHBOURS + 1))[1][:, 1:]
    lists.nprobe = min(8, number)
    while True:
        found = lists.search(matrix[chosen], min(count, _NEIGHBOURS + 1))[1]
        hits = [len(np.intersect1d(a, b)) / max(1, len(a)) for a, b in zip(wanted, found, strict=True)]
        recall = float(np.mean(hits)) if wanted.shape[1] else 1.0
        if recall >= RECALL or lists.nprobe >= number:
            break
        lists.nprobe = min(number, 2 * lists.nprobe)
    return Vectors(
        flat=ExactIndex(dimension),
        lists=lists,
        recall=recall,
        owners=exact.owners,
        sequences=exact.sequences,
        alive=exact.alive,
        widest=exact.widest,
    )
