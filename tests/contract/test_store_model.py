"""Random sequences of store operations, with restarts in between, against a model that is a few dictionaries."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from common.knobs import Database as DatabaseSettings
from database import tree
from database.errors import RefusedError
from database.evaluate_agent.score import Evaluation, evidence_of
from database.models import NewElement
from database.store import NewEntry, Session, Store, Where, open_store
from tests.database.db_service import body_of, mongodb_server

NAMES = ["a", "b", "$ne", "a/b"]
CELLS = ["0.1", "0.5", "nan", ""]


@dataclass
class Row:
    name: str
    parent: int | None
    benchmark: float | None
    complete: bool
    key: str | None
    score: float | None = None
    revision: int | None = None
    model: str | None = None


class RefusedOnPurposeError(Exception):
    pass


class StoreMachine(RuleBasedStateMachine):
    """Each rule does one thing to the store and to `rows`; the invariants ask every question of both."""

    where: Callable[[], str]

    def __init__(self) -> None:
        super().__init__()
        self.url = type(self).where()
        self.store: Store = open_store(DatabaseSettings(store=self.url))
        self.rows: dict[int, Row] = {}
        self.last = 0
        self.model: str | None = None
        self.epoch = 0
        self.candidates: set[int] = set()

    def teardown(self) -> None:
        self.store.close()

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.rows)))

    @rule(name=st.sampled_from(NAMES), cell=st.sampled_from(CELLS), keyed=st.booleans(), data=st.data())
    def insert(self, name: str, cell: str, keyed: bool, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from([None, *sorted(self.rows)]))
        entry = _entry(name, parent, cell, f"key{self.last}" if keyed else None)
        self.last += 1
        assert self.store.write(lambda session: session.insert(entry)) == self.last
        loss_and_mean = entry.evidence.benchmark
        self.rows[self.last] = Row(
            name, parent, None if loss_and_mean is None else loss_and_mean.value, entry.complete, entry.key
        )

    @rule(count=st.integers(2, 5), bad=st.integers(0, 4))
    def insert_together(self, count: int, bad: int) -> None:
        """Several at once, of which one fails after it has written."""

        def fail(session: Session) -> int:
            session.insert(_entry("bad", None, "0.5", None))
            raise RefusedOnPurposeError

        works: list[Callable[[Session], int]] = [
            fail if number == bad else (lambda session: session.insert(_entry("a", None, "0.5", None)))
            for number in range(count)
        ]
        if "mongodb" in self.url:
            # Without transactions a write that fails midway is not undone there.
            works = [work for work in works if work is not fail]
        futures = [self.store.submit(work) for work in works]
        for future, work in zip(futures, works, strict=True):
            if work is fail:
                assert isinstance(future.exception(), RefusedOnPurposeError)
                continue
            self.last += 1
            assert future.result() == self.last
            self.rows[self.last] = Row("a", None, 0.5, True, None)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.sampled_from(sorted(self.rows)), min_size=1, max_size=3, unique=True))

        def work(session: Session) -> None:
            tree.detach(session, gone)
            session.delete(gone)

        self.store.write(work)
        parents = {index: self.rows[index].parent for index in gone}
        for index in gone:
            del self.rows[index]
            self.candidates.discard(index)
        for row in self.rows.values():
            while row.parent in parents:
                row.parent = parents[row.parent]
        self.epoch += 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        child, parent = self.pick(data), data.draw(st.sampled_from([None, *sorted(self.rows)]))
        above, steps = parent, set()
        while above is not None and above not in steps:
            steps.add(above)
            above = self.rows[above].parent
        try:
            self.store.write(lambda session: tree.set_parent(session, child, parent))
            assert child not in steps
            self.rows[child].parent = parent
        except RefusedError:
            assert child in steps

    @precondition(lambda self: self.rows)
    @rule(score=st.sampled_from([None, 0.5, 1.5]), revision=st.integers(1, 3), data=st.data())
    def evaluate(self, score: float | None, revision: int, data: st.DataObject) -> None:
        index = self.pick(data)

        def work(session: Session) -> None:
            known = session.evidence(index)
            assert known is not None
            session.set_evaluation(index, known[0], Evaluation(score=score, source="result", revision=revision))

        self.store.write(work)
        self.rows[index].score, self.rows[index].revision = score, revision

    @precondition(lambda self: self.rows)
    @rule(model=st.sampled_from(["m1", "m1", "m1", "m2"]), data=st.data())
    def embed(self, model: str, data: st.DataObject) -> None:
        index = self.pick(data)
        self.store.write(lambda session: session.put_windows(index, model, np.eye(4, dtype=np.float32)[[index % 4]]))
        self.store.write(lambda session: session.put_sketch(index, bytes([index % 256]) * 512))
        if model != self.model:
            for row in self.rows.values():
                row.model = None
        self.model, self.rows[index].model = model, model

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def choose(self, data: st.DataObject) -> None:
        self.candidates = set(data.draw(st.lists(st.sampled_from(sorted(self.rows)), unique=True, max_size=4)))
        self.store.write(lambda session: session.put_candidates(sorted(self.candidates)))

    @rule()
    def clear(self) -> None:
        self.store.write(lambda session: session.clear())
        self.rows, self.last, self.model, self.candidates = {}, 0, None, set()

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = open_store(DatabaseSettings(store=self.url))

    @invariant()
    def answers_are_those_of_the_model(self) -> None:
        self.store.read(self._compare)

    def _compare(self, session: Session) -> None:
        rows = self.rows
        found = session.facts()
        assert [facts.index for facts in found] == sorted(rows)
        for facts in found:
            row = rows[facts.index]
            assert (facts.name, facts.parent, facts.benchmark, facts.complete, facts.score, facts.revision) == (
                row.name, row.parent, row.benchmark, row.complete, row.score, row.revision,
            )  # fmt: skip
            assert facts.pending == (row.model is None)
            if row.key is not None:
                assert session.find_key(row.key) == facts
        assert [element.index for element in session.elements(sorted(rows))] == sorted(rows)
        assert session.count() == len(rows) and session.unique_names() == len({row.name for row in rows.values()})
        counts: dict[int, int] = {}
        for row in rows.values():
            if row.parent is not None:
                counts[row.parent] = counts.get(row.parent, 0) + 1
        assert session.child_counts() == counts
        assert session.oldest_leaf() == min((index for index in rows if index not in counts), default=None)
        for parent in counts:
            children = [index for index in sorted(rows) if rows[index].parent == parent]
            assert [facts.index for facts in session.facts(Where(parent=parent))] == children
            strongest = sorted(children, key=lambda index: (-counts.get(index, 0), index))[:2]
            assert session.strongest_children(parent, 2) == strongest
        ranked = sorted(rows, key=lambda i: (rows[i].benchmark is None, -(rows[i].benchmark or 0), i))
        assert session.ranked("benchmark") == ranked
        assert session.ranked("benchmark", limit=2, offset=1) == ranked[1:3]
        best = sorted(self.candidates, key=lambda i: (rows[i].score is None, -(rows[i].score or 0), i))
        assert [facts.index for facts in session.candidates()] == best
        assert session.count(Where(explored=True), limit=2) == min(2, sum(counts.values()))
        old = [index for index in sorted(rows) if (rows[index].revision or 9) < 3]
        assert [facts.index for facts in session.facts(Where(published=True, before_revision=3))] == old
        embedded = {index for index in rows if rows[index].model is not None}
        vectors = session.windows(0, 1000)
        assert {row.index for row in vectors} >= embedded
        assert session.vector_sequences().tolist() == [row.sequence for row in vectors]
        assert (session.sample() in rows) == bool(rows)
        assert session.orphans() == [] and session.check() == []


def _entry(name: str, parent: int | None, cell: str, key: str | None) -> NewEntry:
    result = {"train": "s,1\nx,4.5", "test": f"m,a\nx,{cell}"}
    element = NewElement.model_validate(body_of(name, parent, result=result))
    return NewEntry(
        element=element,
        evidence=evidence_of(element.result.train, element.result.test, None),
        complete=bool(cell),
        key=key,
    )


@pytest.fixture
def sqlite() -> Iterator[Callable[[], str]]:
    with tempfile.TemporaryDirectory() as folder:
        yield lambda: f"sqlite:///{Path(folder, uuid.uuid4().hex)}.sqlite"


def check(where: Callable[[], str], examples: int, steps: int) -> None:
    machine: Any = type("Machine", (StoreMachine,), {"where": staticmethod(where)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_any_sequence_of_operations_on_sqlite(sqlite: Callable[[], str]) -> None:
    check(sqlite, examples=6, steps=25)


@pytest.mark.slow
def test_any_sequence_of_operations_on_sqlite_at_length(sqlite: Callable[[], str]) -> None:
    check(sqlite, examples=200, steps=60)


@pytest.mark.services
def test_any_sequence_of_operations_on_mongodb() -> None:
    with mongodb_server() as url:
        check(lambda: f"{url}/model_{uuid.uuid4().hex}", examples=6, steps=25)
