"""What a run is turned into: the columns of its training curve, and the CSV texts of the published element format."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from pydantic import ValidationError

from common import result_table
from common.errors import StoreError, UsageError
from common.files import read_json
from common.records import BenchmarkScore, Measurement, RunRecord

__all__ = [
    "COLUMNS",
    "FILES",
    "benchmark_mean",
    "clear",
    "csv_text",
    "curve_columns",
    "element_result",
    "finished_before",
    "finished_run",
    "learning_curve",
    "reported_mean",
]

COLUMNS = 20
"""Columns of the training curve beside step 1."""
FILES = ("result.json", "train.csv", "test.csv", "items.json", "metrics.jsonl", "stderr.log")
"""What a run writes into its folder; the first stands for a run that is done, so it goes first and comes last."""


def clear(out: Path) -> None:
    """Removes the files of an earlier run from `out`, so that none can be taken for one of the next.

    Raises:
        StoreError: one of them cannot be removed.
    """
    for name in FILES:
        try:
            (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot remove {out / name}: {error.strerror}", "name another --out") from error


def finished_run(out: Path, *, program_sha256: str, baseline_key: str, seed: int) -> RunRecord | None:
    """The run of exactly this program, key and seed that was finished in `out`, None when there is none.

    A damaged record counts as none: training again gives the same numbers, while half a record gives none.
    """
    run = _finished(out)
    same = run is not None and _is_of(run, program_sha256, baseline_key, seed)
    return run if same else None


def finished_before(out: Path, *, program_sha256: str, baseline_key: str, seed: int) -> RunRecord | None:
    """As `finished_run`.

    Raises:
        UsageError: another run was finished in `out`.
    """
    run = _finished(out)
    if run is None or _is_of(run, program_sha256, baseline_key, seed):
        return run
    raise UsageError(
        f"{out} holds the finished result of another run: expected program {program_sha256[:12]}, seed {seed}, key "
        f"{baseline_key[:12]}; got program {run.name} ({run.program_sha256[:12]}), profile {run.profile}, seed "
        f"{run.seed}, key {run.baseline_key[:12]}",
        f"name another --out, or remove {out}",
    )


def _finished(out: Path) -> RunRecord | None:
    path = out / "result.json"
    if not path.exists():
        return None
    try:
        run = RunRecord.model_validate(read_json(path))
    except (StoreError, ValidationError):
        return None
    return run if run.status == "finished" else None


def _is_of(run: RunRecord, program_sha256: str, baseline_key: str, seed: int) -> bool:
    return (run.program_sha256, run.baseline_key, run.seed) == (program_sha256, baseline_key, seed)


def curve_columns(reports: Sequence[tuple[int, float]], steps: int) -> dict[str, float]:
    """Step -> mean training loss since the step listed before it: step 1 and about 20 equal parts.

    Args:
        reports: (step, mean loss since the report before), ascending.
        steps: of the whole run; a run that ended early has fewer columns, the last one at its last report.
    """
    columns: dict[str, float] = {}
    pending: list[tuple[int, float]] = []
    previous, edge = 0, 1
    for number, (step, loss) in enumerate(reports):
        pending.append((step - previous, loss))
        previous = step
        if step >= edge or number == len(reports) - 1:
            columns[str(step)] = sum(weight * value for weight, value in pending) / sum(weight for weight, _ in pending)
            pending.clear()
            part = math.floor(step * COLUMNS / steps) + 1
            edge = math.ceil(part * steps / COLUMNS)
    return columns


def learning_curve(points: Sequence[tuple[int, float]]) -> Measurement | None:
    """Area under the curve through (step, validation loss or share of right answers), ascending, divided by the steps
    it spans: the mean of the run, which single points move little. None where there are fewer than two points.

    Its n is the number of points. It has no standard error: every point is measured on the same sample.
    """
    if len(points) < 2:
        return None
    area = math.fsum((two - one) * (before + after) / 2 for (one, before), (two, after) in pairwise(points))
    return Measurement(value=area / (points[-1][0] - points[0][0]), n=len(points))


def benchmark_mean(scores: Mapping[str, BenchmarkScore]) -> Measurement | None:
    """Mean accuracy over the counted tasks, each with the same weight; n is the number of items. None without tasks."""
    counted = [score for score in scores.values() if score.counted]
    if not counted:
        return None
    errors = [score.se for score in counted]
    known = [error for error in errors if error is not None]
    return Measurement(
        value=math.fsum(score.value for score in counted) / len(counted),
        n=sum(score.n for score in counted),
        se=math.sqrt(math.fsum(error**2 for error in known)) / len(counted) if len(known) == len(errors) else None,
    )


def reported_mean(reported: Mapping[str, float | None], tasks: Collection[str] | None = None) -> Measurement | None:
    """Mean accuracy over the columns that a user's own script reported, as the published database takes it: n is the
    number of tasks. It has no standard error: the tasks are fixed, not drawn.

    Args:
        tasks: that count; None: every accuracy. None is returned where one of them is missing.
    """
    counted = {name: reported.get(name) for name in (reported if tasks is None else tasks)}
    return result_table.benchmark_mean(csv_text("Model", "", counted))[0]


def csv_text(label: str, name: str, columns: Mapping[str, float] | Mapping[str, float | None]) -> str:
    """A header row and one data row; the first column is the row's label. A missing number is nan."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([label, *columns])
    writer.writerow([name, *("nan" if value is None else f"{value:.6g}" for value in columns.values())])
    return text.getvalue()


def element_result(record: RunRecord) -> dict[str, str]:
    """The `result` of an element: train holds the training curve, test the accuracy of each benchmark and, beside them,
    perplexities; or what the user's own script reported."""
    scores = {name: score.value for name, score in record.benchmarks.items()}
    scores |= {f"{name}_perplexity": perplexity.value for name, perplexity in record.perplexities.items()}
    return {
        "train": csv_text("step", record.name, record.train_loss),
        "test": csv_text("Model", record.name, record.reported if record.trainer == "command" else scores),
    }
