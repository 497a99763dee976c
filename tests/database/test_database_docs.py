"""docs/database.md names every route, and only routes that exist."""

from __future__ import annotations

import re
from pathlib import Path

from common.process import REPOSITORY
from tests.database.db_service import Service


def test_every_route_is_documented(service: Service) -> None:
    described = service.http.get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    text = Path(REPOSITORY, "docs/database.md").read_text()
    documented = set(re.findall(r"^\| ((?:GET|POST|PUT|DELETE) \S+) \|", text, re.MULTILINE))
    assert documented == routes
    published = text.split("## Published routes")[1].split("## Routes of our own")[0]
    assert len(re.findall(r"^\| (?:GET|POST|PUT|DELETE)", published, re.MULTILINE)) == 41
