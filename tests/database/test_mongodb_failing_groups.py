"""What is left of a group of writes that failed without a transaction: nothing acknowledged goes, and no repetition is
told of what is not there."""

from __future__ import annotations

from functools import partial, partialmethod
from typing import Any

import pymongo
import pytest
from pymongo.errors import BulkWriteError, OperationFailure

from common.errors import StoreError
from common.records import Usage
from database.invariants import broken
from database.ledger import Recorded
from database.store import Session, Where
from tests.database.test_mongodb_writes import insert_below, opened, together, unfit

pytestmark = pytest.mark.services
USED = Usage(role="planner", model="m", calls=1)


def used_once(session: Session) -> str:
    """As the routes do it: with its key, once."""
    before = session.answer("POST /v2/usage", "key")
    if before is not None:
        return "before"
    session.ledger.put_usage([USED])
    session.put_answer("POST /v2/usage", "key", {})
    return "now"


def used(store: Recorded) -> list[int]:
    return [number for number, _ in store.read(lambda session: session.ledger.usage(0, 100))]


def test_an_answer_is_taken_back_with_what_it_speaks_of(place: tuple[str, Any]) -> None:
    store = opened(place[0], False)
    store.write(partial(insert_below, None))
    # The one that reads sends what was gathered before it.
    futures = together(store, [used_once, lambda session: len(session.facts(Where(parent=1))), unfit])
    assert futures[0].result(30) == "now"
    assert isinstance(futures[2].exception(30), UnicodeError)
    assert used(store) == [1]
    assert store.write(used_once) == "before" and used(store) == [1]
    assert broken(store, 50) == []
    store.close()


@pytest.mark.parametrize("failing", ["asi_state", "asi_answers", "asi_usage"])
@pytest.mark.parametrize("refused", [False, True], ids=["fails", "is refused"])
def test_a_repetition_after_an_error_is_never_told_of_what_is_not_there(
    place: tuple[str, Any], failing: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(place[0], False)
    store.write(partial(insert_below, None))
    collection = pymongo.collection.Collection
    writes = {"bulk_write": collection.bulk_write, "insert_many": collection.insert_many}
    errors: list[Exception] = []

    def failing_once(name: str, self: Any, documents: Any, **options: Any) -> Any:
        """As a server whose disk is full; or that refuses it, one by one, after it kept the first."""
        if self.name != failing or errors:
            return writes[name](self, documents, **options)
        if not refused:
            errors.append(OperationFailure("no space left", 14031))
        elif name == "bulk_write":
            kept = writes[name](self, documents[:1], **options).bulk_api_result
            errors.append(BulkWriteError(kept | {"writeErrors": [{"index": 1, "code": 14031, "errmsg": "no space"}]}))
        else:
            errors.append(BulkWriteError({"nInserted": 0, "writeErrors": [{"code": 14031, "errmsg": "no space"}]}))
        raise errors[0]

    for name in writes:
        monkeypatch.setattr(collection, name, partialmethod(partial(failing_once, name)))  # type: ignore[arg-type]
    futures = together(store, [used_once, partial(insert_below, 1)])
    for future in futures:
        assert future.exception(30) is None or isinstance(future.exception(30), StoreError)
    assert errors
    again = store.write(used_once)
    assert len(used(store)) >= 1, again
    if futures[0].exception() is None:
        assert (again, used(store)) == ("before", [1])
    store.write(lambda session: session.put_state("x", 1))
    assert broken(store, 50) == []
    store.close()


def test_what_another_holder_was_acknowledged_stays_when_one_that_stood_still_goes_on(
    place: tuple[str, Any],
) -> None:
    url, database = place
    store, other = opened(url, False), opened(url, False)
    kept: list[int] = []

    def stood_still(session: Session) -> None:
        session.ledger.put_usage([USED])
        # Its lease ran out meanwhile, and the other one wrote.
        database["asi_state"].update_one({"_id": "lease"}, {"$set": {"until": 1.0}})
        other.write(lambda session: session.ledger.put_usage([USED.model_copy(update={"model": "other"})]))
        kept.extend(used(other))

    with pytest.raises(StoreError, match="duplicate key"):
        store.write(stood_still)
    assert kept == [1]
    assert [one.model for _, one in other.read(lambda session: session.ledger.usage(0, 10))] == ["other"]
    store.close()
    other.close()


def test_what_another_holder_answered_from_is_not_taken_back(place: tuple[str, Any]) -> None:
    url, database = place
    store, other = opened(url, False), opened(url, False)
    told: list[str] = []

    def stood_still(session: Session) -> int:
        used_once(session)
        session.facts(Where(parent=1))
        database["asi_state"].update_one({"_id": "lease"}, {"$set": {"until": 1.0}})
        told.append(other.write(used_once))
        return unfit(session)

    with pytest.raises(UnicodeError):
        store.write(stood_still)
    assert told == ["before"], "the other holder has seen it"
    assert used(other) == [1]
    store.close()
    other.close()
