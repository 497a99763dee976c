"""Small state, answers and baselines of an SQLite transaction."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from common.records import Baseline
from database.sqlite_rows import readable

__all__ = ["SqliteState"]


class SqliteState:
    """Part of a `database.store.Session`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def state(self, name: str) -> Any:
        row = self._run("SELECT value FROM state WHERE name = ?", name).fetchone()
        with readable(f"the state {name}"):
            return None if row is None else json.loads(row[0])

    def put_state(self, name: str, value: Any) -> None:
        self._run("INSERT OR REPLACE INTO state VALUES (?, ?)", name, json.dumps(value))

    def answer(self, route: str, key: str) -> dict[str, Any] | None:
        row = self._run("SELECT body FROM answers WHERE route = ? AND key = ?", route, key).fetchone()
        with readable(f"the answer to {route} {key}"):
            return None if row is None else json.loads(row[0])

    def put_answer(self, route: str, key: str, answer: dict[str, Any]) -> None:
        self._run("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", route, key, json.dumps(answer))

    def answer_names(self) -> list[tuple[str, str]]:
        return self._run("SELECT route, key FROM answers ORDER BY route, key").fetchall()

    def baseline(self, key: str) -> Baseline | None:
        row = self._run("SELECT body FROM baselines WHERE key = ?", key).fetchone()
        with readable(f"baseline {key}"):
            return None if row is None else Baseline.model_validate_json(row[0])

    def put_baseline(self, baseline: Baseline) -> None:
        self._run(
            "INSERT OR REPLACE INTO baselines (key, body, revision) VALUES (?, ?, ?)",
            baseline.key,
            baseline.model_dump_json(),
            self.next_revision(),
        )

    def baseline_revision(self, key: str) -> int:
        row = self._run("SELECT revision FROM baselines WHERE key = ?", key).fetchone()
        return 0 if row is None else int(row[0])

    def next_revision(self) -> int:
        return self._bump("revision")

    def _bump(self, counter: str) -> int:
        value = int(self.state(counter) or 0) + 1
        self.put_state(counter, value)
        return value

    def _run(self, query: str, *values: Any) -> sqlite3.Cursor:
        return self._connection.execute(query, values)
