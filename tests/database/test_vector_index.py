"""The vector index: what is gone is never found, many vectors are searched approximately, rebuilds change no answer."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import pytest

from database.evaluate_agent.score import evidence_of
from database.exact_index import ExactIndex
from database.faiss_manager import VectorIndex
from database.models import NewElement
from database.sqlite_database import SqliteStore
from database.store import NewEntry, Session, VectorRow, VectorState
from database.vector_file import Snapshot, read_vectors, write_vectors
from database.vectors import RECALL, Vectors, approximate
from tests.database.db_service import EmbeddingDouble, Service, body_of, settled

DIMENSION = 24


def topics(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, count // 20), DIMENSION))
    found = centres[rng.integers(len(centres), size=count)] + 0.5 * rng.normal(size=(count, DIMENSION))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def put(store: SqliteStore, block: np.ndarray, model: str = "m") -> None:
    element = NewElement.model_validate(body_of("x"))
    evidence = evidence_of(element.result.train, element.result.test, None)

    def work(session: Session) -> None:
        for row in block:
            session.insert(NewEntry(element, evidence, complete=True, windows=row[None], model=model))

    store.write(work)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(str(tmp_path / "a.sqlite"))
    yield opened
    opened.close()


def nearest(block: np.ndarray, query: np.ndarray, k: int, without: set[int]) -> list[int]:
    order = np.argsort(-(block @ query), kind="stable") + 1
    return [int(index) for index in order if index not in without][:k]


def search(store: SqliteStore, index: VectorIndex, query: np.ndarray, k: int, before: int | None = None) -> list[int]:
    return [owner for owner, _ in store.read(lambda session: index.search(session, query[None], k, before))]


def test_what_is_removed_is_not_found_and_what_comes_is(store: SqliteStore) -> None:
    block = topics(60)
    index = VectorIndex(None)
    put(store, block[:40])
    query = topics(1, seed=3)[0]
    first = search(store, index, query, 5)
    assert first == nearest(block[:40], query, 5, set())
    store.write(lambda session: session.delete(first[:2]))
    assert search(store, index, query, 5) == nearest(block[:40], query, 5, set(first[:2]))
    stats = store.read(index.stats)
    assert (stats.vectors, stats.active, stats.orphans) == (40, 38, 2)
    put(store, block[40:])
    assert search(store, index, query, 5) == nearest(block, query, 5, set(first[:2]))
    assert search(store, index, query, 5, before=20) == nearest(block[:19], query, 5, set(first[:2]))
    assert store.read(index.clean).orphans == 2 and store.read(index.stats).orphans == 0
    assert search(store, index, query, 5) == nearest(block, query, 5, set(first[:2]))
    store.write(lambda session: session.clear())
    assert search(store, index, query, 5) == [] and store.read(index.stats).vectors == 0


class Watched:
    """A session that notes from where the vectors are read."""

    def __init__(self, session: Session, read_from: list[int]) -> None:
        self._session = session
        self._read_from = read_from

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def windows(self, after: int, limit: int) -> list[VectorRow]:
        self._read_from.append(after)
        return self._session.windows(after, limit)


def test_a_session_of_before_is_answered_as_of_then_and_nothing_is_built_anew(store: SqliteStore) -> None:
    block = topics(60)
    read_from: list[int] = []

    def read(work: Callable[[Session], Any]) -> Any:
        return store.read(lambda session: work(cast(Session, Watched(session, read_from))))

    index = VectorIndex(None, read=read)
    query, beside = topics(1, seed=3)[0], topics(1, seed=4)[0]

    def find(session: Session, k: int, before: int | None = None) -> list[int]:
        return [owner for owner, _ in index.search(session, query[None], k, before)]

    put(store, block[:40])
    assert read(lambda session: find(session, 5)) == nearest(block[:40], query, 5, set())

    def between(change: Callable[[], Any], count: int, without: set[int]) -> None:
        """A session that began before `change` sees `count` elements but those removed before."""

        def work(session: Session) -> None:
            session.count()
            change()
            read(lambda newer: index.search(newer, beside[None], 5))
            held, read_from[:] = read(index.stats), []
            assert find(session, 5) == nearest(block[:count], query, 5, without)
            assert find(session, 3, before=20) == nearest(block[:19], query, 3, without)
            assert index.stats(session) == held, "what it holds now"
            assert read(index.stats) == held and 0 not in read_from, "built anew"

        read(work)

    first = nearest(block, query, 60, set())
    between(lambda: put(store, block[40:]), 40, set())
    # Removed ones are there, skipped, until they are dropped; the last one of all among them.
    gone = {first[0], first[2], 60}
    between(lambda: store.write(lambda session: session.delete(sorted(gone))), 60, set())
    assert read(index.stats).orphans == len(gone)
    assert read(lambda session: find(session, 5)) == nearest(block, query, 5, gone)

    def drop() -> None:
        store.write(lambda session: session.delete([first[1]]))
        read(index.clean)

    between(drop, 60, gone)
    gone.add(first[1])


def test_a_session_from_before_the_store_was_emptied_is_answered_as_of_then(store: SqliteStore) -> None:
    block, query = topics(30), topics(1, seed=3)[0]
    index = VectorIndex(None, read=store.read)
    put(store, block)
    search(store, index, query, 5)

    def work(session: Session) -> None:
        session.count()
        store.write(lambda newer: newer.clear())
        put(store, block[:3])
        assert search(store, index, query, 5) == nearest(block[:3], query, 5, set())
        assert [owner for owner, _ in index.search(session, query[None], 5)] == nearest(block, query, 5, set())

    store.read(work)
    assert search(store, index, query, 5) == nearest(block[:3], query, 5, set())


def test_a_store_that_has_gone_back_is_followed(store: SqliteStore, tmp_path: Path) -> None:
    block, query = topics(30), topics(1, seed=3)[0]
    put(store, block[:20])
    with sqlite3.connect(store.path) as source, sqlite3.connect(tmp_path / "b.sqlite") as copy:
        source.backup(copy)
    restored = SqliteStore(str(tmp_path / "b.sqlite"))
    now = store
    index = VectorIndex(None, read=lambda work: now.read(work))
    put(store, block[20:])
    assert search(store, index, query, 5) == nearest(block, query, 5, set())
    now = restored
    assert search(restored, index, query, 5) == nearest(block[:20], query, 5, set())
    # The numbers that the vectors had which are gone are given again.
    other = topics(10, seed=8)
    put(restored, other)
    whole = np.concatenate([block[:20], other])
    assert search(restored, index, query, 5) == nearest(whole, query, 5, set())
    restored.close()


def test_many_vectors_are_searched_exactly_whatever_lies_close_together() -> None:
    rng = np.random.default_rng(1)
    apart = topics(6000)
    # Hundreds that half precision cannot tell apart, in no order.
    close = apart[:1] + 1e-4 * rng.normal(size=(600, DIMENSION)).astype(np.float32)
    block = rng.permutation(np.concatenate([apart, close / np.linalg.norm(close, axis=1, keepdims=True)]))
    index, flat = ExactIndex(DIMENSION), faiss.IndexFlatIP(DIMENSION)
    index.add(block[:5000])
    index.add(block[5000:])
    flat.add(block)
    allowed = rng.random(len(block)) < 0.3
    some = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little")))
    few = faiss.SearchParameters(sel=faiss.IDSelectorRange(0, 3))
    beside = apart[:1] + 0.1 * topics(1, seed=5)
    for query in (apart[:1], beside, apart[1:2], topics(3, seed=9), 5 * topics(1, seed=4)):
        for k in (1, 5, 70):
            for params in (None, some, few):
                wanted, places = flat.search(query, k, params=params)
                products, positions = index.search(query, k, params=params)
                real = places >= 0
                assert ((positions >= 0) == real).all()
                # The same rows, but for the rounding of sums.
                assert np.allclose(products[real], wanted[real], rtol=1e-6, atol=1e-6)
                assert np.allclose(
                    np.einsum("qkd,qd->qk", block[positions], query)[real], wanted[real], rtol=1e-6, atol=1e-6
                )


def test_vectors_of_another_model_are_never_mixed(store: SqliteStore) -> None:
    index = VectorIndex(None)
    put(store, topics(5))
    assert len(search(store, index, topics(1)[0], 9)) == 5
    put(store, topics(2, seed=5), model="other")
    assert set(search(store, index, topics(1)[0], 9)) == {6, 7}


@pytest.mark.parametrize("saved", [False, True])
def test_many_vectors_are_searched_approximately_after_a_rebuild_aside(
    store: SqliteStore, tmp_path: Path, saved: bool
) -> None:
    block = topics(3000)
    file = tmp_path / "cache" if saved else None
    index = VectorIndex(file, exact=1000)
    put(store, block[:2500])
    queries = topics(30, seed=9)
    exact = [search(store, index, query, 5) for query in queries]
    assert store.read(index.stats).recall is None, "exact until the other is built"
    while index.maintain(store.read):
        pass
    recall = store.read(index.stats).recall
    assert recall is not None and recall >= RECALL
    if saved:
        index.save()
        index = VectorIndex(file, exact=1000)
    found = [search(store, index, query, 5) for query in queries]
    shared = sum(len(set(a) & set(b)) for a, b in zip(exact, found, strict=True))
    assert shared / (5 * len(queries)) >= 0.9
    # What comes and goes later is followed in the approximate index too.
    gone = found[0][0]
    store.write(lambda session: session.delete([gone]))
    put(store, block[2500:])
    assert search(store, index, block[2700], 1) == [2701]
    assert gone not in search(store, index, queries[0], 5)
    assert all(owner < 500 for owner in search(store, index, queries[0], 5, before=500))


def test_searches_go_on_while_it_is_rebuilt(store: SqliteStore) -> None:
    """A rebuild reads page by page; what happens between two pages is not lost."""
    block = topics(1300)
    index = VectorIndex(None, exact=500)
    put(store, block[:1000])
    seen: list[list[int]] = []

    def read(work: Callable[[Session], Any]) -> Any:
        answer = store.read(work)
        if len(seen) < 3:
            seen.append(search(store, index, block[7], 1))
            if len(seen) == 3:
                put(store, block[1000:])
                store.write(lambda session: session.delete([1]))
        return answer

    assert index.maintain(read) is True
    assert seen == [[8]] * len(seen)
    assert search(store, index, block[1299], 1) == [1300] and search(store, index, block[0], 1) != [1]
    assert store.read(index.stats).active == 1299


def test_a_cache_of_another_store_is_noticed(store: SqliteStore, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    other = SqliteStore(str(tmp_path / "other.sqlite"))
    put(other, topics(20, seed=1))
    foreign = VectorIndex(file)
    other.read(foreign.stats)
    foreign.save()
    other.close()
    block = topics(20, seed=2)
    put(store, block)
    assert search(store, VectorIndex(file), block[4], 1) == [5]


def test_what_a_killed_save_left_is_removed_when_the_index_is_opened_and_saved(
    store: SqliteStore, tmp_path: Path
) -> None:
    file = tmp_path / "a.sqlite.faiss"
    left = tmp_path / ".a.sqlite.faiss.k1ll3d__"

    def leave() -> None:
        left.write_bytes(b"half")
        os.utime(left, (0, 0))

    leave()
    index = VectorIndex(file)
    assert not left.exists()
    put(store, topics(3))
    store.read(index.stats)
    leave()
    index.save()
    assert not left.exists() and VectorIndex(file) and file.exists()


def test_few_vectors_can_be_approximated_too() -> None:
    exact = Vectors()
    exact.add([VectorRow(1, 1, topics(1)), VectorRow(2, 2, topics(3, seed=1))])
    near = approximate(exact)
    assert near.search(topics(1), 5) == exact.search(topics(1), 5)


def test_a_cache_is_written_piece_by_piece_while_others_add(tmp_path: Path) -> None:
    block = topics(10_000)
    vectors = Vectors()
    vectors.add([VectorRow(number, number, block[number - 1 : number]) for number in range(1, 9_001)])
    added: list[int] = []

    class Turn:
        """A lock that others had in between, and added something."""

        def __enter__(self) -> None:
            number = 9_001 + len(added)
            vectors.add([VectorRow(number, number, block[number - 1 : number])])
            added.append(number)

        def __exit__(self, *_: object) -> None:
            pass

    state = VectorState(3, 9_000, "m")
    write_vectors(tmp_path / "cache", Snapshot.of(vectors, state), Turn())
    found, kept = read_vectors((tmp_path / "cache").read_bytes())
    assert len(added) > 1, "a search waits for a piece, not for the file"
    assert (kept, found.total) == (state, 9_000)
    assert np.array_equal(found.flat.reconstruct_n(0, 9_000), block[:9_000])
    assert found.search(block[8_999:9_000], 1)[0][0] == 9_000 and vectors.search(block[9_000:9_001], 1)[0][0] == 9_001


def test_a_vector_whose_number_was_given_before_it_was_stored_is_found_after_a_rebuild(store: SqliteStore) -> None:
    block = topics(140)
    put(store, block[:120])
    index = VectorIndex(None, exact=50)
    query = block[139]
    search(store, index, query, 1)

    class Ahead:
        """As a store tells whose counter is ahead of its documents: the numbers of the last 20 are given already."""

        def __init__(self, session: Session) -> None:
            self._session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def vector_state(self) -> VectorState:
            now = self._session.vector_state()
            return VectorState(now.epoch, 140, now.model)

    # Too many for an exact search: it is built anew meanwhile.
    index.maintain(lambda work: store.read(lambda session: work(Ahead(session))))
    put(store, block[120:])
    # Not by what was learnt from the 120 of before, but by itself.
    assert search(store, index, query, 1) == [140]


def test_a_server_searches_approximately_beyond_its_limit_and_says_how_well(
    store: SqliteStore, start: Callable[..., Service], tmp_path: Path
) -> None:
    """Against a comparison with all vectors."""
    block = topics(700)
    put(store, block[:600])
    double = EmbeddingDouble(lambda text: [block[int(text)].tolist()], "m", DIMENSION)
    url = f"sqlite:///{tmp_path}/a.sqlite"
    service = start(store=url, embedding_url=double.url, env={"ASI_DATABASE__EXACT_WINDOWS": "300"})
    deadline = time.monotonic() + 60
    while (recall := service.get("/v2/stats")["vector_index"]["recall"]) is None:
        assert time.monotonic() < deadline, "it is built in the background"
        time.sleep(0.1)
    assert recall >= RECALL
    shared = 0
    for row in range(600, 700):
        found = service.get(f"/elements/search-similar?motivation={row}&top_k=5")
        shared += len({element["index"] for element in found} & set(nearest(block[:600], block[row], 5, set())))
    assert shared / 500 >= RECALL - 0.05
    service.delete("/elements/by-index/7")
    assert service.get("/elements/search-similar?motivation=6&top_k=1")[0]["index"] != 7
    assert service.add("last", motivation="699") == 601
    assert service.get("/elements/search-similar?motivation=699&top_k=1")[0]["index"] == 601
    assert service.stop() == 0
    double.close()


def changed_model(start: Callable[..., Service], dimension: int) -> tuple[Service, EmbeddingDouble]:
    """A server over eight elements that another model embedded, of motivations of 1 to 8 letters."""
    first = start()
    for length in range(1, 9):
        first.add(f"n{length}", motivation="x" * length)
    settled(first)
    assert first.stop() == 0
    rows = np.eye(dimension)
    double = EmbeddingDouble(lambda text: [rows[len(text) % 9].tolist()], "lengths", dimension)
    return start(embedding_url=double.url), double


@pytest.mark.parametrize("dimension", [DIMENSION, 64], ids=["another length", "the same length"])
def test_a_search_with_another_model_finds_by_that_model_or_says_what_is_pending(
    start: Callable[..., Service], dimension: int
) -> None:
    service, double = changed_model(start, dimension)
    deadline = time.monotonic() + 30
    for length in (3, 5, 7):
        while True:
            answer = service.http.get(f"/elements/search-similar?motivation={'x' * length}&top_k=1")
            if answer.headers["Pending-Embeddings"] == "0":
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [element["name"] for element in answer.json()] == [f"n{length}"]
    assert service.get("/v2/stats")["embedding_model"] == "lengths"
    double.close()


def test_novelty_is_measured_by_one_model(start: Callable[..., Service]) -> None:
    service, double = changed_model(start, 64)
    service.add("as the fifth", motivation="x" * 5)
    settled(service)
    novelty = service.get("/v2/elements/9/score")["evidence"]["novelty"]
    assert (novelty["motivation_index"], novelty["motivation"]) == (5, pytest.approx(0.0, abs=1e-6))
    double.close()


def test_a_rebuild_with_another_model_embeds_all_again(start: Callable[..., Service]) -> None:
    service, double = changed_model(start, 64)
    service.post("/faiss/rebuild")
    settled(service)
    assert service.get("/v2/stats")["embedding_model"] == "lengths"
    assert service.get("/faiss/stats")["data"]["active_mappings"] == 8
    double.close()
