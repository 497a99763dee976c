"""What is broken in a store that a server runs over: told by verify, mended by POST /repair and /faiss/rebuild."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pymongo
import pytest

from common.knobs import Database as DatabaseSettings
from database.invariants import broken
from database.store import open_store
from tests.database.db_service import BASELINE, Service, settled

KEY = {"Idempotency-Key": "once"}


def changed(service: Service, statement: str, update: Any) -> None:
    """Element 2, changed by SQL or, in MongoDB, by an update of its document."""
    if service.store.startswith("sqlite"):
        with closing(sqlite3.connect(service.store.removeprefix("sqlite:///"), isolation_level=None)) as connection:
            assert connection.execute(f"{statement} WHERE idx = 2").rowcount == 1
        return
    with pymongo.MongoClient(service.store) as client:
        documents = client.get_default_database()["data_elements"]
        assert documents.update_one({"index": 2}, update).modified_count == 1


def found(service: Service) -> list[int]:
    near = service.get("/elements/search-similar?motivation=gate+two&top_k=5")
    return sorted(element["index"] for element in near)


@pytest.mark.parametrize("route", ["/repair", "/faiss/rebuild"])
def test_what_lost_its_vectors_is_found_again(service: Service, route: str) -> None:
    for name in ("one", "two", "three"):
        service.add(name, motivation=f"gate {name}")
    settled(service)
    assert found(service) == [1, 2, 3]
    changed(service, "DELETE FROM vectors", {"$unset": {"asi.vector": ""}})
    service.post(route)
    settled(service)
    assert found(service) == [1, 2, 3]
    zeros = np.zeros(64, dtype="<f4").tobytes()
    changed(service, f"UPDATE vectors SET windows = x'{zeros.hex()}'", {"$set": {"asi.vector.windows": zeros}})
    service.post(route)
    settled(service)
    assert service.get("/elements/search-similar?motivation=gate+two&top_k=1")[0]["index"] == 2
    changed(service, "DELETE FROM sketches", {"$unset": {"asi.sketch": "", "asi.sketch_sequence": ""}})
    service.post(route)
    settled(service)
    store = open_store(DatabaseSettings(store=service.store), read_only=True)
    assert broken(store, 5) == []
    store.close()


def test_a_repeated_key_mends_nothing_again(service: Service) -> None:
    for name in ("one", "two", "three"):
        service.add(name, motivation=f"gate {name}")
    settled(service)
    first = service.post("/repair", headers=KEY)
    revision = service.get("/v2/elements/1/score")["revision"]
    assert service.post("/repair", headers=KEY) == first
    assert service.get("/v2/elements/1/score")["revision"] == revision
    service.post("/repair")
    assert service.get("/v2/elements/1/score")["revision"] > revision
    told = service.post("/faiss/rebuild", headers=KEY), service.post("/faiss/clean-orphans", headers=KEY)
    service.delete("/elements/by-index/3")
    changed(service, "DELETE FROM vectors", {"$unset": {"asi.vector": ""}})
    again = service.post("/faiss/rebuild", headers=KEY), service.post("/faiss/clean-orphans", headers=KEY)
    assert again == told
    assert service.get("/faiss/stats")["data"]["orphan_vectors"] == 2, "neither was done again"
    service.post("/repair")


def test_what_an_earlier_release_took_for_incomplete_is_not_removed(service: Service) -> None:
    result = {"train": "s,1\nx,4.5", "test": "m,a\nx,0.5,0.7"}
    for name in ("one", "two", "three"):
        service.add(name, result=result if name != "three" else result | {"test": "m,a\nx,"})
    changed(service, "UPDATE elements SET complete = 0", {"$set": {"asi.complete": False}})
    told = service.post("/elements/clean-invalid")["data"]
    assert (told["cleaned_count"], told["count_after"]) == (1, 2)
    assert service.get("/v2/stats")["incomplete"] == 0 and service.get("/elements/by-index/2")["name"] == "two"


BREAKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vector": ("data_elements", {"$unset": {"asi.vector": ""}}, "element 2: it has no vectors"),
    "zeros": (
        "data_elements",
        {"$set": {"asi.vector.windows": bytes(256)}},
        "element 2: its vectors are not of length",
    ),
    "sketch": ("data_elements", {"$unset": {"asi.sketch": ""}}, "element 2: expected a sketch"),
    "benchmark": ("data_elements", {"$set": {"asi.benchmark": 0.99}}, "element 2: its row says benchmark 0.99"),
    "loss": ("data_elements", {"$set": {"asi.loss": 1.5}}, "element 2: its row says loss 1.5"),
    "revision": ("data_elements", {"$set": {"asi.revision": 99}}, "element 2: its row says revision 99"),
    "evidence": ("data_elements", {"$set": {"asi.evidence": "{"}}, "element 2: its evidence cannot be read"),
    "hash": ("data_elements", {"$set": {"asi.program_sha256": "x"}}, "element 2: its program is not found"),
    "merged": ("asi_state", {"$set": {"value": "999"}}, "elements up to 999 are said to be merged"),
    "baseline": ("asi_baselines", {"$set": {"body": "{}"}}, "baselines: cpu-1: it cannot be read"),
    "usage": ("asi_usage", {"$set": {"body": "{}"}}, "usage: number 1: it cannot be read"),
    "event": ("asi_events", {"$set": {"data": "{"}}, "events: number 2: it cannot be read"),
    "missing event": ("asi_events", {}, "events: number 2: it is missing"),
}
NAMES = {"data_elements": {"index": 2}, "asi_state": {"_id": "merged_through"}, "asi_baselines": {"_id": "cpu-1"},
         "asi_usage": {"_id": 1}, "asi_events": {"_id": 2}}  # fmt: skip


@pytest.mark.services
def test_verify_finds_in_mongodb_what_it_finds_in_sqlite(place: tuple[str, Any], start: Callable[..., Service]) -> None:
    url, database = place
    service = start(store=url)
    service.client.put_baseline(BASELINE)
    for number in range(1, 4):
        service.add_experiment(number, None, 3.9, 0.5)
    service.post("/v2/usage", [{"role": "planner", "model": "m", "calls": 1}])
    service.post("/candidates/force-update")
    settled(service)
    for name, (collection, update, said) in BREAKS.items():
        sound = database[collection].find_one(NAMES[collection])
        assert sound is not None, name
        if update:
            database[collection].update_one(NAMES[collection], update)
        else:
            database[collection].delete_one(NAMES[collection])
        store = open_store(DatabaseSettings(store=url), read_only=True)
        told = broken(store, 50)
        store.close()
        assert [line for line in told if said in line], (name, told)
        assert all("restore a backup" in line or "POST /repair" in line for line in told), told
        database[collection].replace_one(NAMES[collection], sound, upsert=True)
    for name in ("vector", "zeros", "sketch", "benchmark", "loss", "revision", "evidence", "hash", "merged"):
        collection, update, _ = BREAKS[name]
        database[collection].update_one(NAMES[collection], update)
    service.post("/repair")
    settled(service)
    while service.client.stats()["stale_scores"]:
        pass
    store = open_store(DatabaseSettings(store=url), read_only=True)
    assert broken(store, 50) == []
    store.close()
