"""What the lines of an export, or of another file of elements, say: read and checked without a store."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from common.records import Baseline, RunRecord, Usage
from database import keys
from database.entries import refuse_unfit
from database.errors import NotFoundError, RefusedError
from database.evaluate_agent.rubric import Novelty
from database.evaluate_agent.verdict import Verdict
from database.models import NewElement, PostedElement, Text
from database.possible import NewBaseline, NewRun, NewUsage
from database.store import MAX_INDEX

__all__ = [
    "REFUSING",
    "Refusal",
    "is_integer",
    "kind_of",
    "look_over",
    "read_answer",
    "read_baseline",
    "read_element",
    "read_novelty",
    "read_usage",
    "read_verdict",
    "reason_of",
]

Kind = Literal["element", "baseline", "usage", "answer", "candidates"]
_RUNS: TypeAdapter[RunRecord] = TypeAdapter(NewRun)
_BASELINES: TypeAdapter[Baseline] = TypeAdapter(NewBaseline)
_USAGE: TypeAdapter[Usage] = TypeAdapter(NewUsage)
_TEXT: TypeAdapter[str] = TypeAdapter(Text)
_BESIDE: tuple[Kind, ...] = ("baseline", "usage", "answer", "candidates")
_KEY_LENGTH = 300
REFUSING = (ValidationError, RefusedError, NotFoundError, RecursionError)
"""What a line that cannot be taken raises."""


@dataclass(frozen=True)
class Refusal:
    """A line that was not stored. Lines are counted from 1."""

    line: int
    reason: str


def look_over(path: Path) -> tuple[bool, Refusal | None]:
    """What a restore of this file could come to, without a store: whether some line has the form of one that is
    exported, or of a bare element; and the first refusal where no element of the file can be stored.

    Raises:
        OSError: it cannot be read.
    """
    known, first = False, None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            kind = kind_of(value) if isinstance(value, dict) else None
            if kind is None:
                continue
            known = True
            if kind != "element":
                continue
            try:
                refuse_unfit(*read_element(value, backup=True)[:2])
            except REFUSING as error:
                first = first or Refusal(number, reason_of(error))
            else:
                return True, None
    return known, first


def kind_of(value: dict[str, Any]) -> Kind | None:
    """Which line this object is; None for none. A bare element may have any other field beside."""
    if "element" in value or "program" in value:
        return "element"
    return next((kind for kind in _BESIDE if kind in value), None)


def read_element(value: dict[str, Any], backup: bool) -> tuple[NewElement, RunRecord | None, str | None]:
    """The element of a line, without its parent, its run, and the idempotency key under which it was stored.

    Args:
        backup: what was taken once is taken, though it would be refused today.

    Raises:
        ValidationError, RefusedError: they are none.
    """
    given = value.get("element", value)
    runs = value.get("runs") or []
    if not isinstance(given, dict) or not isinstance(runs, list) or len(runs) > 1:
        raise RefusedError("expected an element, an object, with at most one run in a list")
    alone = {**given, "parent": None}
    element = NewElement.model_validate(alone) if backup else PostedElement.model_validate(alone)
    # A bare element is of another program, whose "key" is no key of ours.
    key = value.get("key") if "element" in value else None
    if key is not None:
        key = _TEXT.validate_python(key, strict=True)
        if not key.startswith(keys.OF_ELEMENTS) or len(key) > _KEY_LENGTH:
            begins = " or ".join(keys.OF_ELEMENTS)
            raise RefusedError(f"expected a key of at most {_KEY_LENGTH} characters after {begins}, got {key[:40]!r}")
    if not runs:
        return element, None, key
    return element, RunRecord.model_validate(runs[0]) if backup else _RUNS.validate_python(runs[0]), key


def read_verdict(value: dict[str, Any]) -> Verdict | None:
    """What a model said of the element of a line.

    Raises:
        ValidationError: it is none.
    """
    given = value.get("verdict") if "element" in value else None
    return None if given is None else Verdict.model_validate(given)


def read_novelty(value: dict[str, Any]) -> Novelty | None:
    """The distances that were measured when the element of a line was new.

    Raises:
        ValidationError, RefusedError: they are none.
    """
    given = value.get("novelty") if "element" in value else None
    if given is None:
        return None
    novelty = Novelty.model_validate(given, strict=True)
    for name, distance, index in (
        ("motivation", novelty.motivation, novelty.motivation_index),
        ("program", novelty.program, novelty.program_index),
    ):
        if distance is not None and not 0 <= distance <= 1:
            raise RefusedError(f"novelty.{name}: expected a distance from 0 to 1, got {distance:g}")
        if index is not None and not 0 < index <= MAX_INDEX:
            raise RefusedError(f"novelty.{name}_index: expected the index of an element, got {str(index)[:40]}")
    return novelty


def read_baseline(value: dict[str, Any], backup: bool) -> Baseline:
    given = value["baseline"]
    return Baseline.model_validate(given) if backup else _BASELINES.validate_python(given)


def read_usage(value: dict[str, Any], backup: bool) -> tuple[Usage, int | None]:
    """The record, and its number in the store that it comes from, where that is told."""
    given, number = value["usage"], value.get("number")
    if number is not None and not (is_integer(number) and 0 < number <= MAX_INDEX):
        raise RefusedError(f"expected the number of a record of usage, a positive integer, got {str(number)[:40]}")
    return (Usage.model_validate(given) if backup else _USAGE.validate_python(given)), number


def read_answer(value: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Route, key and what a write was answered.

    Raises:
        ValidationError, RefusedError: it is none.
    """
    given = value["answer"]
    if not isinstance(given, dict) or not isinstance(given.get("body"), dict):
        raise RefusedError("expected answer as an object of route, key and body, an object")
    route, key = (_TEXT.validate_python(given.get(name), strict=True) for name in ("route", "key"))
    if route in keys.IMPORTS:
        raise RefusedError("expected no answer to an import: its lines are another file's")
    return route, key, given["body"]


def reason_of(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])
    return str(error) or "nested too deeply"


def is_integer(value: Any) -> bool:
    """True is an int to Python, and would be element 1."""
    return isinstance(value, int) and not isinstance(value, bool)
