"""The nearest of many vectors, exactly, without reading all of every one.

Reading is what such a search costs. A copy in half precision is searched for somewhat more than what is wanted, and
those are computed again from the float32 rows. By how much half precision can be off is known: where the last one
wanted is not above all that was passed over by more than that, every row is read after all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["ExactIndex", "load_faiss"]

_FEW = 4000
"""Rows up to which reading them all takes less than a millisecond."""
_SPARE = 48
_MANY_QUERIES = 8
"""Beyond so many at once FAISS multiplies matrices, which is quicker."""
_HALF = 2.0**-11 + 1e-4
"""Largest error of an inner product of unit vectors: the rounding to half precision (each number is off by 2^-11 of
itself at most, and Cauchy-Schwarz), and that of sums in single precision."""


def load_faiss() -> Any:
    """The library, loaded when it is first needed, with one thread."""
    import faiss

    faiss.omp_set_num_threads(1)
    return faiss


class ExactIndex:
    """Rows of float32 [dimension] by their position, with the interface of a FAISS index. Not thread-safe."""

    def __init__(self, dimension: int) -> None:
        faiss = load_faiss()
        self.d = dimension
        self._full = faiss.IndexFlatIP(dimension)
        half = faiss.ScalarQuantizer.QT_fp16
        self._half = faiss.IndexScalarQuantizer(dimension, half, faiss.METRIC_INNER_PRODUCT)
        self._longest = 0.0

    @property
    def ntotal(self) -> int:
        return int(self._full.ntotal)

    def add(self, rows: np.ndarray) -> None:
        """Appends float32 [n, dimension]."""
        if len(rows):
            self._full.add(rows)
            self._half.add(rows)
            self._longest = max(self._longest, float(np.linalg.norm(rows, axis=1).max()))

    def reconstruct(self, position: int) -> np.ndarray:
        found: np.ndarray = self._full.reconstruct(position)
        return found

    def reconstruct_n(self, start: int, count: int) -> np.ndarray:
        found: np.ndarray = self._full.reconstruct_n(start, count)
        return found

    def search(self, queries: np.ndarray, k: int, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """The `k` largest inner products with each of `queries`, float32 [q, dimension], largest first.

        Args:
            params: FAISS search parameters, which may leave rows out.

        Returns:
            (products float32 [q, k], positions int64 [q, k]); position -1 where there are no more.
        """
        wide = k + _SPARE
        if self.ntotal <= max(_FEW, 4 * wide) or len(queries) > _MANY_QUERIES:
            return self._full.search(queries, k, params=params)
        rough, near = self._half.search(queries, wide, params=params)
        products = np.full((len(queries), k), -np.inf, dtype=np.float32)
        positions = np.full((len(queries), k), -1, dtype=np.int64)
        for number, query in enumerate(queries):
            rows = near[number][near[number] >= 0]
            exact = self._full.reconstruct_batch(rows) @ query if len(rows) else np.zeros(0, dtype=np.float32)
            best = np.lexsort((rows, -exact))[:k]
            off = _HALF * self._longest * float(np.linalg.norm(query))
            # Fewer than asked for are all that there are.
            if len(rows) == wide and exact[best[-1]] <= rough[number, -1] + off:
                return self._full.search(queries, k, params=params)
            products[number, : len(best)] = exact[best]
            positions[number, : len(best)] = rows[best]
        return products, positions
