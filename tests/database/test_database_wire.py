"""The small print of the wire: probes, numbers, unknown routes, keys of what was deleted, impossible measurements."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import Future
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest

from common.files import sha256_text
from database.memory import Memory
from database.models import NewElement, StoredExperiment
from database.routers import submitted
from tests.database.db_service import BASELINE, Service, body_of, element_of, run_of


def sent(service: Service, request: bytes) -> tuple[bytes, bytes]:
    """(head, body) of the answer to raw bytes, after which the connection ends."""
    place = urlsplit(service.url)
    with socket.create_connection((place.hostname or "", place.port or 0), timeout=10) as connection:
        connection.sendall(request)
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body


def test_head_is_get_without_a_body(service: Service) -> None:
    service.add("a")
    for path in ("/", "/health", "/ready", "/metrics", "/docs", "/openapi.json", "/elements/by-index/1", "/v2/export"):
        head, get = service.http.head(path), service.http.get(path)
        assert head.status_code == get.status_code == 200 and head.content == b"", path
        assert head.headers["content-type"] == get.headers["content-type"]
    assert service.http.head("/elements/by-index/2").status_code == 404
    assert service.http.head("/candidates/1/add").status_code == 405
    stream = b"HEAD /v2/events/stream HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    head, body = sent(service, stream)
    assert head.startswith(b"HTTP/1.1 200") and body == b"", "it ends although the stream does not"


@pytest.mark.parametrize("written", ["+1", "1.0", "1_0", " 1", "1 ", "1e0", "0x1", "true", "%D9%A1", "one"])
def test_an_index_is_written_in_decimal_digits(service: Service, written: str) -> None:
    service.add("a")
    refused = service.delete(f"/elements/by-index/{written}", 422)
    assert "path.index" in refused["detail"]
    for method, path in (
        ("GET", "/elements/by-index/{}"),
        ("GET", "/elements/top-k/{}"),
        ("PUT", "/candidates/{}"),
        ("GET", "/tree-structure?root_index={}"),
        ("GET", "/v2/elements?after={}"),
    ):
        if not ("?" in path and written == "+1"):  # a plus in a query is a space, which is refused as well
            assert service.http.request(method, path.format(written)).status_code == 422, path
    assert service.get("/health")["database"]["total_records"] == 1
    service.delete("/elements/by-index/01")


def test_a_boolean_is_no_number(service: Service) -> None:
    service.add("a")
    service.post("/elements", body_of("b") | {"parent": True}, 422)
    service.post("/elements/1/set-parent", {"parent_index": False}, 422)
    service.post("/v2/usage", [{"role": "r", "model": "m", "calls": True}], 422)
    service.put("/v2/baselines/cpu-1", BASELINE.model_dump() | {"loss": True}, 422)
    service.post("/v2/experiments", experiment_with(seed=True), 422)
    lines = [{"element": body_of("b") | {"index": True}}, {"element": body_of("c") | {"index": 5, "parent": True}}]
    lines += [{"element": body_of("d") | {"index": 1}}, {"candidates": [999, True]}]
    data = service.http.post("/v2/import", content="\n".join(map(json.dumps, lines))).json()["data"]
    assert data["stored"] == 1 and sorted(refusal["line"] for refusal in data["refused"]) == [1, 2, 4, 4]
    assert [refusal["reason"] for refusal in data["refused"]][2:] == [
        "candidate 999 is no element of the file",
        "expected candidate as the index of an element, an integer, got True",
    ]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing/here", 404), ("PATCH", "/elements", 405), ("DELETE", "/health", 405), ("TRACE", "/", 405)],
)
def test_an_unknown_route_is_named_in_the_envelope(service: Service, method: str, path: str, status: int) -> None:
    answer = service.http.request(method, path)
    found = answer.json()
    assert answer.status_code == status and found["success"] is False
    assert method in found["detail"] and path in found["detail"] and "/docs" in found["detail"]
    assert (status == 405) == ("allow" in answer.headers)


@pytest.mark.parametrize("request_", [b"FOO /elements HTTP/1.1\r\nHost: localhost\r\n\r\n", b"garbage\r\n\r\n"])
def test_what_is_no_http_is_refused_in_the_envelope(service: Service, request_: bytes) -> None:
    head, body = sent(service, request_)
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    found = json.loads(body)
    assert found["success"] is False and found["message"] and found["detail"]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (None, 200), ("", 200), ("application/json; charset=utf-8", 200), ("Application/vnd.api+JSON", 200),
        ("text/plain", 422), ("application/x-www-form-urlencoded", 422), ("application/octet-stream", 422),
    ],
)  # fmt: skip
def test_json_needs_no_content_type(service: Service, kind: str | None, status: int) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    service.add("first")
    for path, body in (("/elements", body_of("x")), ("/elements/1/set-parent", {"parent_index": None})):
        answer = service.http.post(path, content=json.dumps(body).encode(), headers=headers)
        assert answer.status_code == status, answer.text


def test_a_key_outlives_its_element(service: Service) -> None:
    service.client.put_baseline(BASELINE)
    first = service.add_experiment(1, None, 4.0, 0.5)
    service.add_experiment(2, 1, 3.9, 0.5)
    keyed = {"Idempotency-Key": "k"}
    third = service.post("/elements", body_of("third"), headers=keyed)
    service.delete("/elements/by-index/2")
    service.delete("/elements/by-name/third")
    before = service.get("/stats")["total_records"]
    # As the first did, as far as it can be said of what is gone; and nothing is stored.
    again = service.add_experiment(2, 1, 3.9, 0.5)
    assert again == {"index": 2, "name": "delta_net_2", "score": None, "created": False}
    assert service.post("/elements", body_of("third"), headers=keyed) == third
    assert service.get("/stats")["total_records"] == before == 1
    # Another program, or another body, is told as it would be were the element there.
    other = experiment_with() | {"idempotency_key": "experiment-2"}
    assert "element 2" in service.post("/v2/experiments", other, 409)["detail"]
    assert "body" in service.post("/elements", body_of("third", log="other"), 409, headers=keyed)["detail"]
    assert "deleted" in service.get("/v2/experiments/experiment-2", 404)["detail"]
    assert first["index"] == service.get("/v2/experiments/experiment-1")["index"]
    # What cleans up leaves the key behind as well; what empties the store takes it along.
    incomplete = body_of("gap", result={"train": "s,1\nx,", "test": "m,a\nx,0.5"})
    gap = service.post("/elements", incomplete, headers={"Idempotency-Key": "gap"})
    assert service.post("/elements/clean-invalid")["data"]["cleaned_count"] == 1
    assert service.post("/elements", incomplete, headers={"Idempotency-Key": "gap"}) == gap
    service.delete("/elements/all")
    assert service.add_experiment(2, None, 3.9, 0.5)["created"] is True


def test_a_repeated_key_does_not_put_a_baseline_again(service: Service) -> None:
    """A retry that comes late must not make an old baseline the newest, nor change one and then be refused."""
    older, newer = (BASELINE.model_copy(update={"key": key}).model_dump() for key in ("older", "newer"))
    keyed = {"Idempotency-Key": "once"}
    first = service.http.put("/v2/baselines/older", json=older, headers=keyed)
    assert first.status_code == 200
    service.put("/v2/baselines/newer", newer)
    since = service.get("/v2/events?limit=1")["last"]
    assert service.http.put("/v2/baselines/older", json=older, headers=keyed).json() == first.json()
    refused = service.http.put("/v2/baselines/older", json=older | {"loss": 3.0}, headers=keyed)
    assert refused.status_code == 409
    assert service.get("/v2/baselines/older")["loss"] == BASELINE.loss
    assert service.get(f"/v2/events?after={since}")["events"] == []
    rows = [json.loads(line) for line in service.http.get("/v2/export").text.splitlines()]
    assert [row["baseline"]["key"] for row in rows if "baseline" in row][-2:] == ["older", "newer"]


class Reading(Memory):
    """Reads a result until it is told that it may end."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def submit(self, element: NewElement, *_: Any, **__: Any) -> Future[StoredExperiment]:
        assert self.may_end.wait(30), "the loop stands still meanwhile"
        stored: Future[StoredExperiment] = Future()
        stored.set_result(StoredExperiment(index=1, name=element.name, score=None, created=True))
        return stored


def test_no_other_request_waits_while_a_long_result_is_read() -> None:
    memory = Reading()
    element = NewElement.model_validate(body_of("long", result={"train": "\n" * 100_000, "test": ""}))

    async def both() -> StoredExperiment:
        storing = asyncio.create_task(submitted(memory, element))
        await asyncio.sleep(0)
        memory.may_end.set()
        return await storing

    assert asyncio.run(both()).name == "long"


def experiment_with(**changes: Any) -> dict[str, Any]:
    """A body for POST /v2/experiments whose run record differs from a sound one."""
    element = element_of(9, None)
    run = run_of(element, 4.0, 0.5).model_dump() | changes
    assert run["program_sha256"] == sha256_text(element.program)
    return {"idempotency_key": "nine", "element": element.model_dump(), "run": run}


def brought(service: Service, line: object) -> str:
    """What an import of this one line, which can store nothing, is refused with."""
    answer = service.http.post("/v2/import", content=json.dumps(line))
    detail: str = answer.json()["detail"]
    assert answer.status_code == 400 and detail.startswith("no line can be stored: line 1: "), answer.text
    return detail


LONG = "x" * 100_000
MEASURED = {"value": 0.5, "n": 10, "se": 0.1}
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"heldout_loss": MEASURED | {"value": -0.1}}, "heldout_loss.value: expected 0 to 1e+06, got -0.1"),
    ({"heldout_loss": MEASURED | {"value": 1e308}}, "heldout_loss.value: expected 0 to 1e+06, got 1e+308"),
    ({"heldout_loss": MEASURED | {"n": -1}}, "heldout_loss.n"),
    ({"heldout_loss": MEASURED | {"n": 2**70}}, "heldout_loss.n: expected 1 to 9223372036854775807, got 1180591620717"),
    ({"heldout_loss": MEASURED | {"n": 10**400}}, "heldout_loss.n: expected 1 to 9223372036854775807, got 1000000000"),
    ({"tokens": 2**63}, "tokens: expected 0 to 9223372036854775807, got 9223372036854775808"),
    ({"trainer": "command", "train_loss": {"1": 1e308}}, "train_loss.1: expected -1e+06 to 1e+06, got 1e+308"),
    ({"heldout_loss": MEASURED | {"n": 0}}, "heldout_loss.n"),
    ({"heldout_loss": MEASURED | {"se": -1e-9}}, "heldout_loss.se"),
    ({"benchmark_mean": MEASURED | {"value": 1.01}}, "benchmark_mean.value: expected 0 to 1, got 1.01"),
    ({"benchmark_mean": MEASURED | {"value": -0.01}}, "benchmark_mean.value"),
    ({"benchmarks": {"piqa": MEASURED | {"value": 50.0}}}, "benchmarks.piqa.value"),
    ({"benchmarks": {"piqa": MEASURED | {"chance": -1.0}}}, "benchmarks.piqa.chance"),
    ({"benchmarks": {"piqa": MEASURED | {"bits_per_byte": MEASURED | {"n": -3}}}}, "benchmarks.piqa.bits_per_byte.n"),
    ({"perplexities": {"wikitext": MEASURED | {"value": -9.0}}}, "perplexities.wikitext.value"),
    ({"validation_loss": {"100": -2.0}}, "validation_loss.100"),
    ({"perplexities": {"wikitext": MEASURED | {"value": -1.0}}}, "perplexities.wikitext.value"),
    ({"efficiency": {"decode": MEASURED | {"value": -1.0}}}, "efficiency.decode.value"),
    ({"parameters": -1}, "parameters"),
    ({"tokens": -1}, "tokens"),
    ({"seconds": {"train": -1.0}}, "seconds.train"),
    ({"seed": -1}, "seed: expected 0 to 9223372036854775807, got -1"),
    ({"seed": "0"}, 'seed: expected a number, got the text "0"'),
    ({"heldout_loss": MEASURED | {"value": "0.5"}}, 'heldout_loss.value: expected a number, got the text "0.5"'),
    ({"train_loss": {"1": "4.0"}}, 'train_loss: expected a number, got the text "4.0"'),
    ({"trainer": "command", "train_loss": {"last": 4.0}}, "train_loss: expected a step in decimal digits, got 'last'"),
    ({"profile": LONG}, "profile: expected 1 to 500 characters, got 100000"),
    ({"profile": ""}, "profile: expected 1 to 500 characters, got 0"),
    ({"name": LONG}, "name: expected at most 5000 characters, got 100000"),
    ({"benchmarks": {LONG: MEASURED}}, "expected at most 500 characters, got 100000"),
    ({"checks": [{"name": LONG, "passed": True}]}, "expected at most 500 characters, got 100000"),
    ({"reason": "nan"}, "reason: expected none of a finished run, got nan"),
    ({"reason": LONG}, "reason: Input should be 'refused'"),
]


@pytest.mark.parametrize(("change", "said"), IMPOSSIBLE, ids=lambda value: value if isinstance(value, str) else "")
def test_an_impossible_run_is_refused(service: Service, change: dict[str, Any], said: str) -> None:
    assert said in service.post("/v2/experiments", experiment_with(**change), 422)["detail"]
    line = {"element": experiment_with()["element"] | {"index": 1}, "runs": [experiment_with(**change)["run"]]}
    assert said in brought(service, line)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": 0.0}, "loss: expected more than 0, got 0"),
        ({"loss": -1.0}, "loss"),
        ({"loss": 1e308}, "loss: expected 0 to 1e+06, got 1e+308"),
        ({"parameters": 2**70}, "parameters: expected 0 to 9223372036854775807"),
        ({"loss_sd": -0.1}, "loss_sd"),
        ({"benchmark": 1.5}, "benchmark: expected 0 to 1"),
        ({"benchmark_sd": -0.1}, "benchmark_sd"),
        ({"loss_clip": 0.0}, "loss_clip"),
        ({"benchmark_clip": -0.1}, "benchmark_clip"),
        ({"seeds": []}, "seeds: expected at least one"),
        ({"seeds": [1, 1]}, "seeds: expected each once, got [1, 1]"),
        ({"seeds": [-1]}, "seeds: expected 0 to 9223372036854775807, got -1"),
        ({"seeds": [0, "1"]}, 'seeds: expected a number, got the text "1"'),
        ({"tasks": ["a", "a"]}, "tasks: expected each once"),
        ({"loss": "4.0"}, 'loss: expected a number, got the text "4.0"'),
        ({"program": LONG}, "program: expected 1 to 500 characters, got 100000"),
        ({"sd_dof": 0}, "sd_dof"),
    ],
)
def test_an_impossible_baseline_is_refused(service: Service, change: dict[str, Any], said: str) -> None:
    baseline = BASELINE.model_dump() | {"key": "impossible"} | change
    assert said in service.put("/v2/baselines/impossible", baseline, 422)["detail"]
    assert said in brought(service, {"baseline": baseline})
    service.get("/v2/baselines/impossible", 404)


def test_a_run_at_the_edge_of_what_can_be_is_stored(service: Service) -> None:
    edge = {"heldout_loss": MEASURED | {"value": 0.0, "n": 1, "se": None}, "benchmark_mean": MEASURED | {"value": 1.0}}
    service.post("/v2/experiments", experiment_with(**edge, benchmarks={"piqa": MEASURED | {"value": 0.0, "se": 0.0}}))
    # The published element allows any text as a result: there nothing is measured, and an odd number scores nothing.
    odd = {"train": "step,1\nx,-4.5", "test": "Model,piqa\nx,nan"}
    assert service.get(f"/elements/{service.add('odd', result=odd)}/score")["data"]["score"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"time": "yesterday"}, "time: Value error, expected UTC as YYYY-MM-DD HH:MM:SS, got 'yesterday'"),
        ({"time": "2025-02-30 00:00:00"}, "time: Value error, expected UTC as YYYY-MM-DD HH:MM:SS"),
        ({"time": "0001-01-01T00:00:00+10:00"}, "time: Value error, expected UTC as YYYY-MM-DD HH:MM:SS"),
        ({"name": LONG}, "name: Value error, expected at most 5000 characters, got 100000"),
        ({"result": {"train": "s" + ",1" * 600_000}}, "expected at most 1048576 characters, got 1200001"),
        ({"result": {"test": "x" * 1_048_577}}, "expected at most 1048576 characters, got 1048577"),
        ({"parent": "1"}, "expected"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_an_odd_element_is_refused_wherever_it_comes_in(service: Service, change: dict[str, Any], said: str) -> None:
    service.add("first")
    element = element_of(9, None).model_dump() | change
    assert said in service.post("/elements", element, 422)["detail"]
    assert said in service.post("/v2/experiments", experiment_with() | {"element": element}, 422)["detail"]
    assert said in brought(service, {"element": element})
    assert service.get("/health")["database"]["total_records"] == 1


def test_a_parent_is_no_text(service: Service) -> None:
    service.add("first")
    service.add("second")
    assert 'expected an integer, got "1"' in service.post("/elements", body_of("x", "1"), 422)["detail"]  # type: ignore[arg-type]
    assert 'got "1"' in service.post("/elements/2/set-parent", {"parent_index": "1"}, 422)["detail"]
    assert service.get("/elements/by-index/2")["parent"] is None


def test_a_time_is_kept_as_utc(service: Service) -> None:
    for sent_as, kept in (
        ("2025-07-01 12:00:00", "2025-07-01 12:00:00"),
        ("2025-07-01T14:00:00.5+02:00", "2025-07-01 12:00:00"),
        ("", "none"),
        ("none", "none"),
    ):
        index = service.add("a", time=sent_as)
        assert service.get(f"/elements/by-index/{index}")["time"] == kept


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"failed": 4}, "failed: expected at most the 3 calls, got 4"),
        ({"calls": 0, "input_tokens": 5}, "input_tokens: expected none of 0 calls, got 5"),
        ({"calls": "3"}, 'calls: expected a number, got the text "3"'),
        ({"model": LONG}, "model: expected 1 to 500 characters, got 100000"),
        ({"role": ""}, "role: expected 1 to 500 characters, got 0"),
    ],
)
def test_an_impossible_usage_is_refused(service: Service, change: dict[str, Any], said: str) -> None:
    usage = {"role": "planner", "model": "m", "calls": 3, "failed": 3} | change
    assert said in service.post("/v2/usage", [usage], 422)["detail"]
    assert said in service.post("/v2/experiments", experiment_with() | {"usage": [usage]}, 422)["detail"]
    assert service.get("/health")["database"]["total_records"] == 0


@pytest.mark.slow
def test_other_requests_go_on_while_a_row_of_60_megabytes_is_refused(service: Service) -> None:
    service.add("first")
    body = json.dumps(body_of("wide", result={"train": "s" + ",1" * 30_000_000, "test": ""}))
    waited: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as other:
            while not ended.is_set():
                before = time.monotonic()
                other.get("/elements/by-index/1").raise_for_status()
                waited.append(time.monotonic() - before)

    asking = threading.Thread(target=ask)
    asking.start()
    answer = service.http.post("/elements", content=body)
    ended.set()
    asking.join()
    assert answer.status_code == 422 and "1048576 characters, got 60000001" in answer.text
    print(f"{len(waited)} requests meanwhile, the longest waited {max(waited):.3f} s")
    assert max(waited) < 1.0


def test_numbers_of_thousands_of_digits_are_no_mistake_of_the_server(service: Service) -> None:
    service.add("a")
    zeros = (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: " + b"0" * 5000 + b"\r\n\r\n"
    )
    assert sent(service, zeros)[0].startswith(b"HTTP/1.1 200")
    with service.http.stream("GET", "/v2/events/stream", headers={"Last-Event-ID": "9" * 5000}) as answer:
        assert answer.status_code == 200


@pytest.mark.parametrize("between", ["\t", "\n", "\r", "?", "#"])
def test_a_key_stands_for_all_of_the_path(service: Service, between: str) -> None:
    names = [f"a{between}b", "ab", "a"]
    for name in names:
        service.add(name)
    for name in names:
        path = f"/elements/by-name/{quote(name, safe='')}"
        assert service.delete(path, headers={"Idempotency-Key": "k"})["data"] == {"deleted_count": 1}
        assert service.delete(path, headers={"Idempotency-Key": "k"})["data"] == {"deleted_count": 1}, "as before"
    assert service.get("/stats")["total_records"] == 0


def test_an_empty_key_is_none_and_what_is_no_json_is_malformed_everywhere(service: Service) -> None:
    service.add("a")
    for path in ("/elements", "/elements/1/set-parent"):
        for body in (b"{", b"\xff", b'{"parent": ' + b"9" * 5000 + b"}"):
            answer = service.http.post(path, content=body)
            assert answer.status_code == 422 and answer.json()["detail"].startswith("body"), (path, body[:9])
    for path, body in (("/elements", body_of("b")), ("/candidates/1/add", None)):
        answer = service.http.post(path, json=body, headers={"Idempotency-Key": ""})
        assert answer.status_code == 422 and "Idempotency-Key" in answer.json()["detail"]
