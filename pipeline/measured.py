"""baseline.json of a data-dir: what candidates are compared with, and the calibration runs behind it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from common.errors import JournalError, StoreError
from common.files import read_json, write_json
from common.records import Baseline, RunRecord

__all__ = ["Measured", "Root", "load_baseline", "save_baseline"]


class Root(BaseModel):
    """A program that the search started from: its element, its score, and the run that is stored with it."""

    index: int
    name: str
    score: float | None
    run: RunRecord


class Measured(BaseModel):
    """The baseline of a data-dir, the calibration runs behind it by program, and the roots (empty until stored)."""

    baseline: Baseline
    runs: dict[str, list[RunRecord]]
    roots: list[Root] = []


def save_baseline(root: Path, measured: Measured) -> None:
    """Writes baseline.json of a data-dir."""
    write_json(root / "baseline.json", measured.model_dump())


def load_baseline(root: Path) -> Measured | None:
    """The baseline of a data-dir, None before it has been measured.

    Raises:
        JournalError: the file is damaged.
    """
    path = root / "baseline.json"
    if not path.exists():
        return None
    try:
        return Measured.model_validate(read_json(path))
    except (StoreError, ValidationError) as error:
        fix = "remove it; the next start of the pipeline measures it again"
        raise JournalError(f"{path} is not a baseline: {error}", fix) from error
