"""The result CSVs of published elements: a header row, one data row; and which test columns are accuracies."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.records import Measurement

__all__ = ["Table", "benchmark_mean", "finite_number", "is_accuracy", "parse_table", "table_rows"]

_NO_ACCURACY = re.compile(
    r"(^|_)(perplexity|ppl|average|avg|mean|loss|bits_per_byte|bits|bpb|nll|stderr|std|wikitext)(_|$)"
)
_REMEMBERED = 1 << 16
"""Characters of the longest text whose table is remembered."""


@dataclass(frozen=True)
class Table:
    """One result CSV: columns and the cells of its data row, without the row label.

    `complete` is False when the row is missing or a cell of it is empty or not there. "nan" is a missing number, not an
    empty cell; more cells than columns are no reason either.
    """

    columns: Sequence[str] = ()
    cells: Sequence[str] = ()
    complete: bool = False


def table_rows(text: str) -> Iterator[list[str]]:
    """The rows of a result CSV without surrounding spaces; those that hold nothing are left out.

    Raises:
        csv.Error: it is none.
    """
    rows = csv.reader(io.StringIO(text.lstrip("\ufeff"), newline=""))
    return (cells for row in rows if any(cells := [cell.strip() for cell in row]))


def parse_table(text: str) -> Table:
    """Reads a result CSV, of which only the first two rows that are not empty count. Malformed text gives a table that
    is not complete; it never raises."""
    # Of long texts neither the text nor the table is remembered.
    return _short_table(text) if len(text) <= _REMEMBERED else _table(text)


@functools.lru_cache(maxsize=64)
def _short_table(text: str) -> Table:
    return _table(text)


def _table(text: str) -> Table:
    try:
        # What follows is not read: a text of many megabytes may hold millions of rows.
        rows = list(itertools.islice(table_rows(text), 2))
    except csv.Error:
        return Table()
    if not rows:
        return Table()
    columns = rows[0][1:]
    cells = rows[1][1:] if len(rows) > 1 else []
    return Table(columns=columns, cells=cells, complete=bool(columns) and len(cells) >= len(columns) and all(cells))


@functools.lru_cache(maxsize=1024)
def is_accuracy(column: str) -> bool:
    """Whether a test column is an accuracy-like task, by its name alone ("ARC Challenge", "piqa", a task of our
    own)."""
    name = re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")
    return bool(name) and _NO_ACCURACY.search(name) is None


def benchmark_mean(text: str) -> tuple[Measurement | None, list[str]]:
    """Mean over the accuracy-like columns of the test row.

    Returns:
        The mean with n = number of tasks, and why it is None: a scored column that is missing, no number, or not in
        [0, 1]. It has no standard error: the tasks are fixed, not drawn, and the row does not tell how many items each
        of them has.
    """
    table = parse_table(text)
    scored = [position for position, column in enumerate(table.columns) if is_accuracy(column)]
    if not scored or not table.cells:
        return None, ["the test row has no accuracy column"]
    values: list[float] = []
    wrong: list[str] = []
    for position in scored:
        cell = table.cells[position] if position < len(table.cells) else ""
        value = finite_number(cell)
        if value is None or not 0 <= value <= 1:
            wrong.append(f"{table.columns[position]}: expected an accuracy in [0, 1], got {cell[:40]!r}")
        else:
            values.append(value)
    if wrong:
        return None, wrong
    return Measurement(value=math.fsum(values) / len(values), n=len(values)), []


def finite_number(cell: str) -> float | None:
    """The number in a cell, None where there is none; "nan" is none."""
    if "_" in cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
