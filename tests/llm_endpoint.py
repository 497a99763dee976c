"""A loopback HTTP server that speaks /chat/completions, with scripted behaviours: the double of an LLM endpoint.

    with FakeEndpoint([html(), status(429, retry_after=0), ok({"experience": "..."})]) as endpoint:
        settings = endpoint.settings(retries=3)

Behaviours are used up in order, one a request; then `default` answers. The server runs in the test's process.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from common.knobs import Llm

__all__ = [
    "Behaviour",
    "FakeEndpoint",
    "Request",
    "broken_json",
    "closes",
    "drip",
    "empty_choices",
    "html",
    "ok",
    "planner_answering",
    "raw",
    "slow",
    "status",
]


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    def text(self) -> str:
        """All message texts, in order."""
        return "\n\n".join(_text(message.get("content")) for message in self.body.get("messages", []))

    def properties(self) -> dict[str, Any]:
        """The properties of the asked schema, wherever the output mode puts it; empty where there is none."""
        form = self.body.get("response_format", {}).get("json_schema", {}).get("schema")
        if form is None and self.body.get("tools"):
            form = self.body["tools"][0]["function"]["parameters"]
        if form is None:
            form = _schema_in(self.text())
        return dict((form or {}).get("properties", {}))

    @property
    def mode(self) -> str:
        if "response_format" in self.body:
            return "native"
        return "tool" if self.body.get("tools") else "prompted"


@dataclass(frozen=True)
class Response:
    status: int = 200
    body: bytes = b""
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    """Close the connection without a word."""
    drip: float = 0.0
    """Send the body over so many seconds, in twenty pieces."""


Behaviour = Callable[[Request], Response]


def ok(
    answer: str | dict[str, Any], finish: str = "stop", usage: tuple[int, int] | None = (120, 30), as_tool: bool = False
) -> Behaviour:
    """A completion whose content is `answer` (a dict is sent as JSON), as a tool call when `as_tool` or asked so."""
    text = answer if isinstance(answer, str) else json.dumps(answer)

    def respond(request: Request) -> Response:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if as_tool or (request.mode == "tool" and not isinstance(answer, str)):
            call = {"id": "call-1", "type": "function", "function": {"name": "answer", "arguments": text}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        return _json(_completion(request, [{"index": 0, "message": message, "finish_reason": finish}], usage))

    return respond


def html() -> Behaviour:
    """A 200 that carries a web page, as a misconfigured proxy sends it."""
    return lambda request: Response(200, b"<html><body>Welcome to the gateway</body></html>", "text/html")


def broken_json() -> Behaviour:
    """A 200 whose JSON body breaks off."""
    return lambda request: Response(200, b'{"id": "x", "choices": [{"message": {"content": "hal')


def empty_choices(usage: tuple[int, int] | None = (7, 0)) -> Behaviour:
    """A completion without a choice."""
    return lambda request: _json(_completion(request, [], usage))


def status(code: int, message: str = "scripted", retry_after: float | None = None) -> Behaviour:
    """An error in the API's own form."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    body = json.dumps({"error": {"message": message, "type": "scripted", "code": None}}).encode()
    return lambda request: Response(code, body, headers=headers)


def slow(seconds: float, then: Behaviour) -> Behaviour:
    """Waits, then behaves like `then`."""

    def respond(request: Request) -> Response:
        time.sleep(seconds)
        return then(request)

    return respond


def drip(seconds: float, then: Behaviour) -> Behaviour:
    """Like `then`, but the body trickles in."""
    return lambda request: replace(then(request), drip=seconds)


def raw(body: bytes, code: int = 200) -> Behaviour:
    """Any bytes, called JSON."""
    return lambda request: Response(code, body)


def closes() -> Behaviour:
    """Hangs up without an answer."""
    return lambda request: Response(drop=True)


class FakeEndpoint:
    """The server. `requests` holds what came, in order; `url` is the base URL that clients take."""

    def __init__(self, script: Iterable[Behaviour] = (), default: Behaviour | None = None) -> None:
        self.requests: list[Request] = []
        self._script = list(script)
        self._default = default or status(500, "the script of this endpoint is used up")
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                endpoint._serve(self)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet: `requests` is the log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.root = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.root}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FakeEndpoint:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def settings(self, **changes: Any) -> Llm:
        """Settings of an OpenAIBackend that asks this server, without waiting between tries."""
        values: dict[str, Any] = {
            "backend": "openai",
            "base_url": self.url,
            "model": "double",
            "api_key": "sk-double-0123456789",
            "backoff": 0.0,
            "timeout": 20.0,
        }
        return Llm(**{**values, **changes})

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        headers = {key.lower(): value for key, value in handler.headers.items()}
        request = Request(handler.path, headers, json.loads(raw))
        with self._lock:
            self.requests.append(request)
            behaviour = self._script.pop(0) if self._script else self._default
        response = behaviour(request)
        if response.drop:
            handler.close_connection = True
            return
        try:
            handler.send_response(response.status)
            handler.send_header("Content-Type", response.kind)
            handler.send_header("Content-Length", str(len(response.body)))
            for key, value in response.headers.items():
                handler.send_header(key, value)
            handler.end_headers()
            for piece in _pieces(response.body, 20 if response.drip else 1):
                handler.wfile.write(piece)
                handler.wfile.flush()
                time.sleep(response.drip / 20)
        except ConnectionError:
            handler.close_connection = True  # the client gave up waiting


def planner_answering(
    program: str | Callable[[int], str], motivation: str | Callable[[int], str] | None = None
) -> Behaviour:
    """Answers every role of the loop sensibly, by the fields it is asked for.

    Args:
        program: the program each planner, code checker and debugger answer holds; or a function of the number of
            programs handed out before.
        motivation: likewise; by default a text that names its number, so that no two are alike.
    """
    numbers = itertools.count()
    lock = threading.Lock()

    def fields(number: int) -> dict[str, Any]:
        text = program if isinstance(program, str) else program(number)
        why = motivation if isinstance(motivation, str) else motivation(number) if motivation else _why(number)
        return {
            "name": f"delta_net_double_{number}",
            "motivation": why,
            "change": f"Variant {number} of the mixer that the double proposes.",
            "program": text,
            "is_repeated": False,
            "repeated_index": [],
            "judgement_reason": "The mechanism differs from every earlier motivation shown.",
            "fixed": True,
            "changes_made": f"Wrote variant {number} in place of the program that failed.",
            "experience": "A mixer close to its parent trains like its parent; look for structural changes.",
            **dict.fromkeys(_ANALYSIS, "The run finished; its losses stand beside the baseline's in the record."),
        }

    def respond(request: Request) -> Response:
        wanted = request.properties()
        number = 0
        if "program" in wanted:
            with lock:
                number = next(numbers)
        known = fields(number)
        return ok({key: known[key] for key in wanted})(request)

    return respond


_ANALYSIS = (
    "design_evaluation",
    "experimental_results_analysis",
    "expectation_vs_reality_comparison",
    "theoretical_explanation_with_evidence",
    "synthesis_and_insights",
)

_IDEAS = (
    "a per-channel forget gate driven by the token keeps the state from saturating on long inputs",
    "two convolution widths side by side separate local syntax from slower topical drift",
    "a learnt temperature on the write strength lets early layers overwrite and late layers accumulate",
    "normalising queries by their running energy bounds the read-out when keys are correlated",
    "a second low-rank state for rare tokens protects associations from interference",
    "mixing the previous token into keys alone gives induction without a wider convolution",
)


def _why(number: int) -> str:
    return f"Idea {number}: {_IDEAS[number % len(_IDEAS)]}, which should lower held-out loss at equal size."


def _completion(request: Request, choices: list[dict[str, Any]], usage: tuple[int, int] | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": "chatcmpl-double",
        "object": "chat.completion",
        "created": 1,
        "model": request.body.get("model", ""),
        "choices": choices,
    }
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return body


def _json(body: dict[str, Any]) -> Response:
    return Response(200, json.dumps(body).encode())


def _pieces(body: bytes, count: int) -> list[bytes]:
    size = max(1, -(-len(body) // count))
    return [body[start : start + size] for start in range(0, len(body), size)]


def _text(content: object) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _schema_in(text: str) -> dict[str, Any] | None:
    decoder = json.JSONDecoder()
    position = text.find("{")
    while position >= 0:
        try:
            value, _ = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict) and "properties" in value:
            return value
        position = text.find("{", position + 1)
    return None
