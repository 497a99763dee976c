"""Result files that the user's own training script leaves in its folder, read and checked.

train.csv or loss.csv: columns are steps, cells mean training losses. test.csv or benchmark.csv: columns are benchmarks,
cells accuracies in [0, 1] (averages and perplexities may stand beside them; "nan" or nothing is a missing one). Both in
the published element format: a header row, and the row of the run. A file may hold the rows of other runs as well, as
the published scripts keep one for all: then the last whose first cell is the name counts, a prefix YYYYMMDD-HH:MM:SS-
stripped.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from common.files import read_regular
from common.result_table import finite_number, is_accuracy, table_rows

__all__ = ["NAMES", "BadResultsError", "NotFiniteLossError", "Results", "read_results"]

NAMES = {"train": ("train.csv", "loss.csv"), "test": ("test.csv", "benchmark.csv")}
"""What the files may be called; the first that is there is read."""
_LARGEST = 16 << 20
_STAMP = re.compile(r"^\d{8}-\d{2}:\d{2}:\d{2}-")
_NO_NAMES = frozenset({"", "step", "model", "loss"})
"""First cells that say nothing of whose row it is."""


class BadResultsError(Exception):
    """A file is missing, or does not hold what was expected."""


class NotFiniteLossError(BadResultsError):
    """A training loss is NaN or infinite."""


@dataclass(frozen=True)
class Results:
    """Step -> training loss, ascending, and column of the test row -> value (None for a missing one)."""

    train: dict[str, float]
    test: dict[str, float | None]


def read_results(folder: Path, name: str) -> Results:
    """What the run of `name` left in `folder`.

    Raises:
        BadResultsError: with the file, what was expected in it, and what stands there.
    """
    train_file, test_file = (_found(folder, NAMES[side]) for side in ("train", "test"))
    return Results(_losses(train_file, _row(train_file, name)), _scores(test_file, _row(test_file, name)))


def _found(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise BadResultsError(f"expected {' or '.join(names)} in {folder}, got neither")


def _row(path: Path, name: str) -> dict[str, str]:
    """Column -> cell of the row of `name`, without the row label."""
    try:
        rows = list(table_rows(read_regular(path, _LARGEST).decode()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadResultsError(f"{path} is no readable CSV: {error}") from error
    header, rows = (rows[0], rows[1:]) if rows else ([], [])
    columns = header[1:]
    if not columns or not all(columns) or len(set(columns)) < len(columns):
        raise BadResultsError(
            f"{path}: expected a header row of a label and different columns, got {','.join(header)[:200]!r}"
        )
    mine = [row for row in rows if _STAMP.sub("", row[0]) == name]
    if not mine and len(rows) == 1 and rows[0][0].lower() in _NO_NAMES:
        mine = rows
    if not mine:
        labels = ", ".join(repr(row[0][:60]) for row in rows[:5]) or "no row below the header"
        raise BadResultsError(f"{path}: expected a row whose first cell is {name!r}, got {labels}")
    cells = mine[-1][1:]
    if len(cells) != len(columns):
        raise BadResultsError(f"{path}: expected {len(columns)} cells after the label, got {len(cells)}")
    return dict(zip(columns, cells, strict=True))


def _losses(path: Path, row: dict[str, str]) -> dict[str, float]:
    steps = [int(column) if column.isascii() and column.isdigit() else -1 for column in row]
    if min(steps) < 0 or sorted(set(steps)) != steps:
        raise BadResultsError(f"{path}: expected ascending steps as columns, got {', '.join(row)[:200]}")
    losses = {}
    for step, (column, cell) in zip(steps, row.items(), strict=True):
        value = finite_number(cell)
        if value is None or value <= 0:
            wrong = NotFiniteLossError if _not_finite(cell) else BadResultsError
            raise wrong(f"{path}: expected a loss above 0 at step {column}, got {cell[:60]!r}")
        losses[str(step)] = value
    return losses


def _not_finite(cell: str) -> bool:
    try:
        return not math.isfinite(float(cell))
    except ValueError:
        return False


def _scores(path: Path, row: dict[str, str]) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for column, cell in row.items():
        value = scores[column] = finite_number(cell)
        if value is None and cell.lower() not in ("", "nan"):
            raise BadResultsError(f"{path}: expected a number or nan for {column}, got {cell[:60]!r}")
        if value is not None and is_accuracy(column) and not 0 <= value <= 1:
            raise BadResultsError(f"{path}: expected an accuracy in [0, 1] for {column}, got {cell[:60]!r}")
    if not any(is_accuracy(column) for column in row):
        raise BadResultsError(f"{path}: expected the accuracy of a benchmark, got {', '.join(row)[:200]}")
    return scores
