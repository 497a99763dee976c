"""What both stores promise, asked of each through the store interface. MongoDB runs with `-m services`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import StoreError
from common.knobs import Database as DatabaseSettings
from database import tree
from database.evaluate_agent.score import Evaluation, evidence_of
from database.models import NewElement
from database.novelty import Sketches, shingles, sketch
from database.store import CLEARED, NewEntry, Session, Store, Where, open_store
from tests.database.db_service import BASELINE, KEYS, body_of, mongodb_server, run_of


def entry_of(
    name: str, parent: int | None = None, benchmark: str = "0.5", key: str | None = None, vector: int | None = None
) -> NewEntry:
    result = {"train": "s,1\nx,4.5", "test": f"m,a\nx,{benchmark}"}
    element = NewElement.model_validate(body_of(name, parent, result=result))
    return NewEntry(
        element=element,
        evidence=evidence_of(element.result.train, element.result.test, None),
        complete=bool(benchmark),
        sketch=sketch(shingles(element.program)),
        windows=None if vector is None else np.eye(8, dtype=np.float32)[[vector, 7]],
        model=None if vector is None else "eye",
        run=run_of(element, 4.0, 0.5) if key else None,
        key=key,
    )


@pytest.fixture(scope="session")
def mongodb() -> Iterator[str]:
    with mongodb_server() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("mongodb", marks=pytest.mark.services)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Opens the same store again and again."""
    url = f"sqlite:///{tmp_path}/a.sqlite"
    if request.param == "mongodb":
        url = f"{request.getfixturevalue('mongodb')}/test_{uuid.uuid4().hex}"
    stores: list[Store] = []

    def begin() -> Store:
        stores.append(open_store(DatabaseSettings(store=url)))
        return stores[-1]

    yield begin
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Callable[[], Store]) -> Store:
    return opened()


def insert(store: Store, *entries: NewEntry) -> list[int]:
    def one(entry: NewEntry) -> int:
        return store.write(lambda session: session.insert(entry))

    return [one(entry) for entry in entries]


def indices(store: Store, where: Where = Where(), order: str = "index", **kwargs: int) -> list[int]:  # noqa: B008
    return [facts.index for facts in store.read(lambda session: session.facts(where, order, **kwargs))]  # type: ignore[arg-type]


def test_an_entry_comes_back_whole(store: Store, opened: Callable[[], Store]) -> None:
    assert insert(store, entry_of("a", key="k1", vector=0)) == [1]
    for reader in (store, opened()):
        element = reader.read(lambda session: session.elements([1, 2, 0, -1, 10**30]))
        assert len(element) == 1 and list(element[0].model_dump()) == KEYS and element[0].name == "a"
        assert reader.read(lambda session: session.runs(1))[0].name == "a"
        assert reader.read(lambda session: session.with_fingerprint("function of a")) == [1]
        assert reader.read(lambda session: session.with_fingerprint("other")) == []
        facts = reader.read(lambda session: session.find_key("k1"))
        assert (
            facts is not None
            and facts.index == 1
            and facts.benchmark == 0.5
            and not facts.pending
            and facts.score is None
        )
        evidence = reader.read(lambda session: session.evidence(1))
        assert evidence is not None and evidence[0].loss is not None and evidence[1] is None
        rows = reader.read(lambda session: session.windows(0, 10))
        assert [row.index for row in rows] == [1] and rows[0].windows.tolist() == np.eye(8)[[0, 7]].tolist()
        assert reader.read(lambda session: session.sketches(0, 10)) == [(1, 1, entry_of("a").sketch)]
    assert store.read(lambda session: session.find_key("k2")) is None


def test_orders_and_conditions(store: Store) -> None:
    insert(
        store,
        entry_of("a", benchmark="0.3"),
        entry_of("b", 1, benchmark="nan"),
        entry_of("a", 1, benchmark="0.9", vector=1),
        entry_of("c", 2, benchmark=""),
    )

    def score(session: Session) -> None:
        for index, value in ((1, 1.5), (3, 0.5), (4, 2.5)):
            known = session.evidence(index)
            assert known is not None
            session.set_evaluation(index, known[0], Evaluation(score=value, source="result"))

    store.write(score)
    assert indices(store) == [1, 2, 3, 4]
    assert indices(store, order="newest", limit=2) == [4, 3]
    assert indices(store, order="benchmark") == [3, 1, 2, 4]
    assert indices(store, order="score") == [4, 1, 3, 2]
    assert indices(store, order="benchmark", limit=2, offset=1) == [1, 2]
    assert indices(store, Where(name="a"), "time") == [1, 3]
    assert indices(store, Where(parent=1)) == [2, 3] and indices(store, Where(roots=True)) == [1]
    assert indices(store, Where(after=2)) == [3, 4] and indices(store, Where(incomplete=True)) == [4]
    assert indices(store, Where(pending=True)) == [1, 2, 4] and indices(store, Where(unscored=True)) == [2]
    for nothing in (Where(parent=1, roots=True), Where(published=True, baseline_key="k"), Where(index=2, after=2)):
        assert indices(store, nothing) == [] and store.read(lambda session, w=nothing: session.count(w)) == 0, nothing
    assert indices(store, Where(index=2, after=1)) == [2]
    assert store.read(lambda session: session.count()) == 4
    assert store.read(lambda session: session.count(Where(after=1), limit=2)) == 2
    assert store.read(lambda session: session.unique_names()) == 3
    assert store.read(lambda session: session.child_counts()) == {1: 2, 2: 1}
    assert store.read(lambda session: session.child_counts([2, 3])) == {2: 1}
    assert store.read(lambda session: session.oldest_leaf()) == 3


def test_a_failed_write_leaves_nothing(store: Store) -> None:
    insert(store, entry_of("a"))

    def fail(session: Session) -> None:
        session.insert(entry_of("b"))
        tree.facts_of(session, 9)

    with pytest.raises(Exception, match="no element 9"):
        store.write(fail)
    assert insert(store, entry_of("c")) == [2]
    assert [element.name for element in store.read(lambda session: session.elements([1, 2]))] == ["a", "c"]


def test_an_index_is_not_used_again_while_data_exists(store: Store, opened: Callable[[], Store]) -> None:
    insert(store, entry_of("a"), entry_of("b"), entry_of("c"))
    store.write(lambda session: session.delete([3]))
    again = opened()
    assert insert(again, entry_of("d")) == [4]
    again.write(lambda session: session.clear())
    assert insert(again, entry_of("e")) == [1]


def test_an_index_can_be_given_where_it_is_free(store: Store, opened: Callable[[], Store]) -> None:
    def work(session: Session) -> list[int]:
        free = [session.is_free(index) for index in (1, 7)]
        found = [session.insert(entry_of("a", key="k"), 7), session.insert(entry_of("b", 7), 3)]
        assert [session.is_free(index) for index in (2, 3, 7, 8)] == [True, False, False, True] and all(free)
        return [*found, session.insert(entry_of("b", 3))]

    assert store.write(work) == [7, 3, 8]
    assert store.write(lambda session: session.insert(entry_of("c"), 5)) == 5 and insert(store, entry_of("d")) == [9]
    for reader in (store, opened()):
        assert [(facts.index, facts.parent) for facts in reader.read(lambda session: session.facts())] == [
            (3, 7), (5, None), (7, None), (8, 3), (9, None),
        ]  # fmt: skip
        assert reader.read(lambda session: session.child_counts()) == {7: 1, 3: 1}
        assert reader.read(lambda session: (session.count(), session.unique_names(), session.oldest_leaf())) == (
            5,
            4,
            5,
        )
    assert store.read(lambda session: session.check()) == []


def test_indices_are_unique_and_without_gaps_under_concurrency(store: Store, opened: Callable[[], Store]) -> None:
    stores = [store, opened()]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: insert(stores[n % 2], entry_of(f"n{n}", key=f"key{n}"))[0], range(24)))
    assert sorted(found) == list(range(1, 25))
    assert indices(store) == list(range(1, 25))


def test_removal_takes_everything_along(store: Store) -> None:
    insert(store, entry_of("a", vector=0), entry_of("b", 1, vector=1), entry_of("c", 2, vector=2, key="k"))
    store.write(lambda session: session.put_candidates([1, 2, 3]))
    before = store.read(lambda session: session.vector_state())
    assert (before.sequence, before.model) == (3, "eye")

    def remove(session: Session) -> int:
        moved = tree.detach(session, [2])
        session.delete([2])
        return moved

    assert store.write(remove) == 1
    after = store.read(lambda session: session.vector_state())
    assert after.epoch > before.epoch
    assert store.read(lambda session: session.vector_sequences()).tolist() == [1, 3]
    assert [facts.index for facts in store.read(lambda session: session.candidates())] == [1, 3]
    assert store.read(lambda session: session.elements([3]))[0].parent == 1
    assert store.read(lambda session: session.evidence(2)) is None
    store.write(lambda session: session.delete([3]))
    assert (
        store.read(lambda session: session.runs(3)) == [] and store.read(lambda session: session.find_key("k")) is None
    )


def test_parents_are_those_of_all_or_of_the_elements_that_are_asked_for(store: Store) -> None:
    insert(store, entry_of("a"), entry_of("b", 1), entry_of("c", 1), entry_of("d", 3))
    store.write(lambda session: session.delete([2]))
    store.write(lambda session: session.set_parent([1], 4))
    assert store.read(lambda session: session.parents()) == {1: 4, 3: 1, 4: 3}
    assert store.read(lambda session: session.parents([4, 2, 0, 1, 2**70])) == {1: 4, 4: 3}
    assert store.read(lambda session: session.parents([])) == {}
    # Also within a write, of what it has not sent yet.
    stored = store.write(lambda session: (session.insert(entry_of("e", 4)), session.parents(), session.parents([5])))
    assert stored == (5, {1: 4, 3: 1, 4: 3, 5: 4}, {5: 4})


def test_removals_of_everything_are_counted(store: Store, opened: Callable[[], Store]) -> None:
    assert store.read(lambda session: session.state(CLEARED)) is None
    for count in (1, 2):
        insert(store, entry_of("a"))
        store.write(lambda session: session.clear())
        assert store.read(lambda session: session.state(CLEARED)) == count
    insert(store, entry_of("a"))
    store.write(lambda session: session.delete([1]))
    assert opened().read(lambda session: session.state(CLEARED)) == 2


def test_vectors_of_another_model_make_the_rest_pending(store: Store) -> None:
    insert(store, entry_of("a", vector=0), entry_of("b", vector=1))
    before = store.read(lambda session: session.vector_state())
    store.write(lambda session: session.put_windows(2, "other", np.eye(4, dtype=np.float32)[:1]))
    after = store.read(lambda session: session.vector_state())
    assert after.model == "other" and after.epoch > before.epoch
    assert indices(store, Where(pending=True)) == [1]
    assert [row.index for row in store.read(lambda session: session.windows(0, 10))] == [2]


def test_small_state_answers_and_baselines(store: Store, opened: Callable[[], Store]) -> None:
    def write(session: Session) -> None:
        session.put_state("x", {"a": [1, None]})
        session.put_answer("POST /x", "k", {"message": "m", "data": {"index": 1}})
        session.put_baseline(BASELINE)

    store.write(write)
    again = opened()
    assert again.read(lambda session: session.state("x")) == {"a": [1, None]}
    assert again.read(lambda session: session.state("y")) is None
    assert again.read(lambda session: session.answer("POST /x", "k")) == {"message": "m", "data": {"index": 1}}
    assert again.read(lambda session: session.answer("POST /y", "k")) is None
    assert again.read(lambda session: session.baseline(BASELINE.key)) == BASELINE
    again.write(lambda session: session.clear())
    assert again.read(lambda session: session.baseline(BASELINE.key)) == BASELINE
    assert again.read(lambda session: session.answer("POST /x", "k")) is None
    assert again.read(lambda session: session.check()) == []
    sizes = again.read(lambda session: session.sizes())
    assert sizes.documents == 0 and sizes.database >= 0 and sizes.database_name and sizes.collection_name


def test_the_names_of_answers_are_told(store: Store) -> None:
    names = [("POST /elements/by name", "a key"), ("body of", "elements:x y"), ("import", "k:1")]
    store.write(lambda session: [session.put_answer(route, key, {"x": 1}) for route, key in names])
    assert store.read(lambda session: session.answer_names()) == names
    store.write(lambda session: session.clear())
    assert store.read(lambda session: session.answer_names()) == []


def test_answers_of_other_routes_and_keys_are_others(store: Store) -> None:
    pairs = [
        ("11 import begun", "K:1"),
        ("DELETE /elements/by-name/a", "b k"),
        ("DELETE /elements/by-name/a b", "k"),
        ("import", "begun"),
        ("import", "begun K:1"),
        ("import", "k:1"),
        ("import begun", "K:1"),
    ]
    for write in range(2):
        store.write(
            lambda session, write=write: [
                session.put_answer(route, key, {"x": number + write})
                for number, (route, key) in enumerate(pairs[: 4 + 3 * write])
            ]
        )
    answers = store.read(lambda session: [session.answer(route, key) for route, key in pairs])
    assert answers == [{"x": number + 1} for number in range(len(pairs))]
    assert store.read(lambda session: session.answer_names()) == sorted(pairs)
    assert store.read(lambda session: session.answer("import begun", "k:1")) is None


def test_hostile_text_is_data(store: Store) -> None:
    name = 'a\u0000b.$gt {"$ne": 1} \' --'
    insert(store, entry_of(name))
    assert indices(store, Where(name=name)) == [1]
    assert indices(store, Where(name='{"$gt": ""}')) == []


def test_a_deep_lineage_breaks_no_recursion_limit(store: Store) -> None:
    # Above Python's limit, where that takes no minute.
    depth = 1500 if store.snapshots else 50

    def grow(session: Session) -> None:
        for number in range(depth):
            session.insert(entry_of("n", number or None))

    store.write(grow)
    text = store.read(lambda session: tree.tree_json(session, None))
    assert text.count('"children":[{') == depth - 1 and text.count("[") == text.count("]")
    assert len(store.read(lambda session: tree.path(session, depth))) == depth
    shallow = json.loads(store.read(lambda session: tree.tree_json(session, depth)))
    assert shallow["data"]["children"] == []


def test_a_store_that_is_closed_or_not_there_is_a_clear_error(opened: Callable[[], Store]) -> None:
    store = opened()
    store.close()
    with pytest.raises(StoreError):
        store.write(lambda session: session.clear())


class _Heard:
    """A session, and after which number sketches were asked for."""

    def __init__(self, session: Session, asked: list[int]) -> None:
        self._session = session
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def sketches(self, after: int, limit: int) -> list[tuple[int, int, bytes]]:
        self._asked.append(after)
        return self._session.sketches(after, limit)


def test_a_removal_has_no_sketch_read_again(store: Store) -> None:
    insert(store, *(entry_of(name) for name in ("a", "b", "c", "d")))
    asked: list[int] = []
    known = Sketches()

    def nearest(name: str) -> tuple[int, float] | None:
        hashes = shingles(entry_of(name).element.program)
        return store.read(lambda session: known.nearest(_Heard(session, asked), hashes))  # type: ignore[arg-type]

    assert nearest("b") == (2, 0.0) and asked[0] == 0
    asked.clear()
    store.write(lambda session: session.delete([2]))
    found = nearest("b")
    assert found is not None and found[0] != 2 and found[1] > 0
    assert nearest("d") == (4, 0.0) and nearest("a") == (1, 0.0)
    insert(store, entry_of("b"))
    assert nearest("b") == (5, 0.0)
    assert min(asked) >= 4, "what was read before is not read again"
    assert sorted(store.read(lambda session: session.sketch_sequences()).tolist()) == [1, 3, 4, 5]
    # The numbers go on where the indices begin anew.
    store.write(lambda session: session.clear())
    assert nearest("b") is None
    insert(store, entry_of("e"), entry_of("d"))
    assert nearest("e") == (1, 0.0) and nearest("d") == (2, 0.0)
    assert store.read(lambda session: session.sketch_sequences()).tolist() == [6, 7]


def test_bytes_of_elements_are_known_without_reading_them(store: Store) -> None:
    insert(store, entry_of("a"), entry_of("b" * 400))
    found = store.read(lambda session: session.bytes_of([1, 2, 3]))
    assert set(found) == {1, 2} and 400 < found[2] - found[1] < 2000


def test_a_long_list_is_read_a_few_at_a_time(store: Store) -> None:
    insert(store, *(entry_of(f"e{number}") for number in range(1, 104)))
    asked = [104, *range(103, 0, -1)]
    read = store.read(lambda session: list(session.each(asked)))
    assert [element.name for element in read] == [f"e{number}" for number in range(103, 0, -1)]
    assert read == store.read(lambda session: session.elements(asked))
    assert store.read(lambda session: session.weight_of(asked)) > store.read(lambda session: session.weight_of([1]))
    assert store.read(lambda session: session.weight_of([])) == 0
