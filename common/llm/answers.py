"""From the text a model wrote to a validated object: weak models wrap JSON in prose, fences and thoughts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from common.llm.interface import Answer

__all__ = ["UnusableAnswerError", "instructions", "parse", "schema"]

_THOUGHTS = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL)
_STARTS = 64
"""Opening braces tried before a text is given up: enough for prose with formulas before the object."""


class UnusableAnswerError(Exception):
    """The text holds no object of the asked form. The message is fed back to the model."""


def schema(output: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of `output`, with field descriptions and bounds."""
    return output.model_json_schema()


def instructions(output: type[BaseModel]) -> str:
    """Asks for one JSON object of the schema of `output`."""
    return (
        "Answer with exactly one JSON object that fits the JSON schema below, and nothing before or after it. Inside "
        'strings write line breaks as \\n and double quotes as \\".\n\n'
        f"JSON schema:\n{json.dumps(schema(output), ensure_ascii=False)}"
    )


def parse(text: str, output: type[Answer]) -> Answer:
    """The first JSON object in `text` that validates as `output`.

    Raises:
        UnusableAnswerError: there is none; says what was wrong with the best candidate.
    """
    if not text.strip():
        raise UnusableAnswerError("the answer was empty")
    complaint = "there was no JSON object in the answer"
    for candidate in _objects(_THOUGHTS.sub("", text)):
        try:
            return output.model_validate(_encodable(candidate))
        except ValidationError as error:
            complaint = "; ".join(_explain(dict(item)) for item in error.errors()[:5])
    raise UnusableAnswerError(complaint)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    # Not strict: raw line breaks inside strings are what weak models write when asked for a program.
    decoder = json.JSONDecoder(strict=False)
    position = text.find("{")
    for _ in range(_STARTS):
        if position < 0:
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError):
            end = position + 1
        else:
            if isinstance(value, dict):
                yield value
        position = text.find("{", end)


def _encodable(value: Any) -> Any:
    """`value` without lone surrogates, which JSON can spell but no file or database can store."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return value


def _explain(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "the object"
    return f"{where}: {item['msg']}"
