"""A store that is carried over answers as the first did: trees in any order of the lines, keys, usage, counters."""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.embeddings import EmbeddingClient
from common.errors import StoreError
from common.knobs import Database as DatabaseSettings
from common.records import Usage
from common.settings import Settings
from database.admin import main
from database.bulk import MOST_REFUSALS, Importer
from database.evaluate_agent.verdict import Verdict
from database.exporting import export_lines
from database.memory import Memory
from database.store import Session, open_store
from database.waiting import Waiting
from tests.database.db_service import Service, body_of, element_of, mongodb_server, run_of

Row = dict[str, Any]


def exported(service: Service) -> list[Row]:
    """The lines of an export, without the usage and the baselines of other tests, which outlive a removal."""
    rows = [json.loads(line) for line in service.http.get("/v2/export").text.splitlines()]
    return [row for row in rows if not {"usage", "baseline"} & row.keys()]


def text_of(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def send(service: Service, rows: list[Row], key: str | None = None, status: int = 200) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    answer = service.http.post("/v2/import", content=text_of(rows), headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()["data"] if status == 200 else answer.json()["detail"]


def moved_tree(service: Service) -> None:
    """Elements 1 to 7, of which 4 is gone; 2 was moved below 5, and the first below 7."""
    for number, parent in enumerate([None, 1, 2, 3, None, 2, None], 1):
        service.add(f"n{number}", parent)
    service.delete("/elements/by-index/4")
    service.post("/elements/2/set-parent", {"parent_index": 5})
    service.post("/elements/1/set-parent", {"parent_index": 7})
    service.add("below", 3)


def whole(service: Service) -> list[Row]:
    """Its elements by index: in an export those whose parent comes later follow it."""
    elements = [row["element"] for row in exported(service) if "element" in row]
    return sorted(elements, key=lambda element: int(element["index"]))


def fresh(service: Service, tmp_path: Path) -> str:
    """The URL of an empty store of the same kind."""
    if service.store.startswith("sqlite"):
        return f"sqlite:///{tmp_path}/fresh.sqlite"
    return f"{service.store.rpartition('/')[0]}/test_{uuid.uuid4().hex}"


def test_a_moved_subtree_is_carried_over_in_any_order_of_the_lines(service: Service) -> None:
    moved_tree(service)
    before = whole(service)
    assert [(row["index"], row["parent"]) for row in before] == [
        (1, 7), (2, 5), (3, 2), (5, None), (6, 2), (7, None), (8, 3),
    ]  # fmt: skip
    rows = exported(service)
    orders = [rows, rows[::-1]]
    for seed in range(2):
        orders.append(random.Random(seed).sample(rows, len(rows)))
    for order in orders:
        service.delete("/elements/all")
        since = service.get("/v2/events?limit=1")["last"]
        told = send(service, order, key="carry")
        assert (told["stored"], told["refused"]) == (len(before), [])
        assert whole(service) == before
        assert service.get("/v2/elements/1/score")["evidence"]["anchor"] is True
        # Again: nothing.
        assert send(service, order, key="carry")["stored"] == 0 and whole(service) == before
        added = [event for event in service.get(f"/v2/events?after={since}")["events"] if event["kind"] == "added"]
        assert len(added) == len(before)
        assert service.add("next") == 9
    # New indices elsewhere, the same tree.
    assert send(service, [row for row in rows[::-1] if "element" in row])["refused"] == []
    names = [element["name"] for element in service.get("/elements/roots")]
    assert sorted(names) == ["n5", "n5", "n7", "n7", "next"]
    copy = max(element["index"] for element in service.get("/elements/by-name/below"))
    assert [element["name"] for element in service.get(f"/elements/{copy}/path")] == ["n5", "n2", "n3", "below"]


def test_a_moved_subtree_is_restored(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved_tree(service)
    lines = tmp_path / "lines.jsonl"
    if service.store.startswith("mongodb"):
        assert main(["backup", str(lines), "--store", service.store]) == 0
    else:
        lines.write_text(service.http.get("/v2/export").text)
    store = fresh(service, tmp_path)
    assert main(["restore", str(lines), "--store", store]) == 0, capsys.readouterr().out
    assert "not in JSON Lines: events" in capsys.readouterr().out
    assert main(["verify", "--store", store]) == 0, capsys.readouterr().out
    restored = open_store(DatabaseSettings(store=store), read_only=True)
    found = restored.read(lambda session: session.elements([1, 2, 3, 4, 5, 6, 7, 8]))
    restored.close()
    assert [element.model_dump() for element in found] == whole(service)


def test_what_never_gets_its_parent_is_refused_by_its_line(service: Service) -> None:
    rows = [
        body_of("sound") | {"index": 1},
        body_of("of a cycle", 4) | {"index": 3},
        body_of("of a cycle", 3) | {"index": 4},
        body_of("below a cycle", 4) | {"index": 5},
        body_of("its own parent", 6) | {"index": 6},
        body_of("of nobody", 99) | {"index": 7},
        body_of("of one of nobody", 7),
        body_of("of one refused", 9) | {"index": 8},
        body_of("refused", result={}) | {"index": 9},
        body_of("late", 11) | {"index": 10},
        body_of("parent", 1) | {"index": 11},
    ]
    told = send(service, [{"element": row} for row in rows])
    assert told["stored"] == 3
    assert {refusal["line"]: refusal["reason"] for refusal in told["refused"]} == {
        2: "its parent 4 descends from it: a cycle of 3, 4",
        3: "its parent 3 descends from it: a cycle of 3, 4",
        4: "its parent 4 was refused",
        5: "it is its own parent",
        6: "its parent 99 is no element of the file",
        7: "its parent 7 was refused",
        8: "its parent 9 was refused",
        9: "expected result to hold the train and test CSV, got an empty result",
    }
    assert {element["index"]: element["parent"] for element in whole(service)} == {1: None, 10: 11, 11: 1}


def test_lines_that_wait_are_no_matter_of_memory(service: Service) -> None:
    """12 MB in reverse: more than is held in memory."""
    count = 30
    rows: list[Row] = [
        {"element": body_of(f"n{number}", number - 1 or None, log="x" * 400_000) | {"index": number}}
        for number in range(1, count + 1)
    ]
    assert send(service, rows[::-1])["stored"] == count
    assert [element["index"] for element in service.get(f"/elements/{count}/path")] == list(range(1, count + 1))


def test_lines_that_cannot_be_held_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", f"{tmp_path}/absent")
    waiting = Waiting()
    with pytest.raises(StoreError, match=r"free space in .*absent"):
        waiting.hold(1, 2, 3, {"element": "x" * (9 << 20)})


@pytest.mark.parametrize("by", ["import", "restore"])
def test_keys_and_usage_answer_as_before(
    service: Service, start: Callable[..., Service], tmp_path: Path, by: str
) -> None:
    element, gone, marked = element_of(1, None), element_of(2, None), f"model-{uuid.uuid4()}"
    usage = [Usage(role="planner", model=marked, calls=2, input_tokens=10).model_dump()]
    body = {"idempotency_key": "e1", "element": element.model_dump(), "run": run_of(element, 4.0, 0.5).model_dump()}
    removed = {"idempotency_key": "e2", "element": gone.model_dump(), "run": run_of(gone, 4.0, 0.5).model_dump()}
    keyed = {"headers": {"Idempotency-Key": "k"}}
    for number in range(4):
        service.add(f"filler {number}")
    assert service.post("/v2/experiments", body | {"usage": usage})["data"]["index"] == 5
    added = service.post("/elements", body_of("keyed", 5), **keyed)
    assert service.post("/v2/experiments", removed)["data"]["index"] == 7
    service.delete("/elements/by-index/7")
    answer = service.post("/v2/usage", usage, **keyed) if by == "restore" else None
    lines = tmp_path / "lines.jsonl"
    lines.write_text(service.http.get("/v2/export").text)
    spent = [row for row in service.get("/v2/usage/totals") if row["model"] == marked]
    if by == "import":
        service.delete("/elements/all")
        told = service.http.post("/v2/import", content=lines.read_bytes())
        assert told.status_code == 200 and told.json()["data"]["refused"] == []
        other = service
    else:
        store = fresh(service, tmp_path)
        assert main(["restore", str(lines), "--store", store]) == 0
        other = start(store=store)
        assert other.post("/v2/usage", usage, **keyed) == answer
    repeated = other.post("/v2/experiments", body)["data"]
    assert (repeated["index"], repeated["created"]) == (5, False)
    assert other.get("/v2/experiments/e1")["index"] == 5
    assert other.post("/elements", body_of("keyed", 5), **keyed) == added
    other.post("/elements", body_of("keyed", 1), 409, **keyed)
    late = other.post("/v2/experiments", removed)["data"]
    assert (late["index"], late["created"]) == (7, False), "removed, and not stored anew"
    assert [row for row in other.get("/v2/usage/totals") if row["model"] == marked] == spent, "once"
    assert other.add("next") == 8, "an index that was given is not given again"


def test_the_verdict_of_a_model_is_restored(service: Service, tmp_path: Path) -> None:
    """So that it is not asked, and paid, again."""
    first, store, lines = fresh(service, tmp_path / "first"), fresh(service, tmp_path), tmp_path / "lines.jsonl"
    settings = DatabaseSettings(store=first)
    memory = Memory(open_store(settings), EmbeddingClient(Settings()), settings)
    said = Verdict(
        model="m", basis="b", performance_score=6, innovation_score=7, complexity_score=8, reason="a second gate"
    )

    def judged(session: Session) -> None:
        memory.scores.choose(session, "m")
        known = session.evidence(2)
        assert known is not None
        evidence = known[0].model_copy(update={"verdict": said})
        session.set_evaluation(2, evidence, memory.scores.evaluate(session, evidence))

    for number in (1, 2):
        memory.add(element_of(number, None))
    memory.store.write(judged)
    lines.write_text("".join(export_lines(memory)))
    memory.close()
    assert main(["restore", str(lines), "--store", store]) == 0
    restored = open_store(DatabaseSettings(store=store), read_only=True)
    known = [restored.read(lambda session, index=index: session.evidence(index)) for index in (1, 2)]  # type: ignore[misc]
    restored.close()
    assert [each and each[0].verdict for each in known] == [None, said]


def test_lines_wait_for_no_commit_of_a_line_before(service: Service, tmp_path: Path) -> None:
    """A chain of parents, and their usage, can share one commit; there, too, what is below a refused one is refused."""
    settings = DatabaseSettings(store=fresh(service, tmp_path))
    memory = Memory(open_store(settings), EmbeddingClient(Settings()), settings)
    rows = [*rows_of([1, 2, 3, 4, 5], {2: 1, 3: 2, 4: 3, 5: 4}), *rows_of([6, 7, 8], {6: 1, 7: 6, 8: 7})]
    rows[0]["key"] = rows[5]["key"] = "experiments:k"
    rows += [{"usage": Usage(role="planner", model="m", calls=1, index=index).model_dump()} for index in (5, 7)]
    free, held = threading.Event(), threading.Event()

    def hold(_: Session) -> None:
        held.set()
        assert free.wait(60)

    def take() -> None:
        for number, row in enumerate(rows, 1):
            importer.value(number, row)

    importer = Importer(memory)
    blocked = memory.store.submit(hold)
    assert held.wait(10)
    lines = threading.Thread(target=take)
    lines.start()
    lines.join(10)
    waited = lines.is_alive()
    free.set()
    blocked.result(10)
    lines.join(60)
    importer.finish()
    parents = {one.index: one.parent for one in memory.store.read(lambda session: session.elements(range(1, 9)))}
    usage = memory.store.read(lambda session: session.ledger.usage(0, 10))
    memory.close()
    assert not waited, "a line waited for another's commit"
    assert parents == {1: None, 2: 1, 3: 2, 4: 3, 5: 4}
    assert {refusal.line: refusal.reason for refusal in importer.refused if refusal.line != 6} == {
        7: "its parent 6 was refused",
        8: "its parent 7 was refused",
    }
    assert [record.index for _, record in usage] == [5, None]


def test_of_very_many_refusals_the_first_are_named_and_the_rest_counted(service: Service) -> None:
    broken, candidates = "x\n" * (MOST_REFUSALS + 2), json.dumps({"candidates": [8, 9]})
    told = service.http.post("/v2/import", content=json.dumps(body_of("a")) + "\n" + broken + candidates).json()
    data = told["data"]
    assert (data["stored"], data["repeated"], data["left_out"]) == (1, 0, 0)
    assert [refusal["line"] for refusal in data["refused"]] == list(range(2, MOST_REFUSALS + 2))
    assert all(refusal["reason"].startswith("expected JSON") for refusal in data["refused"])
    assert data["more_refused"] == 4 and f"{MOST_REFUSALS + 4} are refused, 4 of them without" in told["message"]
    detail = service.http.post("/v2/import", content=broken + candidates).json()["detail"]
    assert detail.startswith("no line can be stored: line 1: expected JSON")
    assert detail.endswith(f"; and {MOST_REFUSALS + 4 - 10} more")
    # A name of whoever sent it, however long, is no reason to keep it.
    long = json.dumps({"usage": {"role": "r", "model": "m", "calls": 1, "x" * 100_000: 1, "failed": -1}})
    assert len(service.http.post("/v2/import", content=f"{json.dumps(body_of('b'))}\n{long}").text) < 2000


def test_a_store_that_holds_elements_takes_no_keys_of_another(service: Service) -> None:
    element = element_of(1, None)
    body = {"idempotency_key": "e1", "element": element.model_dump(), "run": run_of(element, 4.0, 0.5).model_dump()}
    service.post("/v2/experiments", body)
    service.post("/elements", body_of("keyed"), headers={"Idempotency-Key": "k"})
    rows = exported(service)
    told = service.http.post("/v2/import", content=text_of(rows)).json()
    assert told["data"] == {"stored": 2, "repeated": 0, "refused": [], "left_out": 3}
    assert "3 idempotency keys are left out" in told["message"]
    assert service.get("/v2/experiments/e1")["index"] == 1


HOSTILE: list[Row] = [
    {"element": body_of("x"), "key": "other:k"},
    {"element": body_of("x"), "key": ["experiments:k"]},
    {"element": body_of("x"), "key": "experiments:" + "k" * 400},
    {"answer": {"route": "body of", "key": "experiments:k", "body": 3}},
    {"answer": {"route": ["body of"], "key": "k", "body": {}}},
    {"answer": {"route": "import", "key": "hostile:1", "body": {"index": 1}}},
    {"answer": 7},
    {"usage": {"role": "r", "model": "m", "calls": -1}},
    {"usage": {"role": "r", "model": "m", "calls": 1}, "number": "1"},
    {"candidates": [], "last_index": 2**62},
]


def test_no_line_makes_a_store_answer_wrongly(service: Service) -> None:
    told = send(service, [*HOSTILE, {"element": body_of("sound")}], key="hostile")
    assert [refusal["line"] for refusal in told["refused"]] == list(range(1, len(HOSTILE) + 1)), told
    # What a route is to have answered is believed of a backup only; a note of a removed element that is none, never.
    service.delete("/elements/all")
    unbelieved = [
        {"answer": {"route": "POST /v2/usage", "key": "k", "body": {"message": 3, "data": "x"}}},
        {"answer": {"route": "removed under", "key": "experiments:k", "body": {"index": "x"}}},
        {"element": body_of("sound")},
    ]
    told = send(service, unbelieved)
    assert (told["stored"], told["left_out"]) == (1, 2)
    record = {"role": "r", "model": "m", "calls": 1}
    service.post("/v2/usage", [record], headers={"Idempotency-Key": "k"})
    service.get("/v2/experiments/k", 404)


def rows_of(indices: list[int], parents: dict[int, int]) -> list[Row]:
    return [{"element": body_of(f"n{index}", parents.get(index)) | {"index": index}} for index in indices]


def test_an_import_that_was_cut_off_goes_on_as_it_began(service: Service) -> None:
    rows = rows_of([10, 20, 30, 40, 50], {20: 40, 30: 10})
    # The first time its end did not come.
    told = send(service, rows[:3], key="cut")
    assert told["stored"] == 2 and [refusal["line"] for refusal in told["refused"]] == [2]
    told = send(service, rows, key="cut")
    assert (told["stored"], told["repeated"], told["refused"]) == (3, 2, [])
    assert {element["index"]: element["parent"] for element in whole(service)} == {
        10: None, 20: 40, 30: 10, 40: None, 50: None,
    }  # fmt: skip
    # With another text nothing is taken, as on every other route.
    other = [*rows[:3], {"element": rows[3]["element"] | {"log": "another"}}, *rows_of([60], {})]
    since = service.get("/v2/events?limit=1")["last"]
    assert "'cut' was used before" in (said := send(service, other, key="cut", status=409)) and "line 4" in said
    told = service.get(f"/v2/events?after={since}")["events"]
    assert not [event for event in told if event["kind"] == "added"]
    # An index that an element had since the import began is not given again.
    service.delete("/elements/by-index/50")
    told = send(service, [*rows, *rows_of([45, 50, 70], {})], key="cut")
    assert told["refused"] == [{"line": 7, "reason": "expected an index of its own, a positive integer, got 50"}]
    assert sorted(element["index"] for element in whole(service)) == [10, 20, 30, 40, 51, 70]


@pytest.fixture(
    params=[pytest.param("sqlite", marks=pytest.mark.slow), pytest.param("mongodb", marks=pytest.mark.services)]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/database.sqlite"
        return
    with mongodb_server() as url:
        yield f"{url}/test_{uuid.uuid4().hex}"


def test_the_same_import_again_after_kills_in_its_middle_is_the_whole(
    place: str, start: Callable[..., Service], capsys: pytest.CaptureFixture[str]
) -> None:
    count = 150
    parents = {index: index - 1 for index in range(2, count + 1)} | {2: 40, 3: 120, 100: 101, 101: 1}
    rows = rows_of(list(range(1, count + 1)), parents)
    key = {"Idempotency-Key": "killed"}
    service = start(store=place)

    def slowly() -> Iterator[bytes]:
        for row in rows:
            yield text_of([row]).encode()
            time.sleep(0.001)

    def bring() -> None:
        with pytest.raises(httpx.TransportError):
            httpx.post(service.url + "/v2/import", content=slowly(), headers=key, timeout=120, trust_env=False)

    # The next start waits for the lease of who was killed, where there is one.
    kills = [20, 50, 90] if place.startswith("sqlite") else [50]
    for reached in kills:
        client = threading.Thread(target=bring)
        client.start()
        while len(service.get("/v2/elements?limit=500")["elements"]) < reached:
            assert client.is_alive()
            time.sleep(0.005)
        service.kill()
        client.join()
        service = start(store=place)
    told = service.http.post("/v2/import", content=text_of(rows), headers=key, timeout=120).json()["data"]
    assert told["refused"] == [] and told["repeated"] >= kills[-1] and told["stored"] + told["repeated"] == count
    assert {element["index"]: element["parent"] for element in whole(service)} == {1: None} | parents
    assert service.stop() == 0
    assert main(["verify", "--store", place]) == 0, capsys.readouterr().out
