"""Any OpenAI-compatible endpoint, or Azure, through pydantic-ai.

pydantic-ai and openai take seconds to import, so this module imports them when a backend is built. Retries, usage and
validation are ours: the SDK loses the usage of a call that ends in an error, and takes a 200 with any body for success.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import uuid
from collections.abc import Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from common.errors import LLMError, SettingsError
from common.knobs import Llm
from common.llm.answers import instructions
from common.llm.calls import Call, CallLog, Outcome, Stopwatch
from common.llm.interface import Answer, NoUsableAnswerError
from common.llm.wire import Attempt, Mode, failed, parameters, read, usage, with_complaint

if TYPE_CHECKING:
    from pydantic_ai.models.openai import OpenAIChatModel

__all__ = ["OpenAIBackend"]

OFFICIAL = "https://api.openai.com/v1"
LONGEST_WAIT = 60.0

_FIXES: dict[Outcome, str] = {
    "unusable": "use a stronger model, or set llm.output_mode to the one the endpoint supports best",
    "truncated": "raise llm.max_tokens",
    "declined": "use another model: this one declines to answer",
    "rejected": "check llm.model, llm.api_key, llm.output_mode and llm.context_chars against the endpoint's message",
    "rate_limited": "wait, lower run.parallel, or raise llm.retries and llm.backoff",
    "server_error": "look at the endpoint's log; raise llm.retries if it recovers by itself",
    "malformed": "check that llm.base_url names the API itself (it usually ends in /v1), not a web page",
    "lost": "check that the endpoint runs and that llm.base_url is right",
    "timeout": "raise llm.timeout, or lower llm.max_tokens",
}


@dataclass
class _Exchange:
    """The body of the last response, kept beside the SDK so that its usage counts even when the SDK gives up."""

    body: bytes = b""


_exchange: ContextVar[_Exchange] = ContextVar("_exchange")


class OpenAIBackend:
    """An `LLM` over /chat/completions.

    `output_mode` auto asks with a JSON schema the endpoint must follow (native) and falls back to asking in words
    (prompted) when the endpoint refuses or ignores the schema; it remembers what worked. The schema is in the system
    text in every mode.

    Raises:
        SettingsError: no key for OpenAI, or a base_url that is none.
    """

    def __init__(self, settings: Llm, log: CallLog | None = None) -> None:
        self._settings = settings
        self._log = log or CallLog()
        self._official = settings.base_url is None
        key = settings.api_key.get_secret_value() if settings.api_key else ""
        if self._official and not key:
            key = os.environ.get("OPENAI_API_KEY", "")
        _check(settings, key)
        self._log.hide(key)
        self._mode: Mode = "native" if settings.output_mode == "auto" else settings.output_mode
        self._ignored = 0
        """Questions in a row that native mode failed and prompted mode then answered."""
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        self._model = self._build(key or "none")

    @property
    def log(self) -> CallLog:
        return self._log

    def ask(self, role: str, prompt: str, output: type[Answer], system: str = "") -> Answer:
        return self._run(self._ask(role, prompt, output, system), role)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True

        async def finish() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._model.client.close()

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Answer], role: str) -> Answer:
        from concurrent.futures import CancelledError

        if self._closed:
            work.close()
            raise LLMError(f"{role}: the language model is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise LLMError(f"{role}: the call was cancelled") from error
        except BaseException:
            future.cancel()
            raise

    def _build(self, key: str) -> OpenAIChatModel:
        import httpx2
        from openai import AsyncAzureOpenAI, AsyncOpenAI
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.profiles.openai import OpenAIModelProfile
        from pydantic_ai.providers.openai import OpenAIProvider
        from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider

        settings = self._settings

        async def keep(response: httpx2.Response) -> None:
            _exchange.get(_Exchange()).body = await response.aread()

        http = httpx2.AsyncClient(event_hooks={"response": [keep]}, timeout=settings.timeout)
        client: AsyncOpenAI
        if settings.api_version:
            client = AsyncAzureOpenAI(
                azure_endpoint=settings.base_url or "",
                api_version=settings.api_version,
                api_key=key,
                max_retries=0,
                http_client=http,
            )
        else:
            client = AsyncOpenAI(base_url=settings.base_url or OFFICIAL, api_key=key, max_retries=0, http_client=http)
        profile = OpenAIModelProfile(supports_json_schema_output=True)
        if not self._official and not settings.api_version:
            # Local servers know max_tokens; several ignore or refuse the newer name.
            profile["openai_chat_supports_max_completion_tokens"] = False
            return OpenAIChatModel(
                settings.model, provider=OpenAICompatibleProvider("endpoint", openai_client=client), profile=profile
            )
        return OpenAIChatModel(settings.model, provider=OpenAIProvider(openai_client=client), profile=profile)

    async def _ask(self, role: str, prompt: str, output: type[Answer], system: str) -> Answer:
        standing = f"{system}\n\n{instructions(output)}".strip()
        identity, mode, question = uuid.uuid4().hex[:12], self._mode, prompt
        tries, delay, number, fell = self._settings.retries + 1, self._settings.backoff, 0, ""
        while True:
            number += 1
            watch = Stopwatch()
            call = Call(
                call=identity,
                attempt=number,
                role=role,
                model=self._settings.model,
                mode=mode,
                output=output.__name__,
                system=standing,
                prompt=question,
                answer=None,
                outcome="cancelled",
                seconds=0.0,
            )
            try:
                attempt = await self._attempt(question, standing, output, mode)
            except asyncio.CancelledError:
                self._log.add(replace(call, seconds=watch.seconds()))
                raise
            self._log.add(self._filled(call, attempt, watch))
            if isinstance(attempt.value, output):
                self._remember(mode, fell)
                return attempt.value
            if self._may_fall(mode, attempt):
                mode, fell = "prompted", attempt.outcome
                if attempt.final:
                    continue  # the endpoint refused the schema, not the question: no try is used up
            tries -= 1
            if attempt.final or tries <= 0:
                raise self._error(role, number, attempt)
            question = with_complaint(prompt, attempt)
            if attempt.outcome not in ("unusable", "truncated", "declined"):
                await asyncio.sleep(min(LONGEST_WAIT, max(attempt.wait or 0.0, delay * random.uniform(0.75, 1.25))))
                delay *= 2

    async def _attempt(self, prompt: str, system: str, output: type[BaseModel], mode: Mode) -> Attempt:
        from openai import OpenAIError
        from pydantic_ai.direct import model_request
        from pydantic_ai.exceptions import AgentRunError
        from pydantic_ai.messages import ModelRequest, UserPromptPart
        from pydantic_ai.settings import ModelSettings

        settings = ModelSettings(max_tokens=self._settings.max_tokens, timeout=self._settings.timeout)
        if self._settings.temperature is not None:
            settings["temperature"] = self._settings.temperature
        exchange = _Exchange()
        _exchange.set(exchange)
        try:
            # The client's own timeout starts anew with every byte: this one bounds the whole answer.
            response = await asyncio.wait_for(
                model_request(
                    self._model,
                    [ModelRequest(parts=[UserPromptPart(prompt)], instructions=system)],
                    model_settings=settings,
                    model_request_parameters=parameters(output, mode),
                ),
                self._settings.timeout,
            )
        except TimeoutError:
            attempt = Attempt("timeout", error=f"no answer within {self._settings.timeout:g} s")
        except (AgentRunError, OpenAIError) as error:
            attempt = failed(error)
        except (IndexError, AttributeError, KeyError, TypeError, ValueError) as error:
            # What pydantic-ai raises on bodies such as {"choices": []}.
            attempt = Attempt("malformed", error=f"the body is no completion ({type(error).__name__}: {error})")
        else:
            attempt = read(response, output)
        if attempt.text is None and exchange.body and attempt.outcome != "ok":
            attempt = replace(attempt, text=exchange.body[:4000].decode("utf-8", "replace"))
        sent, received = usage(exchange.body)
        return replace(attempt, input_tokens=sent, output_tokens=received)

    def _filled(self, call: Call, attempt: Attempt, watch: Stopwatch) -> Call:
        return replace(
            call,
            answer=attempt.text,
            outcome=attempt.outcome,
            seconds=watch.seconds(),
            input_tokens=attempt.input_tokens,
            output_tokens=attempt.output_tokens,
            cost=self._cost(attempt),
            finish_reason=attempt.finish_reason,
            error=attempt.error or None,
        )

    def _cost(self, attempt: Attempt) -> float | None:
        prices = self._settings.input_price, self._settings.output_price
        tokens = attempt.input_tokens, attempt.output_tokens
        if prices[0] is None or prices[1] is None or tokens[0] is None or tokens[1] is None:
            return None
        return (prices[0] * tokens[0] + prices[1] * tokens[1]) / 1e6

    def _may_fall(self, mode: Mode, attempt: Attempt) -> bool:
        return self._settings.output_mode == "auto" and mode == "native" and attempt.schema_suspected

    def _remember(self, mode: Mode, fell: str) -> None:
        """Keeps to prompted mode once native was refused outright, or was ignored in two questions in a row."""
        if mode == "native":
            self._ignored = 0
        elif fell:
            self._ignored += 2 if fell == "rejected" else 1
            if self._ignored >= 2:
                self._mode = "prompted"

    def _error(self, role: str, attempts: int, attempt: Attempt) -> LLMError:
        where = f"{self._settings.model} at {self._settings.base_url or OFFICIAL}"
        times = "once" if attempts == 1 else f"{attempts} times"
        got = f"{attempt.outcome}: {attempt.error[:1000]}"
        text = f"{role}: expected a usable answer of {where}, asked {times}, got {got}"
        kind = NoUsableAnswerError if attempt.outcome in ("unusable", "truncated", "declined") else LLMError
        return kind(self._log.redact(text), _FIXES.get(attempt.outcome, ""))


def _check(settings: Llm, key: str) -> None:
    if settings.base_url is None:
        if settings.api_version:
            raise SettingsError(
                "llm.api_version is set (Azure) without llm.base_url",
                "set llm.base_url to the resource's endpoint, such as https://NAME.openai.azure.com",
            )
        if not key:
            raise SettingsError(
                "llm.backend is openai, and there is no key for OpenAI's own endpoint",
                "set ASI_LLM__API_KEY, or ASI_LLM__BASE_URL to another endpoint, or --llm.backend offline",
            )
        return
    parts = urlsplit(settings.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(
            f"llm.base_url: expected an http(s) URL, got {settings.base_url!r}",
            "write it like http://localhost:8000/v1",
        )
    if parts.username or parts.password:
        raise SettingsError(
            "llm.base_url holds a password, and settings are written to files", "use llm.api_key instead"
        )
