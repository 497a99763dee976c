"""The base of what a person writes by hand: knobs of the settings, values of a profile."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

__all__ = ["StrictModel", "refuse_boolean", "refuse_text", "types_in"]


class StrictModel(BaseModel):
    """Refuses keys that it does not know, and a boolean where a number is meant: `steps = true` is no 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_boolean(cls, value, info)
        return value


def refuse_boolean(model: type[BaseModel], value: Any, info: ValidationInfo) -> None:
    """Refuses a boolean in a field of `model` that holds numbers: to Python true is 1."""
    if any(isinstance(item, bool) for item in _within(value)):
        allowed = types_in(model.model_fields[info.field_name or ""].annotation)
        if allowed & {int, float} and bool not in allowed:
            raise PydanticCustomError("boolean_for_number", "Input should be a number")


def refuse_text(model: type[BaseModel], value: Any, info: ValidationInfo) -> None:
    """Refuses a text in a field of `model` that holds numbers, of which "1" would be read as 1."""
    text = next((item for item in _within(value) if isinstance(item, str)), None)
    if text is not None and _holds_numbers(model, info.field_name or ""):
        raise PydanticCustomError(
            "text_for_number", "expected a number, got the text {given}", {"given": json.dumps(text[:40])}
        )


def _within(value: Any) -> Iterable[Any]:
    """What a dictionary or list holds; else the value itself."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else (value,)


@functools.cache
def _holds_numbers(model: type[BaseModel], name: str) -> bool:
    """Whether the field, or each value of it where it is a dictionary, is a number and no text."""
    annotation = model.model_fields[name].annotation
    kinds = types_in(get_args(annotation)[1] if get_origin(annotation) is dict else annotation)
    return bool(kinds & {int, float}) and str not in kinds


def types_in(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of: {int, NoneType} for `list[int] | None`."""
    inner = get_args(annotation)
    return set().union(*map(types_in, inner)) if inner else {annotation}
