"""One SQLite transaction: the queries behind `database.store.Session`."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic_core import from_json

from common.files import sha256_text
from common.records import RunRecord
from database.evaluate_agent.score import Evaluation, Evidence
from database.models import Element
from database.sqlite_checks import COUNTED
from database.sqlite_ledger import SqliteLedger
from database.sqlite_rows import COLUMNS, ORDERS, chunks, condition_of, facts_of, marks, readable
from database.sqlite_vectors import SqliteVectors
from database.store import CLEARED, KEPT_STATE, MAX_INDEX, Facts, NewEntry, Order, Sizes, Where

__all__ = ["LargeWriteError", "SqliteSession"]

_GUESSES = 20
_MOST_SHARED = 100
"""Elements that a write removes beside others."""
_EVERYTHING = Where()


class LargeWriteError(Exception):
    """The write changes too much to share a transaction with others: it is to be done again, alone."""


class SqliteSession(SqliteVectors):
    """See `database.store.Session`.

    Args:
        shared: whether other writes are in the same transaction, and this one may have to be taken back out of it.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, shared: bool = False) -> None:
        super().__init__(connection, path)
        self._shared = shared

    # Elements

    def insert(self, entry: NewEntry, index: int | None = None) -> int:
        element = entry.element
        # The counter is a row of the same transaction: an index is taken with its element, or not at all.
        if index is None:
            query = (
                "INSERT INTO state VALUES ('last_index', 1)"
                " ON CONFLICT (name) DO UPDATE SET value = CAST(value AS INTEGER) + 1 RETURNING CAST(value AS INTEGER)"
            )
            index = int(self._run(query).fetchone()[0])
        else:
            self.ledger.reserve(index + 1)
        body = element.model_dump_json(exclude={"parent"})
        evidence = entry.evidence
        self._run(
            "INSERT INTO elements"
            " (idx, name, time, parent, summary, loss, benchmark, complete, baseline_key, key, bytes)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
        self._run("INSERT INTO documents VALUES (?, ?)", index, body)
        self._run("INSERT INTO evidence VALUES (?, ?, NULL)", index, evidence.model_dump_json())
        if entry.sketch is not None:
            self.put_sketch(index, entry.sketch)
        if entry.run is not None:
            self._run("INSERT INTO runs (idx, body) VALUES (?, ?)", index, entry.run.model_dump_json())
        if entry.windows is not None and entry.model is not None:
            self.put_windows(index, entry.model, entry.windows)
        return index

    def is_free(self, index: int) -> bool:
        return self._run("SELECT 1 FROM elements WHERE idx = ?", index).fetchone() is None

    def find_key(self, key: str) -> Facts | None:
        rows = self._run(f"SELECT {COLUMNS} FROM elements e WHERE e.key = ?", key).fetchall()
        return facts_of(rows[0]) if rows else None

    def keys(self, indices: Sequence[int]) -> dict[int, str]:
        found: dict[int, str] = {}
        for chunk in chunks(indices):
            query = f"SELECT idx, key FROM elements WHERE idx IN ({marks(chunk)}) AND key IS NOT NULL"
            found.update(self._run(query, *chunk).fetchall())
        return found

    def facts(
        self, where: Where = _EVERYTHING, order: Order = "index", limit: int | None = None, offset: int = 0
    ) -> list[Facts]:
        condition, values = condition_of(where)
        rows = self._run(
            f"SELECT {COLUMNS} FROM elements e {condition} ORDER BY {ORDERS[order]} LIMIT ? OFFSET ?",
            *values,
            -1 if limit is None else limit,
            min(offset, MAX_INDEX),
        )
        return [facts_of(row) for row in rows]

    def elements(self, indices: Sequence[int]) -> list[Element]:
        found: dict[int, Element] = {}
        query = "SELECT d.idx, d.body, e.parent FROM documents d JOIN elements e ON e.idx = d.idx WHERE d.idx IN"
        for chunk in chunks(indices):
            for index, body, parent in self._run(f"{query} ({marks(chunk)})", *chunk):
                with readable(f"element {index}"):
                    found[index] = Element.model_validate(from_json(body) | {"parent": parent, "index": index})
        return [found[index] for index in indices if index in found]

    def each(self, indices: Sequence[int]) -> Iterator[Element]:
        for index in indices:
            yield from self.elements([index])

    def weight_of(self, indices: Sequence[int]) -> int:
        return sum(self.bytes_of(indices).values())

    def bytes_of(self, indices: Sequence[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for chunk in chunks(indices):
            found.update(self._run(f"SELECT idx, bytes FROM elements WHERE idx IN ({marks(chunk)})", *chunk))
        return found

    def ranked(self, order: Order, limit: int | None = None, offset: int = 0) -> list[int]:
        rows = self._run(
            f"SELECT e.idx FROM elements e ORDER BY {ORDERS[order]} LIMIT ? OFFSET ?",
            -1 if limit is None else limit,
            min(offset, MAX_INDEX),
        )
        return [index for (index,) in rows]

    def parents(self, indices: Sequence[int] | None = None) -> dict[int, int | None]:
        if indices is None:
            return dict(self._run("SELECT idx, parent FROM elements").fetchall())
        found: dict[int, int | None] = {}
        for chunk in chunks(indices):
            found.update(self._run(f"SELECT idx, parent FROM elements WHERE idx IN ({marks(chunk)})", *chunk))
        return found

    def sample(self) -> int | None:
        last = self._run("SELECT MAX(idx) FROM elements").fetchone()[0]
        if last is None:
            return None
        for _ in range(_GUESSES):
            guess = random.randint(1, last)
            if self._run("SELECT 1 FROM elements WHERE idx = ?", guess).fetchone():
                return guess
        # Most of the numbers are gone: counted off instead.
        chosen = random.randrange(self.count())
        return int(self._run("SELECT idx FROM elements ORDER BY idx LIMIT 1 OFFSET ?", chosen).fetchone()[0])

    def count(self, where: Where = _EVERYTHING, limit: int | None = None) -> int:
        condition, values = condition_of(where)
        if not condition:
            records = int(self._run("SELECT records FROM totals").fetchone()[0])
            return records if limit is None else min(records, limit)
        if limit is None:
            return int(self._run(f"SELECT COUNT(*) FROM elements e {condition}", *values).fetchone()[0])
        return int(
            self._run(
                f"SELECT COUNT(*) FROM (SELECT 1 FROM elements e {condition} LIMIT ?)", *values, limit
            ).fetchone()[0]
        )

    def unique_names(self) -> int:
        return int(self._run("SELECT names FROM totals").fetchone()[0])

    def child_counts(self, indices: Iterable[int] | None = None) -> dict[int, int]:
        if indices is None:
            return dict(self._run("SELECT idx, children FROM elements WHERE children > 0").fetchall())
        found: dict[int, int] = {}
        for chunk in chunks(list(indices)):
            query = f"SELECT idx, children FROM elements WHERE idx IN ({marks(chunk)}) AND children > 0"
            found.update(self._run(query, *chunk).fetchall())
        return found

    def strongest_children(self, parent: int, limit: int) -> list[int]:
        query = "SELECT idx FROM elements WHERE parent = ? ORDER BY children DESC, idx LIMIT ?"
        return [index for (index,) in self._run(query, parent, limit)]

    def oldest_leaf(self) -> int | None:
        row = self._run("SELECT idx FROM elements WHERE children = 0 ORDER BY idx LIMIT 1").fetchone()
        return None if row is None else int(row[0])

    def orphans(self) -> list[int]:
        rows = self._run(
            "SELECT e.idx FROM elements e WHERE e.parent IS NOT NULL"
            " AND NOT EXISTS (SELECT 1 FROM elements above WHERE above.idx = e.parent)"
        )
        return [index for (index,) in rows]

    def set_parent(self, indices: Sequence[int], parent: int | None) -> None:
        for chunk in chunks(indices):
            self._run(f"UPDATE elements SET parent = ? WHERE idx IN ({marks(chunk)})", parent, *chunk)

    def delete(self, indices: Sequence[int]) -> None:
        if self._shared and len(indices) > _MOST_SHARED:
            raise LargeWriteError
        for chunk in chunks(indices):
            for table in ("elements", "documents", "evidence", "sketches", "runs", "vectors", "candidates"):
                self._run(f"DELETE FROM {table} WHERE idx IN ({marks(chunk)})", *chunk)
        if indices:
            self._bump("epoch")

    def clear(self) -> None:
        for table in ("elements", "documents", "evidence", "sketches", "runs", "vectors", "candidates", "answers"):
            self._run(f"DELETE FROM {table}")
        self._run(f"DELETE FROM state WHERE name NOT IN ({marks(KEPT_STATE)})", *KEPT_STATE)
        self._bump(CLEARED)
        self._bump("epoch")

    # What is measured and computed of an element

    def evidence(self, index: int) -> tuple[Evidence, Evaluation | None] | None:
        if not 0 < index <= MAX_INDEX:
            return None
        row = self._run("SELECT evidence, evaluation FROM evidence WHERE idx = ?", index).fetchone()
        if row is None:
            return None
        with readable(f"the evidence of element {index}"):
            evaluation = None if row[1] is None else Evaluation.model_validate_json(row[1])
            return Evidence.model_validate_json(row[0]), evaluation

    def set_evaluation(self, index: int, evidence: Evidence, evaluation: Evaluation) -> None:
        self._run(
            "UPDATE evidence SET evidence = ?, evaluation = ? WHERE idx = ?",
            evidence.model_dump_json(),
            evaluation.model_dump_json(),
            index,
        )
        self._run(
            "UPDATE elements SET score = ?, revision = ?, loss = ?, benchmark = ? WHERE idx = ?",
            evaluation.score,
            evaluation.revision,
            None if evidence.loss is None else evidence.loss.value,
            None if evidence.benchmark is None else evidence.benchmark.value,
            index,
        )

    def set_complete(self, index: int, complete: bool) -> None:
        self._run("UPDATE elements SET complete = ? WHERE idx = ?", complete, index)

    def runs(self, index: int) -> list[RunRecord]:
        rows = self._run("SELECT body FROM runs WHERE idx = ? ORDER BY id", index)
        with readable(f"a run of element {index}"):
            return [RunRecord.model_validate_json(body) for (body,) in rows]

    def with_fingerprint(self, fingerprint: str) -> list[int]:
        # json_extract ends a text at its first NUL, and so does its index: what may hold one is looked at whole. Later
        # releases of SQLite may not.
        query = (
            "SELECT DISTINCT idx, CASE WHEN instr(body, '\\u0000') THEN body END FROM runs"
            " WHERE json_extract(body, '$.fingerprint') IN (?, ?) ORDER BY idx"
        )
        cut = fingerprint.partition("\0")[0]
        found = self._run(query, fingerprint, cut)
        with readable("a run with this fingerprint"):
            same = (index for index, body in found if (from_json(body)["fingerprint"] if body else cut) == fingerprint)
            return list(dict.fromkeys(same))

    # Candidates

    def candidates(self) -> list[Facts]:
        # CROSS keeps the order of the join: the set is small, an index over all scores is not.
        query = f"SELECT {COLUMNS} FROM candidates c CROSS JOIN elements e ON e.idx = c.idx"
        rows = self._run(f"{query} ORDER BY e.score DESC, e.idx")
        return [facts_of(row) for row in rows]

    def put_candidates(self, indices: Sequence[int]) -> None:
        self._run("DELETE FROM candidates")
        self._connection.executemany("INSERT INTO candidates VALUES (?)", [(index,) for index in indices])

    # Beside the elements

    @property
    def ledger(self) -> SqliteLedger:
        return SqliteLedger(self._connection)

    # Upkeep

    def sizes(self) -> Sizes:
        pages = int(self._run("PRAGMA page_count").fetchone()[0])
        free = int(self._run("PRAGMA freelist_count").fetchone()[0])
        page = int(self._run("PRAGMA page_size").fetchone()[0])
        documents = int(self._run("SELECT bytes FROM totals").fetchone()[0])
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
        return [] if found == ["ok"] else [f"{line}; restore a backup" for line in found]

    def derive(self, element: Element) -> None:
        query = "UPDATE elements SET name = ?, time = ?, summary = ? WHERE idx = ?"
        self._run(query, element.name, element.time, element.summary, element.index)
        # What it holds is not evidence yet: `set_evaluation` follows.
        self._run("INSERT OR IGNORE INTO evidence VALUES (?, '', NULL)", element.index)
        self.ledger.put_program(element.index, sha256_text(element.program))

    def recount(self) -> None:
        counted = "(SELECT COUNT(*) FROM elements below WHERE below.parent = elements.idx)"
        self._run(f"UPDATE elements SET children = {counted} WHERE children <> {counted}")
        self._run(f"UPDATE totals SET (records, bytes, names) = ({COUNTED})")
