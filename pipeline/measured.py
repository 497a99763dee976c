"""baseline.json of a data-dir: what candidates are compared with, and the calibration runs behind it.

A seed architecture that was trained over several seeds is stored and compared as the mean of its runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from common.errors import JournalError, StoreError
from common.files import read_json, write_json
from common.records import Baseline, BenchmarkScore, Measurement, RunRecord

__all__ = ["Measured", "Root", "load_baseline", "mean_run", "save_baseline", "seeds_of"]


M = TypeVar("M", bound=Measurement)


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
        raise JournalError(f"{path} is not a baseline: {_first(error)}", fix) from error


def _first(error: StoreError | ValidationError) -> str:
    if isinstance(error, StoreError):
        return error.message
    one = error.errors()[0]
    return f"{'.'.join(map(str, one['loc'])) or 'the whole'}: {one['msg']}"


def mean_run(runs: Sequence[RunRecord]) -> RunRecord:
    """Finished runs of one program over training seeds as one record, whose design names the seeds.

    Loss, accuracies and training curve are means over the runs. Their n and standard error stay those of one run: all
    of them answer the same items, so more seeds do not shrink that error. Everything else is the first run's.
    """
    first = runs[0]
    losses = [run.heldout_loss for run in runs if run.heldout_loss is not None]
    tasks = {task: [run.benchmarks[task] for run in runs if task in run.benchmarks] for task in first.benchmarks}
    return first.model_copy(
        update={
            "heldout_loss": _mean(losses) if losses else None,
            "benchmarks": {task: _mean_score(scores) for task, scores in tasks.items()},
            "reported": {column: _mean_reported(runs, column) for column in first.reported},
            "train_loss": {
                step: statistics.fmean(run.train_loss[step] for run in runs if step in run.train_loss)
                for step in first.train_loss
            },
            "design": {**(first.design or {}), "seeds": [run.seed for run in runs]},
        }
    )


def _mean_reported(runs: Sequence[RunRecord], column: str) -> float | None:
    values = [value for run in runs if (value := run.reported.get(column)) is not None]
    return statistics.fmean(values) if len(values) == len(runs) else None


def _mean_score(scores: Sequence[BenchmarkScore]) -> BenchmarkScore:
    bits = [score.bits_per_byte for score in scores if score.bits_per_byte is not None]
    return _mean(scores).model_copy(update={"bits_per_byte": _mean(bits) if bits else None})


def _mean(measured: Sequence[M]) -> M:
    errors = [one.se for one in measured if one.se is not None]
    mean = {
        "value": statistics.fmean(one.value for one in measured),
        "se": statistics.fmean(errors) if errors else None,
    }
    return measured[0].model_copy(update=mean)


def seeds_of(run: RunRecord) -> list[int]:
    """The training seeds behind a record: one, but for the mean of calibration runs."""
    return list((run.design or {}).get("seeds") or [run.seed])
