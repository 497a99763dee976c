"""Hostile values in every field of every body, and in every path and query: data or a refusal, never a 5xx, and a store
that is sound afterwards."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from common.knobs import Database as DatabaseSettings
from database.invariants import broken
from database.store import open_store
from tests.database.db_service import Service, settled
from tests.database.test_database_keys import WRITES, filled

VALUES: list[Any] = [
    "\ud800", "a\x00b", {"$gt": ""}, ["$where"], float("nan"), float("-inf"), 10**400, -1, True, None, "",
    "<script>alert(1)</script>", "../../etc/passwd", "\u202e\ufeff\U0010ffff", {"__proto__": {"a": 1}},
]  # fmt: skip
WORDS = [
    "%ED%A0%80", "%FF", "a%00b", "%7B%22$gt%22:%22%22%7D", "..%2F..%2Fetc%2Fpasswd", "%0D%0ASet-Cookie:%20a=b", "NaN",
    "-1", "9" * 400, "%3Cscript%3E", "%2525", "%E2%80%AE",
]  # fmt: skip
ENDLESS = "/v2/events/stream"


def places(body: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value of a body, itself included."""
    yield path
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for name, value in items:
        yield from places(value, (*path, name))


def replaced(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(body)
    at = changed
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return changed


def fits(answer: Any, asked: object) -> None:
    """JSON as every parser reads it, or text; a refusal in the envelope."""
    assert answer.status_code < 500, (asked, answer.status_code, answer.text[:500])
    if "json" in answer.headers["content-type"] and "ndjson" not in answer.headers["content-type"]:
        found = json.loads(answer.content, parse_constant=lambda name: pytest.fail(f"{name} in an answer to {asked}"))
        if answer.status_code >= 400:
            assert found["success"] is False and isinstance(found["detail"], str) and found["detail"], asked
    assert "set-cookie" not in answer.headers


def sound(service: Service) -> None:
    settled(service)
    store = open_store(DatabaseSettings(store=service.store), read_only=True)
    assert broken(store, 5) == []
    store.close()
    assert service.get("/health")["status"] == "healthy"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("route", [route for route, (_, body) in WRITES.items() if body is not None])
def test_a_hostile_value_in_any_field_is_data_or_refused(service: Service, route: str) -> None:
    filled(service)
    method, (path, body) = route.partition(" ")[0], WRITES[route]
    whole = json.loads(body) if isinstance(body, bytes) else body
    answers = set()
    for place in places(whole):
        for value in VALUES:
            sent = json.dumps(replaced(whole, place, value)).encode()
            answer = service.http.request(method, path, content=sent, headers={"Content-Type": "application/json"})
            fits(answer, (route, place, value))
            answers.add(answer.status_code)
    assert answers & {400, 422}, "some of it was refused"
    sound(service)


def test_a_hostile_word_in_any_path_or_query_is_a_name_or_refused(service: Service) -> None:
    filled(service)
    routes = service.http.get("/openapi.json").json()["paths"]
    asked = 0
    for path, methods in routes.items():
        if path == ENDLESS:
            continue
        for method, operation in methods.items():
            names = [one["name"] for one in operation.get("parameters", []) if one["in"] == "query"]
            for word in WORDS:
                filled_in = re.sub(r"\{\w+\}", word, path)
                query = "&".join(f"{name}={word}" for name in names)
                if method == "delete" and "{" not in path:
                    continue
                answer = service.http.request(method.upper(), f"{filled_in}?{query}")
                fits(answer, (method, filled_in, query))
                asked += 1
    assert asked > 500
    assert service.get("/health")["database"]["total_records"] >= 4, "no word removed what it does not name"
    sound(service)
