"""docs/database.md names every route, and only routes that exist; the start files agree with the settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jsonschema_rs
import pytest

from common.knobs import Database
from common.process import REPOSITORY
from database.candidate_manager import FORCE_NEWEST
from database.evaluate_agent.score import PUBLISHED, SCORE_VERSION
from database.openapi import EXAMPLES
from tests.database.db_service import Service


def test_every_route_is_documented(service: Service) -> None:
    described = service.http.get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    text = Path(REPOSITORY, "docs/database.md").read_text()
    documented = set(re.findall(r"^\| ((?:GET|POST|PUT|DELETE) \S+) \|", text, re.MULTILINE))
    assert documented == routes
    published = text.split("## Published routes")[1].split("## Routes of our own")[0]
    assert len(re.findall(r"^\| (?:GET|POST|PUT|DELETE)", published, re.MULTILINE)) == 41


def test_openapi_has_an_example_and_the_errors_of_every_route(service: Service) -> None:
    schema = service.http.get("/openapi.json").json()
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }
    assert set(EXAMPLES) <= set(operations)
    assert EXAMPLES["GET /v2/elements/{index}/score"]["version"] == SCORE_VERSION
    for route, operation in operations.items():
        assert operation["summary"] and operation["description"], route
        for content in operation["responses"]["200"]["content"].values():
            assert "example" in content, route
        for content in operation.get("requestBody", {"content": {}})["content"].values():
            assert "example" in content, route
        errors = {status: answer for status, answer in operation["responses"].items() if status != "200"}
        assert {"401", "429", "500", "503"} <= set(errors), route
        for status, answer in errors.items():
            assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}, status
        # The body of an experiment holds its key.
        if not route.startswith("GET") and route != "POST /v2/experiments":
            headers = [one["name"] for one in operation.get("parameters", []) if one["in"] == "header"]
            assert headers == ["Idempotency-Key"], route
    finds_none = ("GET /candidates/sample-range/{a}/{b}/{k}", "DELETE /candidates/by-name/{name}")
    assert not [route for route in finds_none if "404" in operations[route]["responses"]]
    one = ("GET /elements/sample", "DELETE /elements/by-name/{name}", "GET /v2/programs/{sha256}")
    assert not [route for route in one if "404" not in operations[route]["responses"]]
    assert set(schema["components"]["schemas"]["ErrorBody"]["required"]) == {"message", "detail"}


def test_examples_fit_their_schemas(service: Service) -> None:
    schema = service.http.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            described = [operation["responses"]["200"], operation.get("requestBody", {"content": {}})]
            for content in (content for one in described for content in one["content"].values()):
                if "schema" in content:
                    whole = content["schema"] | {"components": schema["components"]}
                    jsonschema_rs.validator_for(whole).validate(content["example"]), (method, path)


def test_every_curl_line_of_the_docs_is_answered(start: Callable[..., Service], tmp_path: Path) -> None:
    """The code blocks run as they stand; the server's own counters say which routes answered 200, and which did not."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    service = start(env={"ASI_DATABASE__COLD_START": "1", "ASI_DATABASE__UPDATE_BATCH": "1"})
    text = Path(REPOSITORY, "docs/database.md").read_text()
    script = "set -eu\n" + "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\nnoproxy = *\n")
    environment = {"PATH": os.environ["PATH"], "CURL_HOME": str(tmp_path), "DB": service.url}
    ran = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stdout[-1500:] + ran.stderr
    messages = [
        example["message"] for example in EXAMPLES.values() if isinstance(example, dict) and "message" in example
    ]
    said = re.sub(r"[0-9]+", "#", ran.stdout)
    assert [text for text in messages if re.sub(r"[0-9]+", "#", text) not in said] == []
    counted = service.http.get("/metrics").text
    series = re.findall(r'requests_total\{method="(\w+)",route="([^"]+)",status="(\d+)"\}', counted)
    assert {status for _, _, status in series} == {"200"}, series
    answered = {f"{method} {re.sub(':text', '', route)}" for method, route, _ in series}
    described = service.http.get("/openapi.json").json()["paths"]
    assert {f"{method.upper()} {path}" for path, methods in described.items() for method in methods} <= answered


def test_every_setting_is_documented_with_its_default() -> None:
    text = Path(REPOSITORY, "docs/database.md").read_text()
    told = dict(re.findall(r"^\| database\.(\w+) \| (.+?) \|", text, re.MULTILINE))
    assert set(told) == set(Database.model_fields)
    for name, field in Database.model_fields.items():
        empty = {None: "unset", "[]": "none"}.get(str(field.default) if field.default == [] else field.default)
        assert told[name] == (empty or f"`{field.default}`"), name


def test_the_published_constants_are_the_defaults() -> None:
    settings = Database()
    assert (settings.candidate_capacity, settings.cold_start, settings.update_batch) == (50, 200, 50)
    assert FORCE_NEWEST == 300 and (PUBLISHED.loss, PUBLISHED.benchmark) == (4.575, 0.224)
    assert (settings.port, settings.host, settings.exact_windows) == (8001, "127.0.0.1", 100_000)
