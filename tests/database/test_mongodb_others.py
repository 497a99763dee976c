"""MongoDB beside other programs and holders: their documents, their numbers, a lease that was lost, slow answers."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pymongo
import pytest
from pymongo import monitoring

from common.errors import StoreError
from database import repair, tree
from database.errors import NotFoundError
from database.invariants import broken
from database.store import Session, Where
from tests.database.test_mongodb_writes import entry_of, insert_below, opened, together

pytestmark = pytest.mark.services
Database = pymongo.database.Database[dict[str, Any]]


@pytest.mark.parametrize("transactions", [True, False], ids=["transactions", "stand-alone"])
def test_a_document_of_another_program_counts_for_nothing(place: tuple[str, Database], transactions: bool) -> None:
    url, database = place
    store = opened(url, transactions)
    for parent in (None, None, 1):
        store.write(partial(insert_below, parent))
    # No element: it has no index. It looks like one otherwise, a lost one.
    database["data_elements"].insert_one({"name": "y", "parent": 1, "note": "of another program"})
    store.write(lambda session: session.insert(entry_of("y")))
    store.write(lambda session: repair.remove(session, [4]))
    assert broken(store, 50) == []
    context = store.read(lambda session: tree.context(session, 1))
    assert [element.index for element in context.strongest_siblings] == [3]
    database["data_elements"].update_one({"note": {"$exists": True}}, {"$set": {"parent": 77}})
    assert store.read(lambda session: session.orphans()) == []
    store.close()
    store = opened(url, transactions)
    database["data_elements"].update_one({"note": {"$exists": True}}, {"$unset": {"parent": ""}})
    for where in (Where(roots=True), Where(unscored=True), Where(published=True)):
        page = store.read(lambda session, where=where: session.facts(where, limit=2))  # type: ignore[misc]
        assert [facts.index for facts in page] == [1, 2], "a page that is not full is the last one"
    assert store.read(lambda session: session.count(Where(unscored=True))) == 3
    assert broken(store, 50) == []
    store.close()


def test_two_documents_without_an_index_are_told(place: tuple[str, Database]) -> None:
    url, database = place
    database["data_elements"].insert_many([{"note": 1}, {"note": 2}])
    with pytest.raises(StoreError, match="several documents have no index"):
        opened(url, False)


def test_a_number_that_another_program_takes_is_told_without_the_element(place: tuple[str, Database]) -> None:
    url, database = place
    store = opened(url, False)

    def insert(session: Session) -> int:
        index = session.insert(entry_of("secret"))
        database["data_elements"].insert_one({"index": index})
        return index

    with pytest.raises(StoreError, match="duplicate key") as told:
        store.write(insert)
    assert "secret" not in str(told.value)
    database["data_elements"].delete_many({"asi": {"$exists": False}})
    assert store.write(partial(insert_below, None)) == 1
    assert broken(store, 50) == []
    store.close()


def test_a_write_that_is_refused_and_changed_nothing_has_nothing_mended(place: tuple[str, Database]) -> None:
    store = opened(place[0], False)
    store.write(partial(insert_below, None))

    def absent(session: Session) -> None:
        # It looks where new elements are, which sends those of the writes before.
        assert session.evidence(99) is None
        raise NotFoundError("there is no element 99")

    before = store.read(lambda session: session.vector_state().epoch)
    futures = together(store, [partial(insert_below, 1), absent, partial(insert_below, 2)])
    assert [futures[0].result(30), futures[2].result(30)] == [2, 3]
    assert isinstance(futures[1].exception(30), NotFoundError)
    store.write(lambda session: session.put_state("x", 1))
    # Mending makes whoever holds the vectors look again.
    assert store.read(lambda session: session.vector_state().epoch) == before
    assert broken(store, 50) == []
    store.close()


def test_a_check_in_the_middle_of_a_write_tells_nothing(place: tuple[str, Database]) -> None:
    inside, go = threading.Event(), threading.Event()

    class Halting(monitoring.CommandListener):
        """Stops between an element and its event, which the counts follow."""

        def started(self, event: monitoring.CommandStartedEvent) -> None:
            if event.command.get("insert") == "asi_events":
                inside.set()
                assert go.wait(30)

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

        def failed(self, event: monitoring.CommandFailedEvent) -> None: ...

    before = list(monitoring._LISTENERS.command_listeners)
    monitoring.register(Halting())
    try:
        store = opened(place[0], False)
    finally:
        monitoring._LISTENERS.command_listeners[:] = before
    writing = store.submit(partial(insert_below, None))
    assert inside.wait(30)
    threading.Timer(0.3, go.set).start()
    assert store.read(lambda session: session.check()) == []
    assert writing.result(30) == 1
    store.close()


def test_a_number_of_children_below_nothing_is_put_right(place: tuple[str, Database]) -> None:
    url, database = place
    store = opened(url, False)
    store.write(partial(insert_below, None))
    # As two holders leave it who took the same child away.
    database["data_elements"].update_one({"index": 1}, {"$set": {"asi.children": -1}})
    assert len(store.read(lambda session: session.check())) == 1
    store.close()
    store = opened(url, False)
    assert store.read(lambda session: session.oldest_leaf()) == 1
    store.close()


def test_the_next_holder_mends_what_one_wrote_that_had_lost_its_lease(place: tuple[str, Database]) -> None:
    url, database = place
    store = opened(url, False)
    store.write(partial(insert_below, None))

    def stalled(session: Session) -> None:
        session.insert(entry_of("y", 1))
        # It stands still, and another one gets the lease, writes, and gives it back.
        database["asi_state"].update_one({"_id": "lease"}, {"$set": {"owner": "another", "until": 0.0}})

    store.write(stalled)
    # The counts are those of one of the two, who did not know of the other's write.
    database["data_elements"].delete_one({"index": 1})
    store.write(lambda session: session.put_state("x", 1))
    assert broken(store, 50) == []
    store.close()


@contextlib.contextmanager
def slowed(server: str, seconds: float) -> Iterator[str]:
    """The URL of a way to the server that holds back each answer to a counting of everything."""
    host = urlsplit(server)
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, late: threading.Event, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if asks and b"aggregate" in data:
                    late.set()
                elif not asks and late.is_set():
                    late.clear()
                    time.sleep(seconds)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                behind = socket.create_connection((host.hostname or "", host.port or 0))
                late = threading.Event()
                for one in ((client, behind, late, True), (behind, client, late, False)):
                    threading.Thread(target=pump, args=one, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"mongodb://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def test_mending_waits_for_as_long_as_counting_takes(
    server: str, place: tuple[str, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("database.mongodb_connection.ANSWER_SECONDS", 0.4)
    _, database = place
    with slowed(server, 0.8) as url:
        store = opened(f"{url}/{database.name}?directConnection=true", False)
        database["asi_state"].update_one({"_id": "lease"}, {"$set": {"broken": True}})
        assert store.write(partial(insert_below, None)) == 1
        store.close()


def test_the_names_of_answers_of_an_earlier_release_are_told(place: tuple[str, Database]) -> None:
    url, database = place
    store = opened(url, True)
    names = [
        ("POST /v2/usage", "k"),
        ("body of", "elements:a b"),
        ("import", "k:1"),
        ("removed under", "experiments:k"),
    ]
    database["asi_answers"].insert_many([{"_id": f"{route} {key}", "body": "{}"} for route, key in names])
    assert store.read(lambda session: session.answer_names()) == names
    store.close()


def test_answers_of_an_earlier_release_are_found_and_none_is_taken_for_another(place: tuple[str, Database]) -> None:
    url, database = place
    store = opened(url, True)
    bare = [("POST /v2/usage", "k"), ("DELETE /elements/by-name/x y", "k")]
    told = [("DELETE /elements/by-name/a b", "k"), ("import begun", "K:1"), ("import", "k:1")]
    database["asi_answers"].insert_many([{"_id": f"{route} {key}", "body": "{}"} for route, key in bare])
    database["asi_answers"].insert_many(
        [{"_id": f"{route} {key}", "route": route, "body": "{}"} for route, key in told]
    )

    def answers(pairs: list[tuple[str, str]]) -> list[dict[str, Any] | None]:
        return store.read(lambda session: [session.answer(route, key) for route, key in pairs])

    assert answers([*bare, *told]) == [{}] * 5
    others = [("DELETE /elements/by-name/a", "b k"), ("import", "begun K:1")]
    assert answers(others) == [None, None]
    store.write(lambda session: [session.put_answer(route, key, {"x": 1}) for route, key in [*told, *others]])
    assert answers([*told, *others]) == [{"x": 1}] * 5
    names = store.read(lambda session: session.answer_names())
    assert set(names) >= {*told, *others} and len(names) == len(set(names)) == 7
    store.close()
