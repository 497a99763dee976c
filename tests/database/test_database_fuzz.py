"""Requests made up from the OpenAPI description, fitting it or not: never a 5xx, never an undescribed answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.database.db_service import BASELINE, Service

schemathesis.serializer.alias("application/x-ndjson", "text/plain")
ENDLESS = "/v2/events/stream"


def refusable(operation: dict[str, Any]) -> bool:
    """Whether there are requests of this route that its description refuses: any text is a name, so it takes a number
    or a JSON body."""
    wanted = [json.dumps(one["schema"]) for one in operation.get("parameters", []) if one["in"] != "header"]
    numbers = any(f'"type": "{kind}"' in schema for schema in wanted for kind in ("integer", "number", "boolean"))
    return numbers or "application/json" in operation.get("requestBody", {}).get("content", {})


def begin(case: schemathesis.Case, url: str, session: requests.Session) -> None:
    """Opens a stream and leaves at once, often while the server writes."""
    arguments = case.as_transport_kwargs(base_url=url)
    with session.request(**arguments, timeout=30, stream=True) as answer:
        if answer.status_code == 200:
            assert answer.headers["content-type"].startswith("text/event-stream")
        else:
            assert answer.status_code in (401, 422, 429) and answer.json()["success"] is False, answer.text


def fuzz(service: Service, examples: int, seed: int) -> int:
    """Sends up to `examples` requests of each kind to each route; returns how many were sent."""
    load_all_checks()
    checks = [
        CHECKS.get_one(name)
        for name in (
            "not_a_server_error",
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
        )
    ]
    described = service.http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(described)
    session = requests.Session()
    session.trust_env = False
    sent = 0

    def seed_store() -> None:
        service.delete("/elements/all")
        service.client.put_baseline(BASELINE)
        for number in range(1, 5):
            service.add_experiment(number, None if number == 1 else number - 1, 4.0 - 0.02 * number, 0.5)
        service.add("delta_net_1", 4)
        service.client.add_candidate(2)

    for found in schema.get_all_operations():
        operation = found.ok()
        if service.get("/health")["database"]["total_records"] < 3:
            seed_store()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not refusable(described["paths"][operation.path][operation.method]):
                continue

            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=examples,
                database=None,
                deadline=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def send(case: schemathesis.Case) -> None:
                nonlocal sent
                sent += 1
                if case.operation.path == ENDLESS:
                    begin(case, service.url, session)
                    return
                answer = case.call(base_url=service.url, session=session, timeout=30)
                case.validate_response(answer, checks=checks)

            send()
    return sent


@pytest.mark.timeout(600)  # a MongoDB-wire server on a busy machine takes minutes
def test_no_route_breaks_or_answers_outside_its_schema(service: Service) -> None:
    assert fuzz(service, examples=2, seed=1) > 150


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(3))
def test_no_route_breaks_or_answers_outside_its_schema_at_length(start: Callable[..., Service], seed: int) -> None:
    service = start()
    sent = fuzz(service, examples=100, seed=seed)
    print(f"{sent} requests, seed {seed}: no 5xx, none outside its schema")
    assert sent > 5000
