"""Between rows of SQLite and what a session answers: columns, orders, conditions, and texts that may be damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from common.errors import StoreError, first_line
from database.store import MAX_INDEX, Facts, Order, Where

__all__ = ["COLUMNS", "ORDERS", "chunks", "condition_of", "facts_of", "marks", "readable"]

_CHUNK = 500
ORDERS: dict[Order, str] = {
    "index": "e.idx",
    "newest": "e.idx DESC",
    "time": "e.time, e.idx",
    "benchmark": "e.benchmark DESC, e.idx",
    "score": "e.score DESC, e.idx",
    "revision": "e.revision, e.idx",
}
COLUMNS = (
    "e.idx, e.name, e.time, e.parent, e.summary, e.loss, e.benchmark, e.complete, e.baseline_key, e.score, e.pending,"
    " e.revision"
)


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Raises StoreError where something stored is not what was written: its file is damaged."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{what} cannot be read, its place in the file is damaged: {first_line(error)[:200]}",
            "restore a backup (database/admin.py restore)",
        ) from error


def facts_of(row: Sequence[Any]) -> Facts:
    index, name, time, parent, summary, loss, benchmark, complete, key, score, pending, revision = row
    return Facts(
        index, name, time, parent, summary, loss, benchmark, bool(complete), key, score, bool(pending), revision
    )


def condition_of(where: Where) -> tuple[str, list[Any]]:
    parts: list[str] = []
    values: list[Any] = []
    for column, value in (
        ("idx", where.index),
        ("name", where.name),
        ("parent", where.parent),
        ("baseline_key", where.baseline_key),
    ):
        if value is not None:
            if isinstance(value, int) and not 0 < value <= MAX_INDEX:
                parts.append("0")
                continue
            parts.append(f"e.{column} = ?")
            values.append(value)
    if where.after:
        parts.append("e.idx > ?")
        values.append(min(where.after, MAX_INDEX))
    if where.published:
        parts.append("e.baseline_key IS NULL")
    if where.roots:
        parts.append("e.parent IS NULL")
    if where.explored:
        parts.append("e.parent IS NOT NULL")
    if where.before_revision is not None:
        parts.append("e.revision < ?")
        values.append(where.before_revision)
    if where.incomplete:
        parts.append("e.complete = 0")
    if where.unscored:
        parts.append("e.score IS NULL")
    if where.pending:
        parts.append("e.pending = 1")
    return (f"WHERE {' AND '.join(parts)}" if parts else ""), values


def chunks(indices: Sequence[int]) -> list[list[int]]:
    """Indices that SQLite can hold, a few hundred a statement."""
    known = [index for index in indices if 0 < index <= MAX_INDEX]
    return [known[start : start + _CHUNK] for start in range(0, len(known), _CHUNK)]


def marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))
