"""A language model that reads from a script: for tests, and for replaying a recorded run."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence

from pydantic import BaseModel

from common.errors import LLMError
from common.llm.answers import UnusableAnswerError, parse
from common.llm.calls import Call, CallLog, Outcome, Stopwatch
from common.llm.interface import Answer, NoUsableAnswerError

__all__ = ["Reply", "ScriptedBackend"]

Reply = BaseModel | dict[str, object] | str | Exception
"""An answer as an object, as raw text of the model (parsed like an endpoint's), or an error to raise."""


class ScriptedBackend:
    """Answers from a list, in order, or from a function of (role, prompt, output).

    Raises LLMError when the list is used up, NoUsableAnswerError when an answer does not fit. Nothing is asked twice.
    """

    def __init__(
        self,
        answers: Sequence[Reply] | Callable[[str, str, type[BaseModel]], Reply],
        log: CallLog | None = None,
    ) -> None:
        self._answers = answers if callable(answers) else list(answers)
        self._log = log or CallLog()
        self._lock = threading.Lock()
        self.calls: list[Call] = []

    @property
    def log(self) -> CallLog:
        return self._log

    def ask(self, role: str, prompt: str, output: type[Answer], system: str = "") -> Answer:
        watch = Stopwatch()
        reply = self._next(role, prompt, output)
        answer: Answer | None = None
        text: str | None = None
        error = ""
        outcome: Outcome = "ok"
        if isinstance(reply, Exception):
            outcome, error = "lost", str(reply)
        else:
            text = reply if isinstance(reply, str) else _json(reply)
            try:
                answer = parse(text, output)
            except UnusableAnswerError as problem:
                outcome, error = "unusable", str(problem)
        call = Call(
            call=uuid.uuid4().hex[:12],
            attempt=1,
            role=role,
            model="script",
            mode="scripted",
            output=output.__name__,
            system=system,
            prompt=prompt,
            answer=text,
            outcome=outcome,
            seconds=watch.seconds(),
            error=error or None,
        )
        recorded = self._log.add(call)
        with self._lock:
            self.calls.append(recorded)
        if isinstance(reply, Exception):
            raise reply
        if answer is None:
            raise NoUsableAnswerError(f"{role}: the scripted answer does not fit {output.__name__}: {error}")
        return answer

    def close(self) -> None:
        """Nothing to free."""

    def _next(self, role: str, prompt: str, output: type[BaseModel]) -> Reply:
        if callable(self._answers):
            return self._answers(role, prompt, output)
        with self._lock:
            if not self._answers:
                return LLMError(f"{role}: the script has no answer left", "add one to the script")
            return self._answers.pop(0)


def _json(reply: BaseModel | dict[str, object]) -> str:
    import json

    return reply.model_dump_json() if isinstance(reply, BaseModel) else json.dumps(reply)
