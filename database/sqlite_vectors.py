"""Vectors and sketches of an SQLite transaction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from database.sqlite_rows import chunks, marks, readable
from database.sqlite_state import SqliteState
from database.store import VectorRow, VectorState, windows_in

__all__ = ["SqliteVectors"]


class SqliteVectors(SqliteState):
    """Part of a `database.store.Session`."""

    def use_model(self, model: str) -> None:
        current = self.state("model")
        if current == model:
            return
        self.put_state("model", model)
        self._run("UPDATE elements SET pending = 1")
        if current is not None:
            self._bump("epoch")

    def put_windows(self, index: int, model: str, windows: np.ndarray) -> None:
        self.use_model(model)
        if self._run("DELETE FROM vectors WHERE idx = ?", index).rowcount:
            self._bump("epoch")
        block = np.ascontiguousarray(windows, dtype="<f4")
        self._run(
            "INSERT INTO vectors (idx, model, dimension, windows) VALUES (?, ?, ?, ?)",
            index,
            model,
            block.shape[1],
            block.tobytes(),
        )
        self._run("UPDATE elements SET pending = 0 WHERE idx = ?", index)

    def windows(self, after: int, limit: int) -> list[VectorRow]:
        rows = self._run(
            "SELECT sequence, idx, dimension, windows FROM vectors WHERE sequence > ? AND model = ?"
            " ORDER BY sequence LIMIT ?",
            after,
            self.state("model"),
            limit,
        )
        with readable("a vector"):
            return [
                VectorRow(sequence, index, np.frombuffer(block, dtype="<f4").reshape(-1, dimension))
                for sequence, index, dimension, block in rows
            ]

    def vector_state(self) -> VectorState:
        model = self.state("model")
        sequence = self._run("SELECT MAX(sequence) FROM vectors WHERE model = ?", model).fetchone()[0]
        return VectorState(int(self.state("epoch") or 0), int(sequence or 0), model)

    def vector_sequences(self) -> np.ndarray:
        rows = self._run("SELECT sequence FROM vectors WHERE model = ? ORDER BY sequence", self.state("model"))
        return np.fromiter((sequence for (sequence,) in rows), dtype=np.int64)

    def put_sketch(self, index: int, sketch: bytes) -> None:
        self._run("INSERT OR IGNORE INTO sketches (idx, sketch) VALUES (?, ?)", index, sketch)

    def sketches(self, after: int, limit: int) -> list[tuple[int, int, bytes]]:
        query = "SELECT sequence, idx, sketch FROM sketches WHERE sequence > ? ORDER BY sequence LIMIT ?"
        return self._run(query, after, limit).fetchall()

    def sketch_sequences(self) -> np.ndarray:
        # In no order: the index over idx holds them all, and the sketches are not read.
        return np.fromiter((sequence for (sequence,) in self._run("SELECT sequence FROM sketches")), dtype=np.int64)

    def windows_of(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        model, found = self.state("model"), {}
        for chunk in chunks(indices):
            # A condition on the model, which all have, would be looked up first.
            query = f"SELECT idx, model, dimension, windows FROM vectors WHERE idx IN ({marks(chunk)})"
            for index, of, dimension, block in self._run(query, *chunk):
                if of == model:
                    found[index] = windows_in(block, dimension)
        return found

    def sketches_of(self, indices: Sequence[int]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for chunk in chunks(indices):
            found.update(self._run(f"SELECT idx, sketch FROM sketches WHERE idx IN ({marks(chunk)})", *chunk))
        return found

    def unsettle(self, indices: Sequence[int]) -> None:
        for chunk in chunks(indices):
            for table in ("vectors", "sketches"):
                self._run(f"DELETE FROM {table} WHERE idx IN ({marks(chunk)})", *chunk)
            self._run(f"UPDATE elements SET pending = 1 WHERE idx IN ({marks(chunk)})", *chunk)
        if indices:
            self._bump("epoch")
