"""From what a model wrote to a typed answer, the call log, and the scripted backend."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from common.errors import LLMError, StoreError
from common.llm import Call, CallLog, ScriptedBackend
from common.llm.answers import UnusableAnswerError, instructions, parse


class Program(BaseModel):
    name: str = Field(max_length=40)
    program: str = Field(description="the whole file")


ANSWER = {"name": "delta_net_x", "program": "x = {1: '```'}\n"}
TEXT = json.dumps(ANSWER)


@pytest.mark.parametrize(
    "written",
    [
        TEXT,
        f"\ufeff{TEXT}",
        f"```json\n{TEXT}\n```",
        f"Sure! With q in {{0, 1}} it is {{fine}}:\n{TEXT}\nHope this helps {{really}}.",
        f'<think>Maybe {{"name": "wrong", "program": ""}}</think>{TEXT}',
        f'{{"plan": "first this"}} {TEXT}',
        TEXT.replace("\\n", "\n"),
    ],
)
def test_the_object_is_found_in_what_models_write(written: str) -> None:
    assert parse(written, Program).model_dump() == ANSWER


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("", "empty"),
        ("I cannot.", "no JSON object"),
        ('{"name": "x"', "no JSON object"),
        ('{"name": "x"}', "program"),
        (json.dumps({"name": "x" * 41, "program": ""}), "name"),
        ("{" * 5000, "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ('{"a":' * 100_000, "no JSON object"),
    ],
)
def test_what_cannot_be_used_says_why(written: str, complaint: str) -> None:
    with pytest.raises(UnusableAnswerError, match=complaint):
        parse(written, Program)


@hypothesis.given(st.text())
@hypothesis.settings(max_examples=60)
def test_every_program_text_survives(text: str) -> None:
    assert parse(json.dumps({"name": "n", "program": text}), Program).program == text


def test_a_lone_surrogate_becomes_storable() -> None:
    parse('{"name": "n", "program": "\\ud800x"}', Program).program.encode()


def test_the_instructions_carry_schema_and_bounds() -> None:
    text = instructions(Program)
    assert "the whole file" in text and '"maxLength": 40' in text


def call(**changes: object) -> Call:
    values: dict[str, object] = {
        "call": "c1",
        "attempt": 1,
        "role": "planner",
        "model": "m",
        "mode": "native",
        "output": "Program",
        "system": "",
        "prompt": "p",
        "answer": "a",
        "outcome": "ok",
        "seconds": 0.5,
    }
    return Call(**{**values, **changes})  # type: ignore[arg-type]


def test_the_log_never_holds_a_secret(tmp_path: Path) -> None:
    log = CallLog(tmp_path / "llm.jsonl", secrets=["sk-one", ""])
    log.hide("sk-two")
    log.add(call(prompt="key sk-one", answer="sk-two!", error="Bearer sk-one", system="sk-two"))
    text = (tmp_path / "llm.jsonl").read_text()
    assert "sk-" not in text and text.count("[secret]") == 4


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    log = CallLog(tmp_path / "llm.jsonl")

    def write(role: str) -> None:
        for number in range(25):
            log.add(call(role=role, attempt=number, prompt=role * 20_000, input_tokens=1, cost=0.25))

    threads = [threading.Thread(target=write, args=(role,)) for role in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = list(CallLog.read(tmp_path / "llm.jsonl"))
    assert len(calls) == 100 and all(set(item.prompt) == {item.role} for item in calls)
    totals = log.totals()["a"]
    assert (totals.attempts, totals.input_tokens, totals.seconds, totals.cost) == (25, 25, 12.5, 6.25)


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    first = CallLog(path).add(call())
    with path.open("a") as file:
        file.write('{"call": "c2", "att')
    assert list(CallLog.read(path)) == [first]


def test_a_log_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="call log"):
        CallLog(tmp_path / "file" / "llm.jsonl").add(call())


def test_the_script_answers_in_order_and_by_role() -> None:
    llm = ScriptedBackend([Program(name="one", program=""), {"name": "two", "program": ""}, f"Here: {TEXT}"])
    assert [llm.ask("planner", str(number), Program).name for number in range(3)] == ["one", "two", "delta_net_x"]
    assert [item.prompt for item in llm.calls] == ["0", "1", "2"]
    with pytest.raises(LLMError, match="no answer left"):
        llm.ask("planner", "?", Program)
    by_role = ScriptedBackend(lambda role, prompt, output: {"name": role, "program": prompt})
    assert by_role.ask("debugger", "fix", Program) == Program(name="debugger", program="fix")


def test_a_scripted_answer_that_does_not_fit_is_recorded_and_raised() -> None:
    llm = ScriptedBackend(["no", LLMError("down")])
    with pytest.raises(LLMError, match="does not fit"):
        llm.ask("planner", "?", Program)
    with pytest.raises(LLMError, match="down"):
        llm.ask("planner", "?", Program)
    assert [item.outcome for item in llm.calls] == ["unusable", "lost"] and llm.log.totals()["planner"].failed == 2
