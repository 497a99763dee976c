"""items.json of a run: what it scored on every single benchmark item, so that two runs can be compared item by item.

Two runs answer the same items, in the same order, where their baseline keys are equal. Compact: right and wrong are one
character an item. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from common.errors import StoreError
from common.files import read_json, write_json

__all__ = ["FILE", "RunItems", "TaskItems", "of_run", "packed", "read_items", "write_items"]

FILE = "items.json"
DIGITS = 4
"""Decimals kept of a number of bits."""


class TaskItems(BaseModel):
    """One task: the score of each item, and the bits per byte of its correct answer (None where there is none)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    right: str | None = Field(None, pattern=r"^[01]*$")
    """One character an item, 1 for right; None where items score between 0 and 1."""
    partial: list[FiniteFloat] | None = None
    """The score of each item, where it is not just right or wrong."""
    bits_per_byte: list[FiniteFloat] | None = None

    @property
    def scores(self) -> list[float]:
        return [float(mark) for mark in self.right] if self.right is not None else list(self.partial or ())


class RunItems(BaseModel):
    """All tasks of one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    run_id: str
    name: str
    seed: int
    baseline_key: str
    tasks: dict[str, TaskItems]


def packed(scores: Sequence[float], bits_per_byte: Sequence[float] | None) -> dict[str, Any]:
    """A task's items as plain JSON, from the score of each and the bits per byte of each correct answer."""
    bits = None if bits_per_byte is None else [round(value, DIGITS) for value in bits_per_byte]
    if all(score in (0, 1) for score in scores):
        return {"right": "".join(str(int(score)) for score in scores), "bits_per_byte": bits}
    return {"partial": [round(score, DIGITS) for score in scores], "bits_per_byte": bits}


def write_items(folder: Path, items: RunItems) -> None:
    """Raises:
    StoreError: the folder cannot be written.
    """
    write_json(folder / FILE, items.model_dump(mode="json", exclude_none=True))


def read_items(path: Path) -> RunItems | None:
    """The items of one run; None where there is no such file, or a damaged one: without it nothing is compared."""
    if not path.is_file():
        return None
    try:
        return RunItems.model_validate(read_json(path))
    except (StoreError, ValidationError):
        return None


def of_run(run_id: str, name: str, seed: int, baseline_key: str, tasks: Mapping[str, Any]) -> RunItems:
    """From what the scorer said, task by task (`packed`)."""
    found = {task: TaskItems.model_validate(items) for task, items in tasks.items()}
    return RunItems(run_id=run_id, name=name, seed=seed, baseline_key=baseline_key, tasks=found)
