"""The real OpenAI backend against a loopback server that misbehaves in every way seen in the wild."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from common.errors import LLMError, SettingsError
from common.knobs import Llm
from common.llm import CallLog, NoUsableAnswerError, open_llm
from common.llm.openai_backend import OpenAIBackend
from tests.llm_endpoint import (
    Behaviour,
    FakeEndpoint,
    Request,
    Response,
    broken_json,
    closes,
    drip,
    empty_choices,
    html,
    ok,
    raw,
    slow,
    status,
)


class Verdict(BaseModel):
    is_repeated: bool
    reason: str = Field(min_length=1, max_length=200)


FIELDS = [
    "choices",
    "message",
    "content",
    "role",
    "finish_reason",
    "usage",
    "index",
    "created",
    "id",
    "tool_calls",
    "error",
]
GOOD = {"is_repeated": False, "reason": "new"}


def ask(endpoint: FakeEndpoint, log: CallLog | None = None, **changes: object) -> Verdict:
    backend = OpenAIBackend(endpoint.settings(**changes), log)
    try:
        return backend.ask("checker", "Is this new?", Verdict, system="You judge novelty.")
    finally:
        backend.close()


def test_an_answer_is_typed_and_recorded(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "llm.jsonl"
    with FakeEndpoint([ok(GOOD, usage=(120, 30))]) as endpoint:
        answer = ask(endpoint, CallLog(path), input_price=2.0, output_price=10.0, temperature=0.5, max_tokens=512)
    assert answer == Verdict(is_repeated=False, reason="new")
    body = endpoint.requests[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("double", 0.5, 512)
    assert body["response_format"]["json_schema"]["schema"]["properties"]["reason"]["maxLength"] == 200
    (call,) = CallLog.read(path)
    assert (call.role, call.outcome, call.mode, call.model, call.output) == (
        "checker",
        "ok",
        "native",
        "double",
        "Verdict",
    )
    assert call.prompt == "Is this new?" and "You judge novelty." in call.system
    assert call.answer is not None and json.loads(call.answer) == GOOD
    assert (call.input_tokens, call.output_tokens, call.finish_reason) == (120, 30, "stop")
    assert call.cost == pytest.approx((2.0 * 120 + 10.0 * 30) / 1e6) and call.seconds > 0


@pytest.mark.parametrize(
    ("behaviour", "outcome"),
    [
        (html, "malformed"),
        (broken_json, "malformed"),
        (empty_choices, "malformed"),
        (lambda: status(429, retry_after=0), "rate_limited"),
        (lambda: status(500), "server_error"),
        (lambda: status(503), "server_error"),
        (closes, "lost"),
        (lambda: ok("I would rather not say."), "unusable"),
        (lambda: ok({"is_repeated": "perhaps", "reason": ""}), "unusable"),
        (lambda: ok(""), "unusable"),
        (lambda: ok('{"is_repeated": false, "reas', finish="length"), "truncated"),
        (lambda: ok("", finish="content_filter"), "declined"),
    ],
)
def test_a_passing_failure_is_tried_again(behaviour: Callable[[], Behaviour], outcome: str, tmp_path: Path) -> None:
    log = CallLog(tmp_path / "llm.jsonl")
    with FakeEndpoint([behaviour(), behaviour(), ok(GOOD)]) as endpoint:
        assert ask(endpoint, log).reason == "new"
    calls = list(CallLog.read(tmp_path / "llm.jsonl"))
    assert [call.outcome for call in calls] == [outcome, outcome, "ok"]
    assert len({call.call for call in calls}) == 1 and [call.attempt for call in calls] == [1, 2, 3]
    assert log.totals()["checker"].failed == 2


@pytest.mark.parametrize(
    ("behaviour", "fix"),
    [
        (html, "base_url"),
        (empty_choices, "base_url"),
        (lambda: status(429, retry_after=0), "parallel"),
        (closes, "base_url"),
        (lambda: ok("no"), "output_mode"),
        (lambda: ok("{", finish="length"), "max_tokens"),
    ],
)
def test_a_lasting_failure_is_an_error_with_its_fix(behaviour: Callable[[], Behaviour], fix: str) -> None:
    with FakeEndpoint(default=behaviour()) as endpoint, pytest.raises(LLMError) as caught:
        ask(endpoint, retries=2)
    assert len(endpoint.requests) == 3
    assert isinstance(caught.value, NoUsableAnswerError) == (fix in ("output_mode", "max_tokens"))
    assert "checker" in caught.value.message and "3 times" in caught.value.message and fix in caught.value.fix


@pytest.mark.parametrize("code", [401, 403])
def test_a_wrong_key_is_not_tried_again(code: int, tmp_path: Path) -> None:
    key = "sk-double-0123456789"
    path = tmp_path / "llm.jsonl"
    with FakeEndpoint(default=status(code, f"the key {key} is wrong")) as endpoint, pytest.raises(LLMError) as caught:
        ask(endpoint, CallLog(path))
    assert len(endpoint.requests) == 1 and endpoint.requests[0].headers["authorization"] == f"Bearer {key}"
    assert key not in path.read_text() and key not in str(caught.value) and "is wrong" in path.read_text()


def test_usage_counts_even_where_no_answer_came() -> None:
    log = CallLog()
    with FakeEndpoint([empty_choices(usage=(7, 2)), ok("no", usage=(10, 1)), ok(GOOD, usage=None)]) as endpoint:
        ask(endpoint, log)
    totals = log.totals()["checker"]
    assert (totals.attempts, totals.failed, totals.unreported) == (3, 2, 1)
    assert (totals.input_tokens, totals.output_tokens, totals.cost) == (17, 3, None)


def test_a_complaint_reaches_the_model() -> None:
    with FakeEndpoint([ok({"is_repeated": False}), ok(GOOD)]) as endpoint:
        ask(endpoint)
    assert "could not be used" in endpoint.requests[1].text() and "reason" in endpoint.requests[1].text()


@pytest.mark.parametrize("late", [slow, drip])
def test_a_slow_answer_times_out_even_while_bytes_arrive(late: Callable[[float, Behaviour], Behaviour]) -> None:
    started = time.monotonic()
    with FakeEndpoint(default=late(60.0, ok(GOOD))) as endpoint, pytest.raises(LLMError) as caught:
        ask(endpoint, timeout=0.4, retries=1)
    assert time.monotonic() - started < 50 and "timeout" in caught.value.message and "llm.timeout" in caught.value.fix


def test_the_wait_the_endpoint_asks_for_is_kept() -> None:
    started = time.monotonic()
    with FakeEndpoint([status(429, retry_after=1), ok(GOOD)]) as endpoint:
        ask(endpoint)
    assert time.monotonic() - started >= 1.0


def test_auto_falls_back_when_schemas_are_refused_and_remembers() -> None:
    def refuses(request: object) -> object:
        return (status(400, "unknown field response_format") if request.mode == "native" else ok(GOOD))(request)  # type: ignore[attr-defined,arg-type]

    with FakeEndpoint(default=refuses) as endpoint:  # type: ignore[arg-type]
        backend = OpenAIBackend(endpoint.settings(retries=0))
        for _ in range(2):
            backend.ask("checker", "?", Verdict)
        backend.close()
    assert [request.mode for request in endpoint.requests] == ["native", "prompted", "prompted"]
    assert "is_repeated" in endpoint.requests[1].properties()


def test_auto_gives_up_on_schemas_that_are_ignored_twice() -> None:
    def ignores(request: object) -> object:
        return ok("Sure! It is new." if request.mode == "native" else GOOD)(request)  # type: ignore[attr-defined,arg-type]

    with FakeEndpoint(default=ignores) as endpoint:  # type: ignore[arg-type]
        backend = OpenAIBackend(endpoint.settings())
        for _ in range(3):
            backend.ask("checker", "?", Verdict)
        backend.close()
    assert [request.mode for request in endpoint.requests] == ["native", "prompted", "native", "prompted", "prompted"]


@pytest.mark.parametrize("answer", [ok(GOOD), ok(json.dumps(GOOD))])
def test_tool_mode_takes_a_call_or_plain_text(answer: Behaviour) -> None:
    with FakeEndpoint([answer]) as endpoint:
        assert ask(endpoint, output_mode="tool").reason == "new"
    assert endpoint.requests[0].mode == "tool"


def test_a_set_mode_is_never_left() -> None:
    with FakeEndpoint(default=status(400, "no such field")) as endpoint, pytest.raises(LLMError) as caught:
        ask(endpoint, output_mode="native")
    assert [request.mode for request in endpoint.requests] == ["native"] and "no such field" in caught.value.message


def test_azure_paths_and_headers() -> None:
    with FakeEndpoint([ok(GOOD)]) as endpoint:
        ask(endpoint, base_url=endpoint.root, api_version="2024-10-21")
    request = endpoint.requests[0]
    assert request.path.startswith("/openai/deployments/double/chat/completions") and "2024-10-21" in request.path
    assert request.headers["api-key"] == "sk-double-0123456789"


def test_the_key_of_openai_never_goes_to_another_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-belongs-to-openai")
    with FakeEndpoint([ok(GOOD)]) as endpoint:
        ask(endpoint, api_key=None)
    assert "sk-belongs-to-openai" not in str(endpoint.requests[0].headers)


def test_questions_of_several_threads_run_side_by_side() -> None:
    together = threading.Barrier(4, timeout=60)

    def waits(request: Request) -> Response:
        together.wait()  # until all four are there
        return ok(GOOD)(request)

    with FakeEndpoint(default=waits) as endpoint:
        backend = OpenAIBackend(endpoint.settings())
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: backend.ask("checker", str(number), Verdict), range(4)))
        backend.close()
    assert backend.log.totals()["checker"].attempts == 4


def test_close_ends_a_question_that_is_under_way() -> None:
    caught: list[BaseException] = []
    with FakeEndpoint(default=slow(60.0, ok(GOOD))) as endpoint:
        backend = OpenAIBackend(endpoint.settings())

        def run() -> None:
            try:
                backend.ask("checker", "?", Verdict)
            except LLMError as error:
                caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while not endpoint.requests:
            time.sleep(0.01)
        backend.close()
        backend.close()
        thread.join(30)
        assert not thread.is_alive() and len(caught) == 1
        with pytest.raises(LLMError):
            backend.ask("checker", "?", Verdict)
        assert backend.log.totals()["checker"].failed == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"base_url": "localhost:8000/v1"}, "http"),
        ({"base_url": "http://user:pass@localhost/v1"}, "password"),
        ({"api_key": None}, "ASI_LLM__API_KEY"),
        ({"api_version": "2024-10-21", "api_key": "x"}, "base_url"),
    ],
)
def test_impossible_settings_stop_the_start(
    settings: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SettingsError) as caught:
        open_llm(Llm(backend="openai", **settings))  # type: ignore[arg-type]
    assert named in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


def test_no_body_breaks_the_backend() -> None:
    bodies: list[bytes] = []
    with FakeEndpoint(default=lambda request: raw(bodies[-1])(request)) as endpoint:
        backend = OpenAIBackend(endpoint.settings(retries=0, output_mode="prompted"))

        @hypothesis.settings(max_examples=60, deadline=None, database=None)
        @hypothesis.given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6) | JSON, st.integers(0, 40))
        @hypothesis.example({"choices": [{"message": {"content": json.dumps(GOOD)}}]}, 0)
        @hypothesis.example({"choices": [{"message": None}]}, 0)
        @hypothesis.example({"choices": [{}], "usage": {"prompt_tokens": -1}}, 0)
        def answers_or_says_why(value: object, cut: int) -> None:
            body = json.dumps(value).encode()
            bodies.append(body[: len(body) - cut] if cut % 3 == 1 else body)
            try:
                assert isinstance(backend.ask("checker", "?", Verdict), Verdict)
            except LLMError as error:
                assert error.fix

        answers_or_says_why()
        backend.close()


def test_offline_asks_no_model() -> None:
    with pytest.raises(SettingsError):
        open_llm(Llm())


def test_importing_the_package_loads_no_client() -> None:
    code = "import sys, common.llm; print([m for m in ('openai', 'pydantic_ai', 'httpx2') if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
