"""What a holder of the lease leaves behind that was killed: it is mended, though nobody writes, and never forgotten;
nobody answers from it meanwhile."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import Any

import pymongo
import pytest

from database.invariants import broken
from database.mongodb_counting import begin
from database.mongodb_draft import Draft
from database.mongodb_lease import Lease
from database.store import Session, StoreBusyError, UncountedError
from tests.database.test_mongodb_writes import insert_below, opened

pytestmark = pytest.mark.services
Database = pymongo.database.Database[dict[str, Any]]
KILLED = {"owner": "killed", "session": None}


def test_an_idle_server_mends_what_a_killed_one_left(
    place: tuple[str, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("database.mongodb_database._COUNTING_REST", 0.2)
    url, database = place
    store = opened(url, False)
    for parent in (None, 1, 1):
        store.write(partial(insert_below, parent))
    # As killed between the element and the totals, without a transaction.
    database["data_elements"].delete_one({"index": 3})
    database["asi_state"].update_one({"_id": "lease"}, {"$set": KILLED | {"until": time.time() - 1}})
    until = time.monotonic() + 20
    while counted(store) != 2:
        assert time.monotonic() < until, "it answers from what may be wrong, for ever"
        time.sleep(0.1)
    assert broken(store, 50) == []
    store.close()


def counted(store: Any) -> int | None:
    try:
        found: int = store.read(lambda session: session.count())
    except UncountedError:
        return None
    return found


@pytest.mark.parametrize("transactions", [True, False], ids=["transactions", "stand-alone"])
def test_what_has_to_be_mended_is_not_forgotten_where_the_next_holder_is_killed_too(
    place: tuple[str, Database], transactions: bool
) -> None:
    url, database = place
    opened(url, False).close()
    database["asi_state"].update_one({"_id": "lease"}, {"$set": KILLED | {"until": time.time() - 60}})
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(url)
    with client.start_session() as writer:
        lease = Lease(client.get_default_database(), "x", writer if transactions else None)
        with lease.hold(5) as hold:
            assert hold.broken and hold.marked
            # What it was to mend is for the next one, who sees no more than this document.
            found = database["asi_state"].find_one({"_id": "lease"})
            assert found is not None and found["broken"] is True
            hold.broken = False
    found = database["asi_state"].find_one({"_id": "lease"})
    assert found is not None and found["broken"] is False and found["until"] == 0.0
    client.close()


def test_whoever_sets_the_clock_of_a_machine_ends_no_lease(
    place: tuple[str, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = place
    opened(url, False).close()
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(url)
    holder, other = (Lease(client.get_default_database(), "x", None) for _ in range(2))
    with holder.hold(5):
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 3600)
        with pytest.raises(StoreBusyError), other.hold(0.2):
            pass
    client.close()


def test_a_renewal_that_comes_late_takes_nothing_back(place: tuple[str, Database]) -> None:
    url, database = place
    opened(url, False).close()
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(url)
    lease = Lease(client.get_default_database(), "x", None)
    with lease.hold(5) as hold:
        assert hold.renew()
    assert not hold.renew()
    found = database["asi_state"].find_one({"_id": "lease"})
    assert found is not None and found["until"] == 0.0, "nobody could write until it ran out"
    client.close()


def test_what_a_late_holder_wrote_is_mended_though_the_next_one_has_mended_before(place: tuple[str, Database]) -> None:
    url, database = place
    opened(url, False).close()
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(url)
    late, following = (Lease(client.get_default_database(), "x", None) for _ in range(2))
    with contextlib.ExitStack() as stood_still:
        stood_still.enter_context(late.hold(5))
        database["asi_state"].update_one({"_id": "lease"}, {"$set": {"until": time.time() - 60}})
        with following.hold(5) as hold:
            assert hold.broken
            hold.broken = False
            # It wakes up here, and has written beside the other.
            stood_still.close()
    for mended in (False, True):
        with following.hold(5) as hold:
            assert hold.broken is not mended
            hold.broken = False
    client.close()


def test_nobody_answers_from_doubtful_totals_while_everything_is_removed(
    place: tuple[str, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(place[0], False)
    store.write(partial(insert_below, None))
    gather = Draft.gather_state
    seen: list[int | None] = []

    def looked_at(self: Draft, name: str, value: Any) -> None:
        if name == "totals" and value["records"] == 0 and not seen:
            # All are removed, and the new totals were not sent.
            seen.append(counted(store))
        gather(self, name, value)

    def clear(session: Session) -> None:
        begin(session, doubtful=True)
        session.facts()
        session.clear()

    monkeypatch.setattr(Draft, "gather_state", looked_at)
    store.write(clear)
    assert seen == [None]
    assert counted(store) == 0 and broken(store, 50) == []
    store.close()
