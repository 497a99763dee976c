"""The retriever that needs no server: a matrix of vectors and SQLite's full-text index, both in memory."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cognition_base.corpus import FIELDS, Entry
from cognition_base.fusion import Found, VectorSource, query_words

__all__ = ["EmbeddedRetriever", "match_expression"]


@dataclass(frozen=True)
class _Index:
    """One generation of the index; replaced as a whole, so a search never sees half of one."""

    ids: list[str]
    vectors: np.ndarray
    text: sqlite3.Connection
    lock: threading.Lock


class EmbeddedRetriever:
    """Exact cosines over all entries, and BM25 over all fields by SQLite FTS5 (Porter stemming)."""

    def __init__(self) -> None:
        self._index: _Index | None = None

    def index(self, entries: Sequence[Entry], *, model: str, vectors: VectorSource, fresh: bool = False) -> None:
        """See `Retriever.index`. Building takes milliseconds once the vectors are there, so none is kept."""
        ids = [entry.id for entry in entries]
        self._index = _Index(ids, vectors(entries), _full_text(entries), threading.Lock())

    def find(self, text: str, query: np.ndarray, limit: int) -> Found:
        """See `Retriever.find`. The cosines are those of all entries."""
        index = self._index
        if index is None:
            return Found({}, [])
        cosines = np.einsum("nkd,wd->nkw", index.vectors, query).max(axis=(1, 2))
        expression = match_expression(text)
        lexical: list[str] = []
        if expression:
            with index.lock:
                rows = index.text.execute(
                    "SELECT rowid FROM entries WHERE entries MATCH ? ORDER BY bm25(entries), rowid LIMIT ?",
                    (expression, limit),
                ).fetchall()
            lexical = [index.ids[rowid] for (rowid,) in rows]
        return Found({name: float(cosine) for name, cosine in zip(index.ids, cosines, strict=True)}, lexical)

    def close(self) -> None:
        index, self._index = self._index, None
        if index is not None:
            with index.lock:
                index.text.close()


def match_expression(text: str) -> str:
    """An FTS5 expression that matches any word of `text`: each word quoted, so nothing in it is syntax."""
    return " OR ".join(f'"{word}"' for word in query_words(text))


def _full_text(entries: Sequence[Entry]) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.execute(f"CREATE VIRTUAL TABLE entries USING fts5({', '.join(FIELDS)}, tokenize='porter unicode61')")
    marks = ", ".join("?" * (len(FIELDS) + 1))
    rows = [(rowid, *entry.texts().values()) for rowid, entry in enumerate(entries)]
    connection.executemany(f"INSERT INTO entries(rowid, {', '.join(FIELDS)}) VALUES ({marks})", rows)
    return connection
