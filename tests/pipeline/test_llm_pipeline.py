"""The same loop with an LLM endpoint configured: its program, once checked, is what is trained and stored."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from tests.llm_endpoint import FakeEndpoint, planner_answering
from tests.pipeline.running import elements, run, stage

SEED = Path(__file__).resolve().parents[2] / "training" / "architectures" / "delta_net.py"
OUTPUT = "self.o_proj(o_BTV)"


def program(number: int) -> str:
    """First a program that sees the future, then an honest one: the loop has to refuse and repair."""
    text = SEED.read_text()
    assert OUTPUT in text
    changed = "self.o_proj(o_BTV) + o_BTV.mean()" if number == 0 else "self.o_proj(o_BTV + torch.tanh(o_BTV))"
    return text.replace(OUTPUT, changed)


def test_a_program_from_an_endpoint_is_checked_repaired_trained_and_stored(tmp_path: Path) -> None:
    with FakeEndpoint(default=planner_answering(program)) as endpoint:
        env = {
            "ASI_LLM__BACKEND": "openai",
            "ASI_LLM__BASE_URL": endpoint.url,
            "ASI_LLM__MODEL": "double",
            "ASI_LLM__API_KEY": "hush-hush",
        }
        done = run(tmp_path, 1, "--sandbox.backend", "bubblewrap", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    evolved = stage(tmp_path, 1, "evolve")
    assert [attempt["kind"] for attempt in evolved["attempts"]] == ["refused"]
    refused = [check["name"] for check in evolved["attempts"][0]["report"]["checks"] if not check["passed"]]
    assert "causality" in refused
    stored = elements(tmp_path)[2]
    assert stored["program"] == program(1) and stored["runs"][-1].trust is None
    # Every call that the endpoint answered is accounted for with the element.
    with sqlite3.connect(tmp_path / "database.sqlite") as connection:
        usage = [json.loads(body) for (body,) in connection.execute("SELECT body FROM usage")]
    roles = [record["role"] for record in usage if record["index"] == stored["index"]]
    assert sorted(roles) == ["analyzer", "code_checker", "motivation_checker", "planner", "summarizer"]
    assert {record["index"] for record in usage} == {1, 2, 3}, "the roots' calls as well"
    assert sum(record["calls"] for record in usage) == len(endpoint.requests)
    assert sum(record["input_tokens"] for record in usage) == 120 * len(endpoint.requests)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"hush-hush" not in path.read_bytes(), path


@pytest.mark.slow
def test_an_endpoint_that_is_down_stops_the_loop_with_a_clear_error(tmp_path: Path) -> None:
    env = {"ASI_LLM__BACKEND": "openai", "ASI_LLM__BASE_URL": "http://127.0.0.1:9/v1", "ASI_LLM__API_KEY": "hush-hush"}
    done = run(tmp_path, 1, "--llm.retries", "0", env=env)
    assert done.returncode == 3 and done.stderr.startswith("error: "), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
