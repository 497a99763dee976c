"""Exports and imports while others move and remove: what comes out can be restored whole, and nothing that comes in
hangs below what it does not belong to."""

from __future__ import annotations

import json
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from common.knobs import Database as DatabaseSettings
from database.admin import main
from database.forest import Forest, parents_first, read_forest
from database.store import Session, Store, open_store
from tests.database.db_service import Service, body_of

Row = dict[str, Any]
REMOVED = "all elements were removed while the lines came: send the whole file again"
COUNT = 110
"""Three pages of an export."""


def text_of(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def send(service: Service, rows: Sequence[Row]) -> Row:
    answer = service.http.post("/v2/import", content=text_of(rows), timeout=120)
    assert answer.status_code == 200, answer.text
    data: Row = answer.json()["data"]
    return data


def fill(service: Service, parents: dict[int, int]) -> None:
    """Elements 1 to COUNT, each so large that a page of them is more than a connection holds that nobody reads."""
    log = "x" * 120_000
    rows = [body_of(f"n{index}", parents.get(index), log=log) | {"index": index} for index in range(1, COUNT + 1)]
    assert send(service, rows)["stored"] == COUNT


def exported(service: Service, meanwhile: Callable[[], Any]) -> bytes:
    """An export that is read after its first bytes only when `meanwhile` was done: its first page is fixed then."""
    small = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)])
    with (
        httpx.Client(base_url=service.url, timeout=60, transport=small) as client,
        client.stream("GET", "/v2/export") as answer,
    ):
        parts = answer.iter_raw(1 << 16)
        first = next(parts)
        meanwhile()
        return first + b"".join(parts)


def restored(service: Service, text: bytes, folder: Path) -> dict[int, Any]:
    """The elements of a store of the same kind, after a restore that refuses nothing and holds."""
    store = f"sqlite:///{folder}/fresh.sqlite"
    if service.store.startswith("mongodb"):
        store = f"{service.store.rpartition('/')[0]}/test_{uuid.uuid4().hex}"
    lines = folder / "lines.jsonl"
    lines.write_bytes(text)
    assert main(["restore", str(lines), "--store", store]) == 0
    assert main(["verify", "--store", store]) == 0
    opened = open_store(DatabaseSettings(store=store), read_only=True)
    found = opened.read(lambda session: session.elements(range(1, 2 * COUNT)))
    opened.close()
    return {element.index: element for element in found}


def test_an_export_is_restored_whole_whatever_is_moved_and_removed_meanwhile(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 2, and what lies below it, below the last one, which is removed before its page, as is 90; 6 after it.
    parents = {2: COUNT, 3: 2, 4: 3, COUNT: 5, 60: 6, 91: 90, 92: 91}
    fill(service, parents)
    service.post("/elements/1/set-parent", {"parent_index": 80})

    def others() -> None:
        service.delete(f"/elements/by-index/{COUNT}")
        service.delete("/elements/by-index/90")
        service.delete("/elements/by-index/6")
        # Two change places.
        service.post("/elements/1/set-parent", {"parent_index": None})
        service.post("/elements/80/set-parent", {"parent_index": 1})
        # Below what is new, and in the set beside it.
        new = service.add("new", log="y")
        service.post("/elements/70/set-parent", {"parent_index": new})
        service.post("/candidates/force-update")
        service.delete(f"/elements/by-index/{service.add('newer', new)}")

    found = restored(service, exported(service, others), tmp_path)
    assert found.keys() >= set(range(1, COUNT)) - {90}, "nobody removed these"
    assert not found.keys() - set(range(1, COUNT + 1)), "the tree is that of the beginning"
    assert {index: one.parent for index, one in found.items() if one.parent} == {
        1: 80, 2: 5, 3: 2, 4: 3, 60: 6, 92: 91,
    }  # fmt: skip
    assert capsys.readouterr().out.count(" 0 refused") == 1


def test_an_export_holds_nothing_of_after_a_removal_of_everything(service: Service, tmp_path: Path) -> None:
    """Which has the same indices anew."""
    fill(service, {index: index - 1 for index in range(2, COUNT + 1)})

    def others() -> None:
        service.delete("/elements/all")
        fill_small = [body_of(f"other {index}") | {"index": index} for index in range(1, COUNT + 1)]
        assert send(service, fill_small)["stored"] == COUNT
        service.post("/candidates/force-update")

    text = exported(service, others)
    found = restored(service, text, tmp_path)
    assert list(found) == list(range(1, len(found) + 1)) and 0 < len(found) < COUNT
    assert {one.name for one in found.values()} == {f"n{index}" for index in found}
    assert {index: one.parent for index, one in found.items()} == {index: index - 1 or None for index in found}
    assert json.loads(text.splitlines()[-1]) == {"candidates": [], "merged_through": 0, "last_index": COUNT}


def rows_of(indices: Sequence[int], parents: dict[int, int]) -> list[Row]:
    return [{"element": body_of(f"n{index}", parents.get(index)) | {"index": index}} for index in indices]


def imported(
    service: Service, rows: Sequence[Row], half: int, meanwhile: Callable[[], Any], key: str | None = None
) -> Row:
    """What an import answers of which `half` the rows are stored when `meanwhile` is done and the rest is sent."""
    before = service.get("/stats")["total_records"]

    def body() -> Iterator[bytes]:
        yield text_of(rows[:half])
        deadline = time.monotonic() + 30
        while service.get("/stats")["total_records"] < before + half:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        meanwhile()
        yield text_of(rows[half:])

    headers = {} if key is None else {"Idempotency-Key": key}
    answer = httpx.post(service.url + "/v2/import", content=body(), headers=headers, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    data: Row = answer.json()["data"]
    return data


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("key", [None, "import"])
def test_nothing_of_an_import_goes_on_after_a_removal_of_everything(
    service: Service, held: int, key: str | None
) -> None:
    for _ in range(held):
        service.add("held")
    usage = {"usage": {"role": "planner", "model": f"model-{uuid.uuid4()}", "calls": 1, "index": 1}}
    tree = rows_of(range(1, 9), {5: 1, 6: 2, 7: 5})
    rows = [*tree, usage, {"candidates": [1, 5]}]

    def others() -> None:
        service.delete("/elements/all")
        for number in range(6):
            service.add(f"another's {number}")

    told = imported(service, rows, 4, others, key)
    assert told["stored"] == 4
    assert [(refusal["line"], refusal["reason"]) for refusal in told["refused"]] == [
        *((line, REMOVED) for line in range(5, 10)),
        (10, "candidate 5 was refused"),
        (10, REMOVED),
    ]
    elements = service.get("/v2/elements")["elements"]
    assert [(one["name"], one["parent"]) for one in elements] == [(f"another's {number}", None) for number in range(6)]
    assert not [one for one in service.get("/v2/usage/totals") if one["model"] == usage["usage"]["model"]]
    # Sent again, it is taken.
    headers = {} if key is None else {"Idempotency-Key": key}
    again = service.http.post("/v2/import", content=text_of(rows), headers=headers).json()["data"]
    assert (again["stored"], again["refused"]) == (len(tree) + 1, [])
    names = {one["index"]: one["name"] for one in service.get("/v2/elements")["elements"]}
    parents = {one["name"]: names.get(one["parent"]) for one in service.get("/v2/elements")["elements"]}
    assert (parents["n5"], parents["n6"], parents["n7"]) == ("n1", "n2", "n5")


@pytest.mark.parametrize("held", [0, 3])
def test_an_import_goes_on_while_single_elements_are_removed(service: Service, held: int) -> None:
    others = [service.add(f"another's {number}") for number in range(held)]
    rows = rows_of(range(11, 21), {15: 11, 16: 12, 17: 15, 18: 16})

    def remove() -> None:
        for index in others:
            service.delete(f"/elements/by-index/{index}")
        service.delete("/elements/by-name/n12")
        service.delete("/elements/by-name/n14")

    told = imported(service, rows, 4, remove)
    # By the indices of the file, whatever they became here.
    assert {refusal["line"]: refusal["reason"] for refusal in told["refused"]} == {
        6: "its parent 12 was removed since it was stored",
        8: "its parent 16 was refused",
    }
    assert told["stored"] == 8
    names = {one["index"]: one["name"] for one in service.get("/v2/elements")["elements"]}
    parents = {one["name"]: names.get(one["parent"]) for one in service.get("/v2/elements")["elements"]}
    assert parents == {
        "n11": None, "n13": None, "n15": "n11", "n17": "n15", "n19": None, "n20": None,
    }  # fmt: skip


class Changing:
    """A store whose reads are no snapshot: each read of parents finds what the next of `scenes` says."""

    snapshots = False

    def __init__(self, *scenes: dict[int, int | None]) -> None:
        self.scenes = list(scenes)

    def state(self, name: str) -> None:
        return None

    def parents(self, indices: Sequence[int] | None = None) -> dict[int, int | None]:
        scene = self.scenes.pop(0) if len(self.scenes) > 1 else self.scenes[0]
        return {index: parent for index, parent in scene.items() if indices is None or index in indices}

    def read(self, work: Callable[[Session], Any]) -> Any:
        return work(cast(Session, self))


def forest_of(*scenes: dict[int, int | None]) -> Forest:
    return read_forest(cast(Store, Changing(*scenes)))


def test_what_a_reading_found_of_several_moments_is_read_again() -> None:
    # 2 was below 9, which was removed before it was come to; 3 was moved below what is new.
    first: dict[int, int | None] = {1: None, 2: 9, 3: 10, 4: 2}
    then: dict[int, int | None] = {1: None, 2: 1, 3: 10, 4: 2, 10: 1}
    assert forest_of(first, then) == Forest(then, [1, 2, 4, 10, 3], None)
    # Two changed places, and one below them is gone.
    circle: dict[int, int | None] = {1: 2, 2: 1, 3: 2, 4: 3}
    assert forest_of(circle, {1: None, 2: 1, 4: 2}).parents == {1: None, 2: 1, 4: 2}


def test_what_never_fits_together_becomes_a_root() -> None:
    broken: dict[int, int | None] = {1: None, 2: 9, 3: 4, 4: 3, 5: 4, 6: 6, 7: 2}
    found = forest_of(broken)
    assert found.parents == {1: None, 2: None, 3: 4, 4: None, 5: 4, 6: None, 7: 2}
    assert found.order == [1, 2, 4, 3, 5, 6, 7]


@pytest.mark.parametrize("seed", range(20))
def test_parents_are_first_and_all_else_is_by_index(seed: int) -> None:
    rng = random.Random(seed)
    indices = rng.sample(range(1, 60), 30)
    parents: dict[int, int | None] = {index: rng.choice([None, *indices[:at]]) for at, index in enumerate(indices)}
    order, left = parents_first(parents)
    assert not left and sorted(order) == sorted(parents)
    at = {index: place for place, index in enumerate(order)}
    for index, parent in parents.items():
        assert parent is None or at[parent] < at[index]
    tree: dict[int, int | None] = {index: rng.choice([None, *range(1, index)]) for index in range(1, 40)}
    assert parents_first(tree)[0] == sorted(tree)
