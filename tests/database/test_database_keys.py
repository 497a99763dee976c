"""A write that is sent again with its Idempotency-Key is answered as it was at first, and does nothing: each route."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.database.db_service import BASELINE, Service, body_of, element_of, run_of, settled

Send = tuple[str, Any]
"""The path, and what is sent with it."""


def experiment() -> dict[str, Any]:
    element = element_of(9, None)
    run = run_of(element, 4.0, 0.5)
    return {"idempotency_key": "nine", "element": element.model_dump(), "run": run.model_dump()}


WRITES: dict[str, Send] = {
    "POST /elements": ("/elements", body_of("again")),
    "POST /elements/{index}/set-parent": ("/elements/3/set-parent", {"parent_index": 2}),
    "POST /elements/clean-invalid": ("/elements/clean-invalid", None),
    "DELETE /elements/by-index/{index}": ("/elements/by-index/2", None),
    "DELETE /elements/by-name/{name}": ("/elements/by-name/twice", None),
    "DELETE /elements/all": ("/elements/all", None),
    "POST /repair": ("/repair", None),
    "POST /faiss/rebuild": ("/faiss/rebuild", None),
    "POST /faiss/clean-orphans": ("/faiss/clean-orphans", None),
    "POST /candidates/{index}/add": ("/candidates/3/add", None),
    "PUT /candidates/{index}": ("/candidates/1", None),
    "DELETE /candidates/by-index/{index}": ("/candidates/by-index/1", None),
    "DELETE /candidates/by-name/{name}": ("/candidates/by-name/delta_net", None),
    "DELETE /candidates/all": ("/candidates/all", None),
    "POST /candidates/force-update": ("/candidates/force-update", None),
    "POST /candidates/rebuild-from-scored": ("/candidates/rebuild-from-scored", None),
    "PUT /v2/baselines/{key}": (f"/v2/baselines/{BASELINE.key}", BASELINE.model_dump()),
    "POST /v2/experiments": ("/v2/experiments", experiment()),
    "POST /v2/usage": ("/v2/usage", [{"role": "again", "model": "m", "calls": 1}]),
    "POST /v2/import": ("/v2/import", json.dumps({"element": body_of("brought") | {"index": 9}}).encode()),
}


def filled(service: Service) -> None:
    """Five elements, one of them incomplete, two of one name; two candidates."""
    service.add("delta_net")
    service.add("twice", 1)
    service.add("three", 1)
    service.add("twice", 3)
    service.add("incomplete", 4, result={"train": "s,1\nx,", "test": "m,a\nx,0.5"})
    settled(service)
    service.post("/candidates/1/add")
    service.post("/candidates/2/add")


def sender(service: Service, route: str, key: str) -> Callable[[], Any]:
    method, (path, body) = route.partition(" ")[0], WRITES[route]
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}

    def send() -> Any:
        answer = service.http.request(method, path, headers={"Idempotency-Key": key}, **sent)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return send


def seen(service: Service) -> Any:
    """All that a write could have changed, and the last event."""
    settled(service)
    lines = service.http.get("/v2/export").text
    return lines, service.get("/v2/events?limit=1")["last"], service.get("/candidates/all")


def test_every_write_is_here(service: Service) -> None:
    paths = service.http.get("/openapi.json").json()["paths"]
    assert set(WRITES) == {
        f"{method.upper()} {path}" for path, methods in paths.items() for method in methods if method != "get"
    }


@pytest.mark.parametrize("route", WRITES)
def test_a_write_that_is_sent_again_does_nothing(service: Service, route: str) -> None:
    filled(service)
    send = sender(service, route, f"sent again {route}")
    first = send()
    if route != "DELETE /elements/all":
        # Something happens in between: what the second would do is not what the first did.
        service.add("in between", result={"train": "s,1\nx,", "test": "m,a\nx,0.5"})
    before = seen(service)
    again = send()
    if route == "POST /v2/import":
        assert first["data"]["stored"] == again["data"]["repeated"] == 1 and again["data"]["stored"] == 0
    elif route == "POST /v2/experiments":
        assert again["data"]["index"] == first["data"]["index"] and not again["data"]["created"]
    else:
        assert again == first
    assert seen(service) == before
