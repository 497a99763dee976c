"""What only the tables of a SQLite store can tell is broken. Rows are read one after the other, none is kept."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, get_args

from common.errors import first_line
from common.records import Baseline, Usage
from database.ledger import BACKUP, REPAIR, EventKind

__all__ = ["COUNTED", "damages", "strays"]

COUNTED = "SELECT COUNT(*), COALESCE(SUM(bytes), 0), COUNT(DISTINCT name) FROM elements"
"""What `totals` has to hold."""
_NEEDED = {"documents": BACKUP, "evidence": REPAIR, "programs": REPAIR}
_PARTS = (*_NEEDED, "runs", "sketches", "vectors", "candidates")
_SHOWN = 20


def strays(connection: sqlite3.Connection) -> Iterator[str]:
    """See `database.ledger.Ledger.strays`."""
    for table in _PARTS:
        query = f"SELECT DISTINCT idx FROM {table} WHERE idx NOT IN (SELECT idx FROM elements) ORDER BY idx LIMIT ?"
        remedy = REPAIR if table == "candidates" else BACKUP
        for (index,) in connection.execute(query, (_SHOWN,)):
            yield f"{table}: element {index} does not exist; {remedy}"
    for table, remedy in _NEEDED.items():
        query = f"SELECT idx FROM elements WHERE idx NOT IN (SELECT idx FROM {table}) ORDER BY idx LIMIT ?"
        for (index,) in connection.execute(query, (_SHOWN,)):
            yield f"{table}: element {index} has none; {remedy}"
    kept = connection.execute("SELECT records, bytes, names FROM totals").fetchone() or (None, None, None)
    there = connection.execute(COUNTED).fetchone()
    for what, said, found in zip(("elements", "bytes of elements", "names"), kept, there, strict=True):
        if said != found:
            yield f"count: {said} {what} are counted, {found} are stored; {REPAIR}"
    counted = connection.execute(
        "SELECT idx FROM elements e WHERE children <> (SELECT COUNT(*) FROM elements c WHERE c.parent = e.idx)"
        " ORDER BY idx LIMIT ?",
        (_SHOWN,),
    )
    for (index,) in counted:
        yield f"count: the children of element {index} are counted wrong; {REPAIR}"


def damages(connection: sqlite3.Connection) -> Iterator[str]:
    """See `database.ledger.Ledger.damages`."""
    yield from _numbered(connection, "events", "id, kind, data", lambda row: _event(*row))
    yield from _numbered(connection, "usage", "id, body", lambda row: Usage.model_validate_json(row[1]))
    for table, name, body, read in (
        ("answers", "route || ' ' || key", "body", json.loads),
        ("baselines", "key", "body", Baseline.model_validate_json),
        ("state", "name", "value", json.loads),
    ):
        for called, text in connection.execute(f"SELECT {name}, {body} FROM {table}"):
            wrong = _unreadable(read, text)
            if wrong:
                yield f"{table}: that of {called} cannot be read: {wrong}; {BACKUP}"


def _numbered(
    connection: sqlite3.Connection, table: str, columns: str, read: Callable[[tuple[Any, ...]], object]
) -> Iterator[str]:
    """Rows that cannot be read and numbers that are missing. Of the events the oldest may be gone."""
    before: int | None = 0 if table == "usage" else None
    for row in connection.execute(f"SELECT {columns} FROM {table} ORDER BY id"):
        if before is not None and row[0] != before + 1:
            yield _gap(table, before + 1, row[0] - 1)
        before = row[0]
        wrong = _unreadable(read, row)
        if wrong:
            yield f"{table}: number {before} cannot be read: {wrong}; {BACKUP}"
    given = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    last = 0 if given is None else int(given[0])
    if last > (before or 0):
        yield _gap(table, (before or 0) + 1, last)


def _gap(table: str, first: int, last: int) -> str:
    which = f"number {first} is" if first == last else f"numbers {first} to {last} are"
    follow = " (whoever follows the events has to read the elements anew)" if table == "events" else ""
    return f"{table}: {which} missing; {BACKUP}{follow}"


def _event(number: int, kind: str, data: str) -> None:
    if kind not in get_args(EventKind):
        raise ValueError(f"expected one of {', '.join(get_args(EventKind))}, got {kind!r}")
    if not isinstance(json.loads(data), dict):
        raise ValueError(f"expected an object, got {data[:100]!r}")


def _unreadable(read: Callable[[Any], object], value: Any) -> str | None:
    """Why `value` cannot be read; None where it can."""
    try:
        read(value)
    except (ValueError, TypeError) as error:
        return first_line(error)[:200]
    return None
