"""What the roles know of a language model."""

from __future__ import annotations

from typing import Protocol, TypeVar

from pydantic import BaseModel

from common.errors import LLMError
from common.llm.calls import CallLog

__all__ = ["LLM", "Answer", "NoUsableAnswerError"]

Answer = TypeVar("Answer", bound=BaseModel)


class NoUsableAnswerError(LLMError):
    """The endpoint works, but its model gave no answer of the asked form: this question failed, others may not."""


class LLM(Protocol):
    """Answers prompts with typed objects. Safe to use from several threads."""

    @property
    def log(self) -> CallLog:
        """Every call made, with its usage."""

    def ask(self, role: str, prompt: str, output: type[Answer], system: str = "") -> Answer:
        """Asks once and returns a validated `output`; waits, and tries again as the backend is set to.

        Args:
            role: who asks, for the record: "planner", "debugger" ...
            prompt: the question, with all the data it needs.
            output: a pydantic model whose strings are bounded; its field descriptions reach the model.
            system: standing instructions.

        Raises:
            NoUsableAnswerError: the model's answers were cut, declined or of another form.
            LLMError: the endpoint failed, with what to do about it.
        """

    def close(self) -> None:
        """Ends calls that are under way (they raise LLMError) and frees the connections."""
