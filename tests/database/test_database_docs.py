"""docs/database.md names every route, and only routes that exist; the start files agree with the settings."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from common.process import REPOSITORY
from common.settings import Database
from tests.database.db_service import Service


def test_every_route_is_documented(service: Service) -> None:
    described = service.http.get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    text = Path(REPOSITORY, "docs/database.md").read_text()
    documented = set(re.findall(r"^\| ((?:GET|POST|PUT|DELETE) \S+) \|", text, re.MULTILINE))
    assert documented == routes
    published = text.split("## Published routes")[1].split("## Routes of our own")[0]
    assert len(re.findall(r"^\| (?:GET|POST|PUT|DELETE)", published, re.MULTILINE)) == 41


def test_start_files_agree_with_the_settings() -> None:
    folder = Path(REPOSITORY, "database")
    port = str(Database().port)
    compose = (folder / "docker-compose.yml").read_text()
    assert f'ASI_DATABASE__PORT: "{port}"' in compose and f"EXPOSE {port}" in (folder / "Dockerfile").read_text()
    names = re.findall(r"ASI_DATABASE__(\w+)", compose)
    assert names and {name.lower() for name in names} <= set(Database.model_fields)
    shown = subprocess.run(
        [str(folder / "start_api.sh"), "--help"], cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0 and "--store" in shown.stdout
