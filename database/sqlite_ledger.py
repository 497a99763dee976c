"""The ledger of a SQLite transaction: see `database.ledger.Ledger`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from common.records import Usage
from database.ledger import Event, EventKind
from database.sqlite_checks import damages, strays
from database.sqlite_rows import chunks, marks, readable

__all__ = ["SqliteLedger"]


class SqliteLedger:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def put_events(self, time: str, events: Sequence[tuple[EventKind, int | None, dict[str, Any]]]) -> int:
        last = 0
        for kind, index, data in events:
            row = (time, kind, index, json.dumps(data))
            added = self._connection.execute("INSERT INTO events (time, kind, idx, data) VALUES (?, ?, ?, ?)", row)
            last = added.lastrowid or last
        return last

    def events(self, after: int, limit: int) -> list[Event]:
        query = "SELECT id, time, kind, idx, data FROM events WHERE id > ? ORDER BY id LIMIT ?"
        rows = self._connection.execute(query, (after, limit))
        with readable("an event"):
            return [Event(number, time, kind, index, json.loads(data)) for number, time, kind, index, data in rows]

    def event_span(self) -> tuple[int, int]:
        first = self._connection.execute("SELECT MIN(id) FROM events").fetchone()[0]
        last = self._connection.execute("SELECT MAX(id) FROM events").fetchone()[0]
        return first or 0, last or 0

    def trim_events(self, through: int) -> None:
        self._connection.execute("DELETE FROM events WHERE id <= ?", (through,))

    def put_program(self, index: int, sha256: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO programs VALUES (?, ?)", (index, sha256))

    def drop_programs(self, indices: Sequence[int] | None) -> None:
        if indices is None:
            self._connection.execute("DELETE FROM programs")
        else:
            self._connection.executemany("DELETE FROM programs WHERE idx = ?", [(index,) for index in indices])

    def with_program(self, sha256: str) -> list[int]:
        rows = self._connection.execute("SELECT idx FROM programs WHERE sha256 = ? ORDER BY idx", (sha256,))
        return [index for (index,) in rows]

    def program_hashes(self, indices: Sequence[int]) -> dict[int, str]:
        found: dict[int, str] = {}
        for chunk in chunks(indices):
            query = f"SELECT idx, sha256 FROM programs WHERE idx IN ({marks(chunk)})"
            found.update(self._connection.execute(query, chunk))
        return found

    def put_usage(self, records: Sequence[Usage]) -> None:
        rows = [(record.model_dump_json(),) for record in records]
        self._connection.executemany("INSERT INTO usage (body) VALUES (?)", rows)

    def usage(self, after: int, limit: int) -> list[tuple[int, Usage]]:
        query = "SELECT id, body FROM usage WHERE id > ? ORDER BY id LIMIT ?"
        rows = self._connection.execute(query, (after, limit))
        with readable("a record of usage"):
            return [(number, Usage.model_validate_json(body)) for number, body in rows]

    def reserve(self, index: int) -> None:
        self._connection.execute(
            "INSERT INTO state VALUES ('last_index', ?)"
            " ON CONFLICT (name) DO UPDATE SET value = MAX(CAST(value AS INTEGER), CAST(excluded.value AS INTEGER))",
            (str(index - 1),),
        )

    def baseline_keys(self) -> list[str]:
        return [key for (key,) in self._connection.execute("SELECT key FROM baselines ORDER BY revision, key")]

    def damages(self) -> list[str]:
        return list(damages(self._connection))

    def strays(self) -> list[str]:
        return list(strays(self._connection))
