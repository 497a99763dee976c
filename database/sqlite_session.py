"""One SQLite transaction: the queries behind `database.store.Session`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.records import Baseline, RunRecord
from database.evaluate_agent.score import Evaluation, Evidence
from database.models import Element
from database.store import MAX_INDEX, Facts, NewEntry, Order, Sizes, VectorRow, VectorState, Where

__all__ = ["SqliteSession"]

_CHUNK = 500
_EVERYTHING = Where()
_ORDERS: dict[Order, str] = {
    "index": "e.idx",
    "newest": "e.idx DESC",
    "time": "e.time, e.idx",
    "benchmark": "e.benchmark DESC, e.idx",
    "score": "e.score DESC, e.idx",
}
_COLUMNS = (
    "e.idx, e.name, e.time, e.parent, e.summary, e.loss, e.benchmark, e.complete, e.baseline_key, e.score, e.pending"
)


class SqliteSession:
    """See `database.store.Session`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    # Elements

    def insert(self, entry: NewEntry) -> int:
        element = entry.element
        # The counter is a row of the same transaction: an index is taken with its element, or not at all.
        index = int(self.state("last_index") or 0) + 1
        self.put_state("last_index", index)
        body = element.model_dump_json(exclude={"parent"})
        evidence = entry.evidence
        self._run(
            "INSERT INTO elements VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, 1, ?, ?)",
            index,
            element.name,
            element.time,
            element.parent,
            element.summary,
            None if evidence.loss is None else evidence.loss.value,
            None if evidence.benchmark is None else evidence.benchmark.value,
            entry.complete,
            evidence.baseline_key,
            entry.key,
            len(body),
        )
        self._run("INSERT INTO documents VALUES (?, ?, ?, NULL)", index, body, evidence.model_dump_json())
        self._run("INSERT INTO sketches VALUES (?, ?)", index, entry.sketch)
        if entry.run is not None:
            self._run("INSERT INTO runs (idx, body) VALUES (?, ?)", index, entry.run.model_dump_json())
        if entry.windows is not None and entry.model is not None:
            self.put_windows(index, entry.model, entry.windows)
        return index

    def find_key(self, key: str) -> Facts | None:
        rows = self._run(f"SELECT {_COLUMNS} FROM elements e WHERE e.key = ?", key).fetchall()
        return _facts(rows[0]) if rows else None

    def facts(
        self, where: Where = _EVERYTHING, order: Order = "index", limit: int | None = None, offset: int = 0
    ) -> list[Facts]:
        condition, values = _condition(where)
        rows = self._run(
            f"SELECT {_COLUMNS} FROM elements e {condition} ORDER BY {_ORDERS[order]} LIMIT ? OFFSET ?",
            *values,
            -1 if limit is None else limit,
            min(offset, MAX_INDEX),
        )
        return [_facts(row) for row in rows]

    def elements(self, indices: Sequence[int]) -> list[Element]:
        found: dict[int, Element] = {}
        query = "SELECT d.idx, d.body, e.parent FROM documents d JOIN elements e ON e.idx = d.idx WHERE d.idx IN"
        for chunk in _chunks(indices):
            for index, body, parent in self._run(f"{query} ({_marks(chunk)})", *chunk):
                found[index] = Element.model_validate(json.loads(body) | {"parent": parent, "index": index})
        return [found[index] for index in indices if index in found]

    def count(self, where: Where = _EVERYTHING, limit: int | None = None) -> int:
        condition, values = _condition(where)
        if limit is None:
            return int(self._run(f"SELECT COUNT(*) FROM elements e {condition}", *values).fetchone()[0])
        return int(
            self._run(
                f"SELECT COUNT(*) FROM (SELECT 1 FROM elements e {condition} LIMIT ?)", *values, limit
            ).fetchone()[0]
        )

    def unique_names(self) -> int:
        return int(self._run("SELECT COUNT(DISTINCT name) FROM elements").fetchone()[0])

    def child_counts(self, indices: Iterable[int] | None = None) -> dict[int, int]:
        if indices is None:
            rows = self._run("SELECT parent, COUNT(*) FROM elements WHERE parent IS NOT NULL GROUP BY parent")
            return dict(rows.fetchall())
        found: dict[int, int] = {}
        for chunk in _chunks(list(indices)):
            query = f"SELECT parent, COUNT(*) FROM elements WHERE parent IN ({_marks(chunk)}) GROUP BY parent"
            found.update(self._run(query, *chunk).fetchall())
        return found

    def oldest_leaf(self) -> int | None:
        row = self._run(
            "SELECT idx FROM elements e WHERE NOT EXISTS (SELECT 1 FROM elements c WHERE c.parent = e.idx)"
            " ORDER BY idx LIMIT 1"
        ).fetchone()
        return None if row is None else int(row[0])

    def set_parent(self, indices: Sequence[int], parent: int | None) -> None:
        for chunk in _chunks(indices):
            self._run(f"UPDATE elements SET parent = ? WHERE idx IN ({_marks(chunk)})", parent, *chunk)

    def delete(self, indices: Sequence[int]) -> None:
        for chunk in _chunks(indices):
            for table in ("elements", "documents", "sketches", "runs", "vectors", "candidates"):
                self._run(f"DELETE FROM {table} WHERE idx IN ({_marks(chunk)})", *chunk)
        if indices:
            self._bump_epoch()

    def clear(self) -> None:
        for table in ("elements", "documents", "sketches", "runs", "vectors", "candidates", "answers"):
            self._run(f"DELETE FROM {table}")
        self._run("DELETE FROM state WHERE name NOT IN ('epoch', 'opened', 'baselines')")
        self._bump_epoch()

    # What is measured and computed of an element

    def evidence(self, index: int) -> tuple[Evidence, Evaluation | None] | None:
        if not 0 < index <= MAX_INDEX:
            return None
        row = self._run("SELECT evidence, evaluation FROM documents WHERE idx = ?", index).fetchone()
        if row is None:
            return None
        evaluation = None if row[1] is None else Evaluation.model_validate_json(row[1])
        return Evidence.model_validate_json(row[0]), evaluation

    def set_evaluation(self, index: int, evidence: Evidence, evaluation: Evaluation) -> None:
        self._run(
            "UPDATE documents SET evidence = ?, evaluation = ? WHERE idx = ?",
            evidence.model_dump_json(),
            evaluation.model_dump_json(),
            index,
        )
        self._run(
            "UPDATE elements SET score = ?, loss = ?, benchmark = ? WHERE idx = ?",
            evaluation.score,
            None if evidence.loss is None else evidence.loss.value,
            None if evidence.benchmark is None else evidence.benchmark.value,
            index,
        )

    def set_complete(self, index: int, complete: bool) -> None:
        self._run("UPDATE elements SET complete = ? WHERE idx = ?", complete, index)

    def runs(self, index: int) -> list[RunRecord]:
        rows = self._run("SELECT body FROM runs WHERE idx = ? ORDER BY id", index)
        return [RunRecord.model_validate_json(body) for (body,) in rows]

    def with_fingerprint(self, fingerprint: str) -> list[int]:
        query = "SELECT DISTINCT idx FROM runs WHERE json_extract(body, '$.fingerprint') = ? ORDER BY idx"
        return [index for (index,) in self._run(query, fingerprint)]

    # Novelty

    def put_windows(self, index: int, model: str, windows: np.ndarray) -> None:
        current = self.state("model")
        replaced = self._run("DELETE FROM vectors WHERE idx = ?", index).rowcount
        if replaced or (current is not None and current != model):
            self._bump_epoch()
        if current != model:
            # Vectors of two models are not comparable: all others are pending from now on.
            self.put_state("model", model)
            self._run("UPDATE elements SET pending = 1")
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
        return [
            VectorRow(sequence, index, np.frombuffer(block, dtype="<f4").reshape(-1, dimension))
            for sequence, index, dimension, block in rows
        ]

    def vector_state(self) -> VectorState:
        model = self.state("model")
        sequence, elements = self._run("SELECT MAX(sequence), COUNT(*) FROM vectors WHERE model = ?", model).fetchone()
        return VectorState(int(self.state("epoch") or 0), int(sequence or 0), int(elements), model)

    def sketches(self, after: int, limit: int) -> list[tuple[int, bytes]]:
        rows = self._run("SELECT idx, sketch FROM sketches WHERE idx > ? ORDER BY idx LIMIT ?", after, limit)
        return rows.fetchall()

    # Candidates

    def candidates(self) -> list[Facts]:
        rows = self._run(
            f"SELECT {_COLUMNS} FROM candidates c JOIN elements e ON e.idx = c.idx ORDER BY e.score DESC, e.idx"
        )
        return [_facts(row) for row in rows]

    def put_candidates(self, indices: Sequence[int]) -> None:
        self._run("DELETE FROM candidates")
        self._connection.executemany("INSERT INTO candidates VALUES (?)", [(index,) for index in indices])

    # Small state

    def state(self, name: str) -> Any:
        row = self._run("SELECT value FROM state WHERE name = ?", name).fetchone()
        return None if row is None else json.loads(row[0])

    def put_state(self, name: str, value: Any) -> None:
        self._run("INSERT OR REPLACE INTO state VALUES (?, ?)", name, json.dumps(value))

    def answer(self, route: str, key: str) -> dict[str, Any] | None:
        row = self._run("SELECT body FROM answers WHERE route = ? AND key = ?", route, key).fetchone()
        return None if row is None else json.loads(row[0])

    def put_answer(self, route: str, key: str, answer: dict[str, Any]) -> None:
        self._run("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", route, key, json.dumps(answer))

    def baseline(self, key: str) -> Baseline | None:
        row = self._run("SELECT body FROM baselines WHERE key = ?", key).fetchone()
        return None if row is None else Baseline.model_validate_json(row[0])

    def put_baseline(self, baseline: Baseline) -> None:
        self._run("INSERT OR REPLACE INTO baselines VALUES (?, ?)", baseline.key, baseline.model_dump_json())

    # Upkeep

    def sizes(self) -> Sizes:
        pages = int(self._run("PRAGMA page_count").fetchone()[0])
        free = int(self._run("PRAGMA freelist_count").fetchone()[0])
        page = int(self._run("PRAGMA page_size").fetchone()[0])
        documents = int(self._run("SELECT SUM(bytes) FROM elements").fetchone()[0] or 0)
        files = [self._path, *(self._path.with_name(self._path.name + end) for end in ("-wal", "-shm"))]
        return Sizes(
            database=pages * page,
            documents=documents,
            storage=sum(file.stat().st_size for file in files if file.exists()),
            index=max(0, (pages - free) * page - documents),
            database_name=self._path.name,
            collection_name="elements",
        )

    def check(self) -> list[str]:
        found = [row[0] for row in self._run("PRAGMA integrity_check(20)")]
        return [] if found == ["ok"] else found

    def _bump_epoch(self) -> None:
        self.put_state("epoch", int(self.state("epoch") or 0) + 1)

    def _run(self, query: str, *values: Any) -> sqlite3.Cursor:
        return self._connection.execute(query, values)


def _facts(row: Sequence[Any]) -> Facts:
    index, name, time, parent, summary, loss, benchmark, complete, baseline_key, score, pending = row
    return Facts(
        index, name, time, parent, summary, loss, benchmark, bool(complete), baseline_key, score, bool(pending)
    )


def _condition(where: Where) -> tuple[str, list[Any]]:
    parts: list[str] = []
    values: list[Any] = []
    for column, value in (("name", where.name), ("parent", where.parent), ("baseline_key", where.baseline_key)):
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
    if where.incomplete:
        parts.append("e.complete = 0")
    if where.unscored:
        parts.append("e.score IS NULL")
    if where.pending:
        parts.append("e.pending = 1")
    return (f"WHERE {' AND '.join(parts)}" if parts else ""), values


def _chunks(indices: Sequence[int]) -> list[list[int]]:
    """Indices that SQLite can hold, a few hundred a statement."""
    known = [index for index in indices if 0 < index <= MAX_INDEX]
    return [known[start : start + _CHUNK] for start in range(0, len(known), _CHUNK)]


def _marks(values: Sequence[int]) -> str:
    return ", ".join("?" * len(values))
