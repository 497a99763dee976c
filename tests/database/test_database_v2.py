"""Routes beyond the published ones: pages and filters, records, events and their stream, import and export."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.database_inserts import cpu_seconds
from common.files import sha256_text
from common.records import Usage
from database.ledger import Recorded, _Recorder
from database.sqlite_database import SqliteStore
from database.store import Session
from tests.database.db_service import BASELINE, Service, body_of, element_of, run_of, settled


def lines(service: Service) -> list[dict[str, Any]]:
    answer = service.http.get("/v2/export")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def send(service: Service, *rows: object, key: str | None = None, raw: bytes = b"") -> dict[str, Any]:
    content = raw + b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    headers = {} if key is None else {"Idempotency-Key": key}
    answer = service.http.post("/v2/import", content=content, headers=headers)
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def test_listing_filters_and_goes_on_from_its_cursor(service: Service) -> None:
    service.client.put_baseline(BASELINE)
    for number in range(1, 6):
        service.add_experiment(number, None if number == 1 else 1, 4.0, 0.5)
    service.add("delta_net_1", result={"train": "s,1\nx,", "test": "m,a\nx,0.5"})

    def walk(query: str) -> list[int]:
        found, after = [], 0
        while after is not None:
            page = service.get(f"/v2/elements?after={after}&limit=2&{query}")
            found += [element["index"] for element in page["elements"]]
            after = page["next"]
        return found

    assert walk("") == [1, 2, 3, 4, 5, 6]
    assert walk("name=delta_net_1") == [1, 6] and walk("parent=1") == [2, 3, 4, 5] and walk("roots=true") == [1, 6]
    assert walk("published=true") == walk("incomplete=true") == [6]
    assert walk("baseline_key=cpu-1&roots=true") == [1] and walk("name=nobody") == []
    runs = service.get("/v2/runs?limit=3&profile=cpu")
    assert [row["index"] for row in runs["runs"]] == [1, 2, 3] and runs["next"] == 3
    assert service.get("/v2/runs?after=3")["next"] is None
    assert service.get("/v2/runs?status=failed")["runs"] == service.get("/v2/runs?profile=20m")["runs"] == []


def test_records_of_an_element(service: Service) -> None:
    element = element_of(1, None)
    run = run_of(element, 3.9, 0.55)
    check = {"name": "causality", "passed": True, "severity": "refuse", "detail": "", "counterexample": None}
    one = {"value": 3.0, "n": 7, "se": 0.5}
    body = run.model_dump() | {
        "checks": [check],
        "benchmarks": {"induction": {"value": 0.6, "n": 100, "se": 0.05, "bits_per_byte": one}},
        "perplexities": {"wikitext": one},
        "train_loss": {"1": 10.5, "2": 4.0},
        "validation_loss": {"1": 10.0, "2": 4.25},
        "learning_curve": one,
        "efficiency": {"decode": one, "prefill": {"128": one}},
    }
    service.post("/v2/experiments", {"idempotency_key": "a", "element": element.model_dump(), "run": body})
    service.add("same program", program=element.program)
    assert service.get("/v2/elements/1/checks") == [check | {"run_id": run.run_id, "seconds": None}]
    measured = {row["name"]: row for row in service.get("/v2/elements/1/measurements")}
    elsewhere = {"learning_curve", "perplexities.wikitext", "efficiency.decode", "efficiency.prefill.128"}
    elsewhere |= {"induction.bits_per_byte"}
    assert set(measured) == {"heldout_loss", "benchmark_mean", "induction"} | elsewhere
    assert {(measured[name]["value"], measured[name]["n"], measured[name]["se"]) for name in elsewhere} == {
        (3.0, 7, 0.5)
    }
    (told,) = service.get("/v2/runs")["runs"]
    assert told["run"]["train_loss"] == body["train_loss"] and told["run"]["validation_loss"] == body["validation_loss"]
    assert (measured["induction"]["n"], measured["induction"]["se"], measured["induction"]["seed"]) == (100, 0.05, 0)
    assert service.get("/v2/elements/2/checks") == service.get("/v2/elements/2/measurements") == []
    for path in ("runs", "checks", "measurements"):
        service.get(f"/v2/elements/9/{path}", 404)
    sha256 = sha256_text(element.program)
    assert service.get(f"/v2/programs/{sha256}") == {"sha256": sha256, "program": element.program, "indices": [1, 2]}
    service.delete("/elements/by-index/1")
    assert service.get(f"/v2/programs/{sha256}")["indices"] == [2]
    service.delete("/elements/all")
    service.get(f"/v2/programs/{sha256}", 404)
    service.get("/v2/programs/xyz", 422)


def whole_usage(service: Service) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after = 0
    while after is not None:
        page = service.get(f"/v2/usage?after={after}&limit=500")
        found, after = found + page["usage"], page["next"]
    return found


def test_usage_is_kept_once_and_summed(service: Service) -> None:
    before = {(row["role"], row["model"]): row for row in service.get("/v2/usage/totals")}
    assert ("planner", "m-of-test") not in before
    records = [
        Usage(role="planner", model="m-of-test", calls=2, input_tokens=10, output_tokens=5, seconds=1.5, cost=0.25),
        Usage(role="planner", model="m-of-test", calls=1, failed=1, seconds=0.5, cost=0.5, index=7),
        Usage(role="judge", model="m-of-test", calls=1),
    ]
    for _ in range(2):
        service.client.add_usage(records, f"usage-{id(records)}")
    totals = {row["role"]: row for row in service.get("/v2/usage/totals") if row["model"] == "m-of-test"}
    assert totals["planner"] == {
        "role": "planner", "model": "m-of-test", "calls": 3, "failed": 1, "input_tokens": 10, "output_tokens": 5,
        "seconds": 2.0, "cost": 0.75,
    }  # fmt: skip
    assert totals["judge"]["cost"] is None
    # With an experiment it is kept in the same write, under the element's index, once.
    element = element_of(1, None)
    for _ in range(2):
        found = service.client.add_experiment("spent", element, run_of(element, 4.0, 0.5), records[:1])
    kept = [record for record in whole_usage(service) if (record["model"], record["index"]) == ("m-of-test", 1)]
    assert found.index == 1 and kept == [records[0].model_dump() | {"index": 1}]
    page = service.get("/v2/usage?limit=2")
    assert len(page["usage"]) == 2 and len(service.get(f"/v2/usage?after={page['next']}")["usage"]) >= 1
    service.post("/v2/usage", [records[0].model_dump() | {"calls": -1}], 422)


def test_each_change_is_an_event_in_order(service: Service) -> None:
    start = service.get("/v2/events?limit=1")["last"]
    service.client.put_baseline(BASELINE)
    for number in (1, 2, 3):
        service.add_experiment(number, None if number == 1 else 1, 4.0, 0.5)
    service.client.add_candidate(2)
    service.post("/elements/3/set-parent", {"parent_index": 2})
    service.post("/elements/3/set-parent", {"parent_index": 3}, 400)
    service.delete("/elements/by-index/2")
    service.delete("/elements/all")
    events = service.get(f"/v2/events?after={start}&limit=1000")["events"]
    assert [event["id"] for event in events] == list(range(start + 1, start + 1 + len(events))), "no gap, none twice"
    found = [(event["kind"], event["index"]) for event in events]
    assert [item for item in found if item[0] == "added"] == [("added", 1), ("added", 2), ("added", 3)]
    assert ("scored", 2) in found and found.index(("added", 2)) < found.index(("scored", 2))
    scores = [event["data"]["score"] for event in events if (event["kind"], event["index"]) == ("scored", 2)]
    assert scores[-1] is not None
    moved = [event["data"]["parent"] for event in events if event["kind"] == "parent"]
    assert moved == [2, 1], "set by hand, then to the grandparent"
    changed = [event["data"] for event in events if event["kind"] == "candidates"]
    assert {"added": [2], "removed": []} in changed and {"added": [], "removed": [2]} in changed
    assert found[-1] == ("cleared", None)
    page = service.get(f"/v2/events?after={start}&limit=2")
    assert page["next"] == start + 2 and page["oldest"] >= 1
    assert service.get(f"/v2/events?after={page['last']}")["events"] == []
    assert service.client.events(start, 1).events[0].id == start + 1


def test_old_events_are_let_go_and_the_rest_has_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("database.ledger._TRIM_EVERY", 4)
    store = Recorded(SqliteStore(f"{tmp_path}/a.sqlite"), kept=10)
    for _ in range(30):
        store.write(lambda session: session.put_baseline(BASELINE))
    oldest, last = store.read(lambda session: session.ledger.event_span())
    kept = [event.id for event in store.read(lambda session: session.ledger.events(0, 100))]
    assert kept == list(range(oldest, 31)) and last == 30 and 10 <= len(kept) <= 10 + 4
    store.close()


def test_the_stream_tells_what_happens_and_goes_on_after_a_cut(service: Service) -> None:
    def follow(count: int, **kwargs: Any) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        with httpx.stream("GET", service.url + "/v2/events/stream", timeout=20, trust_env=False, **kwargs) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            ready.set()
            event: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if line:
                    event[name] = value
                elif "data" in event:
                    found.append(event)
                    event = {}
                    if len(found) == count:
                        break
        return found

    ready = threading.Event()
    last = service.get("/v2/events?limit=1")["last"]
    gap, after = follow(1, params={"after": last + 1000}), service.get(f"/v2/events?after={last + 1000}")
    assert (gap[0]["event"], gap[0]["id"], after["next"]) == ("gap", str(last), last), "as after a restore"
    assert json.loads(gap[0]["data"])["last"] == last
    ready.clear()
    heard: list[dict[str, str]] = []
    listener = threading.Thread(target=lambda: heard.extend(follow(1)))
    listener.start()
    assert ready.wait(10)  # what it has seen is fixed before the first bytes of the answer
    service.add("while listening")
    listener.join(20)
    assert heard[0]["event"] == "added" and json.loads(heard[0]["data"])["data"]["name"] == "while listening"
    service.add("while away")
    again = follow(1, headers={"Last-Event-ID": heard[0]["id"]})
    while again[-1]["event"] != "added":
        again = follow(1, params={"after": again[-1]["id"]})
    assert json.loads(again[-1]["data"])["data"]["name"] == "while away"


def test_the_stream_tells_of_events_that_are_gone_and_a_stop_waits_for_no_listener(
    tmp_path: Path, start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("database.ledger._TRIM_EVERY", 4)
    store = Recorded(SqliteStore(f"{tmp_path}/database.sqlite"), kept=10)
    for _ in range(30):
        store.write(lambda session: session.put_baseline(BASELINE))
    oldest, last = store.read(lambda session: session.ledger.event_span())
    store.close()
    service = start()

    def begins(after: int) -> list[str]:
        url = f"{service.url}/v2/events/stream?after={after}"
        with httpx.stream("GET", url, timeout=20, trust_env=False) as answer:
            return [line for line, _ in zip(answer.iter_lines(), range(7), strict=False)]

    assert oldest > 4
    found = begins(3)
    assert found[:4] == ["event: gap", f'data: {{"oldest": {oldest}, "last": {last}}}', f"id: {oldest - 1}", ""]
    assert found[4] == "event: baseline" and found[6] == f"id: {oldest}", "and goes on from there"
    assert begins(oldest - 1)[0] == "event: baseline"
    with httpx.stream("GET", service.url + "/v2/events/stream", timeout=20, trust_env=False) as answer:
        assert service.stop() == 0
        # Waited for in vain, it would be cut off: an error to who reads it, and the server would say so.
        assert "".join(answer.iter_lines()) == ""
    assert "Cancel" not in service.log.read_text()


def test_many_listeners_to_whom_nothing_happens_cost_next_to_nothing(service: Service) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(100)]
        for listener in listeners:
            listener.sendall(b"GET /v2/events/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for listener in listeners:
            listener.settimeout(20)
            assert listener.recv(4096).startswith(b"HTTP/1.1 200")
        used = cpu_seconds(service.process.pid)
        time.sleep(2)
        used = cpu_seconds(service.process.pid) - used
        assert used < 0.1, "seconds of CPU in two seconds"
        service.add("heard by all")
        for listener in listeners:
            assert b"heard by all" in listener.recv(4096)


def test_export_and_import_carry_a_whole_store_over(service: Service, start: Callable[..., Service]) -> None:
    service.client.put_baseline(BASELINE)
    for number in range(1, 5):
        service.add_experiment(number, None if number == 1 else number - 1, 4.0 - 0.02 * number, 0.5)
    service.add("published", 4)
    service.delete("/elements/by-index/2")
    service.post("/candidates/force-update")
    # Baselines outlive a removal of all elements: those of other tests are left out.
    out = [row for row in lines(service) if row.get("baseline", {}).get("key", BASELINE.key) == BASELINE.key]
    # So does usage. Under the removed element's key lies a note.
    out = [row for row in out if "usage" not in row]
    assert [next(iter(row)) for row in out] == ["answer", "baseline", *["element"] * 4, "candidates"]
    other = start()
    assert send(other, *out, key="carry") == {"stored": 6, "repeated": 0, "refused": [], "left_out": 0}
    # Again it changes nothing, whatever became of the set meanwhile.
    other.delete("/candidates/all")
    since = other.get("/v2/events?limit=1")["last"]
    assert send(other, *out, key="carry") == {"stored": 0, "repeated": 6, "refused": [], "left_out": 0}
    assert other.get("/candidates/all") == []
    told = [event["kind"] for event in other.get(f"/v2/events?after={since}")["events"]]
    assert not set(told) & {"candidates", "added", "baseline"}
    other.post("/candidates/force-update")
    for index in (1, 3, 4, 5):
        assert other.get(f"/elements/by-index/{index}") == service.get(f"/elements/by-index/{index}")
        assert other.get(f"/v2/elements/{index}/runs") == service.get(f"/v2/elements/{index}/runs")
    assert lines(other)[-1]["candidates"] == out[-1]["candidates"]
    # The nearest of element 3 is gone and in no line: what was measured against it is.
    settled(other)
    for index in (1, 3, 4, 5):
        scores = [each.get(f"/v2/elements/{index}/score") | {"revision": None} for each in (service, other)]
        assert scores[0] == scores[1] and scores[0]["score"] is not None
    assert service.get("/v2/elements/3/score")["evidence"]["novelty"]["motivation_index"] == 2
    for path in ("/candidates/all", "/v2/elements"):
        assert other.get(path) == service.get(path)
    assert other.add("next") == 6
    # Into a store that holds something: new indices, the same tree.
    again = send(service, *(row for row in out if "element" in row))
    assert again["stored"] == 4 and again["left_out"] == 3
    assert [element["index"] for element in service.get("/elements/9/path")] == [6, 7, 8, 9]
    assert other.stop() == 0


def test_each_refused_line_is_named_with_its_reason(service: Service) -> None:
    element = body_of("x") | {"index": 1}
    wrong_run = run_of(element_of(1, None), 4.0, 0.5).model_dump()
    data = send(
        service,
        body_of("bare"),
        {"element": element},
        {"element": element},
        {"element": body_of("y") | {"parent": 99}},
        {"element": body_of("child") | {"index": 4, "parent": 1}},
        {"element": body_of("z"), "runs": [wrong_run]},
        {"element": {"name": "incomplete"}},
        [1],
        {"element": body_of("w") | {"result": {}}},
        {"element": body_of("v") | {"index": True, "parent": {"$gt": ""}}},
        {"candidates": [1, 77]},
        raw=b"{broken\n\n" + b"[" * 100_000 + b"\n\xff\xfe\n",
    )
    reasons = {refusal["line"]: refusal["reason"] for refusal in data["refused"]}
    assert data["stored"] == 3 and sorted(reasons) == [1, 3, 4, 7, 8, 10, 11, 12, 13, 14, 15]
    assert (
        "JSON" in reasons[1] and "recursion" in reasons[3] and "of its own" in reasons[7] and "parent 99" in reasons[8]
    )
    assert "program_sha256" in reasons[10] and "motivation" in reasons[11] and "empty result" in reasons[13]
    assert "candidate 77" in reasons[15]
    child = service.get("/elements/by-name/child")[0]
    assert service.get(f"/elements/by-index/{child['parent']}")["name"] == "x"


@pytest.mark.parametrize("index", [2**63 - 1, 2**80, 0, -5, 1.5, "1"])
def test_no_index_of_a_file_spoils_the_counter(service: Service, index: object) -> None:
    send(service, {"element": body_of("x") | {"index": index}}, {"element": body_of("y")})
    assert service.add("next") <= 3


def test_a_long_import_is_read_line_by_line(start: Callable[..., Service]) -> None:
    service = start(env={"ASI_DATABASE__MAX_BODY_MB": "1"})
    rows = [{"element": body_of(f"n{number}", log="x" * 100_000) | {"index": number}} for number in range(1, 31)]
    rows[3]["element"]["log"] = "x" * 1_200_000  # type: ignore[index]
    data = send(service, *rows)
    assert data["stored"] == 29 and data["refused"][0]["line"] == 4 and "1048576" in data["refused"][0]["reason"]
    assert service.get("/elements/by-index/30")["name"] == "n30"


def test_every_change_of_a_session_is_an_event_or_known_to_be_none() -> None:
    told = {name for name in vars(_Recorder) if not name.startswith("_")} - {"flush"}
    silent = {"put_answer", "put_sketch", "put_state", "put_windows", "set_complete"}
    changes = {name for name in vars(Session) if re.match("insert|set_|put_|delete|clear", name)}
    assert changes == told | silent


def test_fingerprints_are_any_text(service: Service) -> None:
    texts = ["a", "a/b", "a/../b", "/", "a\0b", "a\0c", "\0", "a\\u0000b", "a\nb", "é%2F"]
    texts += texts[:5]
    for number, fingerprint in enumerate(texts, 1):
        element = element_of(number, None)
        # A NUL elsewhere in the record is none of the fingerprint's.
        run = run_of(element, 4.0, 0.5).model_copy(update={"fingerprint": fingerprint, "git_commit": f"\0{number}"})
        service.client.add_experiment(f"key {number}", element, run)
    for fingerprint in {*texts, "", "b", "a\0"}:
        expected = [number for number, text in enumerate(texts, 1) if text == fingerprint]
        assert service.client.with_fingerprint(fingerprint) == expected, fingerprint
