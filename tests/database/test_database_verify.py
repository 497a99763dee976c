"""database/admin.py verify: each thing that can be broken in a SQLite store is told, and what follows from the rest is
mended by a repair."""

from __future__ import annotations

import contextlib
import gzip
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from common.knobs import Database as DatabaseSettings
from common.records import Usage
from database.admin import main
from database.memory import Memory
from database.store import open_store
from tests.database.db_service import DIMENSION, hashed_windows
from tests.database.test_database_admin import VERSION_1, run

BREAKS = {
    "counter": ("UPDATE state SET value = '2' WHERE name = 'last_index'", "counter: 2 is below"),
    "parent": ("UPDATE elements SET parent = 77 WHERE idx = 4", "parent 77 of element 4"),
    "cycle": ("UPDATE elements SET parent = 5 WHERE idx = 4", "own ancestors"),
    "vector": ("UPDATE vectors SET idx = 88 WHERE idx = 4", "vectors: element 88"),
    "run": ("UPDATE runs SET idx = 99 WHERE idx = 4", "runs: element 99"),
    "candidate": ("INSERT INTO candidates VALUES (66)", "candidates: element 66"),
    "document": ("UPDATE documents SET body = '{' WHERE idx = 4", "element 4: its document or run cannot be read"),
    "missing": ("DELETE FROM documents WHERE idx = 4", "documents: element 4 has none"),
    "evidence": ("UPDATE evidence SET evidence = '{}' WHERE idx = 4", "element 4: its evidence cannot be read"),
    "score": ("UPDATE elements SET score = 2.9 WHERE idx = 4", "element 4: its score differs"),
    "version": (
        "UPDATE evidence SET evaluation = json_set(evaluation, '$.version', 99) WHERE idx = 4", "of version 99",
    ),
    "complete": ("UPDATE elements SET complete = 0 WHERE idx = 4", "element 4: it is marked incomplete"),
    "program": ("UPDATE programs SET sha256 = 'x' WHERE idx = 4", "element 4: its program is not found"),
    "count": ("UPDATE totals SET records = 9", "count: 9 elements are counted, 4"),
    "bytes": ("UPDATE totals SET bytes = bytes + 5", "count: 1433 bytes of elements are counted, 1428"),
    "children": ("UPDATE elements SET children = 7 WHERE idx = 5", "children of element 5"),
    "no vector": ("DELETE FROM vectors WHERE idx = 4", "element 4: it has no vectors of the embedding model"),
    "other model": ("UPDATE vectors SET model = 'other' WHERE idx = 4", "element 4: it has no vectors of the emb"),
    "zero vector": ("UPDATE vectors SET windows = zeroblob(256) WHERE idx = 4", "element 4: its vectors are not of l"),
    "cut vector": ("UPDATE vectors SET windows = zeroblob(255) WHERE idx = 4", "element 4: its vectors are not finite"),
    "dimension": ("UPDATE vectors SET dimension = 32 WHERE idx = 4", "element 4: its vectors have 32 numbers, those"),
    "no sketch": ("DELETE FROM sketches WHERE idx = 4", "element 4: expected a sketch of its program"),
    "benchmark": ("UPDATE elements SET benchmark = 0.99 WHERE idx = 4", "element 4: its row says benchmark 0.99, its"),
    "loss": ("UPDATE elements SET loss = 0.1 WHERE idx = 4", "element 4: its row says loss 0.1, its evidence 3.92"),
    "summary": ("UPDATE elements SET summary = 'x' WHERE idx = 4", "element 4: its summary differs"),
    "revision": ("UPDATE elements SET revision = 9 WHERE idx = 4", "element 4: its row says revision 9"),
    "evidence's loss": (
        "UPDATE evidence SET evidence = json_set(evidence, '$.loss.value', 1.5) WHERE idx = 4",
        "element 4: its evidence says loss 1.5, its results or run 3.92",
    ),
    "novelty": (
        "UPDATE evidence SET evidence = json_set(evidence, '$.novelty', NULL) WHERE idx = 4",
        "element 4: its novelty is not known",
    ),
    "evaluation": (
        "UPDATE evidence SET evaluation = json_set(evaluation, '$.judge', 0.9) WHERE idx = 4",
        "element 4: its judge is 0.9, from its evidence follows 0.7",
    ),
    "event": ("DELETE FROM events WHERE id = 3", "events: number 3 is missing; restore a backup (whoever follows"),
    "last events": ("DELETE FROM events WHERE id > 2", "events: numbers 3 to 4 are missing"),
    "event's data": ("UPDATE events SET data = '{' WHERE id = 3", "events: number 3 cannot be read"),
    "merged": (
        "INSERT OR REPLACE INTO state VALUES ('merged_through', '999')", "elements up to 999 are said to be merged",
    ),
    "usage": ("UPDATE usage SET body = '{}' WHERE id = 1", "usage: number 1 cannot be read"),
    "usage row": ("DELETE FROM usage WHERE id = 1", "usage: number 1 is missing"),
    "baseline": ("UPDATE baselines SET body = '{}'", "baselines: that of cpu-1 cannot be read"),
    "order": ("UPDATE state SET value = '[]' WHERE name = 'baselines'", "baselines: [] are in order, ['cpu-1'] are"),
    "state": ("UPDATE state SET value = '{' WHERE name = 'rules'", "state: that of rules cannot be read"),
    "revisions": ("UPDATE state SET value = '0' WHERE name = 'revision'", "revisions: the counter is 0, below"),
}  # fmt: skip
BEYOND_REPAIR = {
    "cycle", "vector", "run", "document", "missing", "event", "last events", "event's data", "usage", "usage row",
    "baseline", "state",
}  # fmt: skip
"""What no other data tells; the message of each says what to do instead."""


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The version-1 file as this release keeps it: every score computed by its rules, events, usage."""
    path = tmp_path_factory.mktemp("settled") / "database.sqlite"
    path.write_bytes(gzip.decompress(VERSION_1.read_bytes()))
    with opened(path) as memory:
        memory.rescore(60)
        memory.store.write(lambda session: session.ledger.put_usage([Usage(role="planner", model="m", calls=1)] * 2))
    return path.read_bytes()


class Hashed:
    """Embeds without a server, as the version-1 file was."""

    model = "hashed-words"
    dimension = DIMENSION

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([windows[0] for windows in self.windows(texts)], dtype=np.float32)

    def windows(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(hashed_windows(text), dtype=np.float32) for text in texts]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Memory]:
    settings = DatabaseSettings(store=f"sqlite:///{path}")
    memory = Memory(open_store(settings), Hashed(), settings)
    yield memory
    memory.close()


def test_verify_finds_each_thing_that_is_broken_and_repair_mends_what_follows_from_the_rest(
    tmp_path: Path, settled: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "database.sqlite"
    file.write_bytes(settled)
    assert run("verify", store=file) == 0, capsys.readouterr().out
    for name, (statement, said) in BREAKS.items():
        broken_by(file, settled, statement)
        assert run("verify", store=file) == 1, name
        told = capsys.readouterr().out
        assert said in told, name
        lines = [line for line in told.splitlines() if line.startswith("broken: ")]
        mended = any("POST /repair" in line or "set-parent" in line for line in lines)
        assert mended or all("restore a backup" in line for line in lines), told
    mendable = [statement for name, (statement, _) in BREAKS.items() if name not in BEYOND_REPAIR]
    for several in (mendable[::3], mendable[1::3], mendable[2::3]):
        broken_by(file, settled, *several)
        with opened(file) as memory:
            memory.repair()
            assert memory.settling.settle() == 0
            memory.rescore(60)
        assert run("verify", store=file) == 0, capsys.readouterr().out
    file.write_bytes(settled)
    assert main(["verify", "--store", f"sqlite:///{file}", "--database.candidate_capacity", "1"]) == 1
    assert "its capacity is 1" in capsys.readouterr().out


def broken_by(file: Path, sound: bytes, *statements: str) -> None:
    for end in ("-wal", "-shm", ".faiss"):
        file.with_name(file.name + end).unlink(missing_ok=True)
    file.write_bytes(sound)
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        changed = [connection.execute(statement).rowcount for statement in statements]
    assert len(changed) > 1 or changed[0] > 0, statements
