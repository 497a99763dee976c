"""Between pydantic-ai's messages and ours: request parameters, answers, errors, usage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from common.llm.answers import UnusableAnswerError, parse, schema
from common.llm.calls import Outcome

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelResponse
    from pydantic_ai.models import ModelRequestParameters

__all__ = ["Attempt", "Mode", "failed", "parameters", "read", "usage", "with_complaint"]

Mode = Literal["tool", "native", "prompted"]


@dataclass(frozen=True)
class Attempt:
    """How one attempt at a question ended."""

    outcome: Outcome
    value: BaseModel | None = None
    text: str | None = None
    error: str = ""
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    wait: float | None = None
    """Seconds the endpoint asked to wait."""
    final: bool = False
    """Trying the same again cannot help."""
    schema_suspected: bool = False
    """The endpoint may not know the JSON schema it was given, and asking in words may help."""


def parameters(output: type[BaseModel], mode: Mode) -> ModelRequestParameters:
    """What makes the endpoint answer in the form of `output`."""
    from pydantic_ai.models import ModelRequestParameters
    from pydantic_ai.output import OutputObjectDefinition
    from pydantic_ai.tools import ToolDefinition

    if mode == "native":
        form = OutputObjectDefinition(json_schema=schema(output), name=output.__name__)
        return ModelRequestParameters(output_mode="native", output_object=form, allow_text_output=True)
    if mode == "tool":
        tool = ToolDefinition(
            name="answer", description="Hands in the answer.", parameters_json_schema=schema(output), kind="output"
        )
        return ModelRequestParameters(output_mode="tool", output_tools=[tool], allow_text_output=False)
    return ModelRequestParameters(output_mode="text", allow_text_output=True)


def read(response: ModelResponse, output: type[BaseModel]) -> Attempt:
    """The answer in a completed response."""
    from pydantic_ai.messages import TextPart, ToolCallPart

    # A tool call first; a model that ignores tools answers in text, which is as good if it fits.
    texts = [part.args_as_json_str() for part in response.parts if isinstance(part, ToolCallPart)]
    texts.append("".join(part.content for part in response.parts if isinstance(part, TextPart)))
    text = next((text for text in texts if text.strip()), "")
    reason = response.finish_reason
    if reason == "length":
        error = "the answer was cut at the token limit, before its end"
        return Attempt("truncated", text=text, error=error, finish_reason=reason)
    if reason == "content_filter":
        return Attempt("declined", text=text, error="the model declined to answer", finish_reason=reason)
    try:
        return Attempt("ok", value=parse(text, output), text=text, finish_reason=reason)
    except UnusableAnswerError as error:
        return Attempt("unusable", text=text, error=str(error), finish_reason=reason, schema_suspected=True)


def failed(error: Exception) -> Attempt:
    """What an error of pydantic-ai or openai means for the question."""
    from pydantic_ai import exceptions as kinds

    message = str(error)
    wait = getattr(error, "retry_after", None)
    status = getattr(error, "status_code", None)
    if isinstance(error, kinds.ModelAuthenticationError):
        return Attempt("rejected", error=f"authentication failed: {message}", final=True)
    if isinstance(error, kinds.ModelQuotaExceededError):
        return Attempt("rejected", error=f"no credit left: {message}", final=True)
    if isinstance(error, kinds.ModelRateLimitError) or status == 429:
        return Attempt("rate_limited", error=message, wait=wait)
    if isinstance(error, kinds.ModelTimeoutError | kinds.ModelRequestTimeout) or status == 408:
        return Attempt("timeout", error=message)
    if isinstance(error, kinds.ModelConnectionError):
        return Attempt("lost", error=message)
    if status is not None and status >= 500:
        return Attempt("server_error", error=message, wait=wait, schema_suspected=True)
    if isinstance(error, kinds.ModelContextWindowExceededError):
        return Attempt("rejected", error=f"the prompt is too long for the model: {message}", final=True)
    if isinstance(error, kinds.ModelRequestRejectedError) or status is not None:
        return Attempt("rejected", error=message, final=True, schema_suspected=True)
    return Attempt("malformed", error=f"the body is no completion: {message}")


def usage(body: bytes) -> tuple[int | None, int | None]:
    """(input, output) tokens that a response body reports, whatever else is wrong with it; None for what is no
    number of tokens."""
    try:
        usage = json.loads(body)["usage"]
        values = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, None
    sent, received = (value if isinstance(value, int) and 0 <= value <= 2**53 else None for value in values)
    return sent, received


def with_complaint(prompt: str, attempt: Attempt) -> str:
    """The question again, with what was wrong with the last answer."""
    if attempt.outcome == "unusable":
        return f"{prompt}\n\nYour last answer could not be used: {attempt.error}. Answer again, as one JSON object."
    if attempt.outcome == "truncated":
        return f"{prompt}\n\nYour last answer was cut off: it was too long. Answer again, and keep every text short."
    return prompt
