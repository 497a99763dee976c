"""Tables and figures of a run, from its data-dir alone: no service needs to be up.

python pipeline/report.py --data-dir runs/demo                figures into runs/demo/report
python pipeline/report.py --data-dir runs/demo --out DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from common.process import end_on_interrupt

    end_on_interrupt()

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.errors import AsiError, StoreError, UsageError
from common.process import end_on_closed_pipe, exit_with_parent
from common.settings import path_argument
from common.text import printable
from pipeline.console import make_console
from pipeline.figures import ReportRow, draw_all
from pipeline.hopeless import hopeless_text
from pipeline.measured import Measured, load_baseline
from pipeline.paired import baseline_items, compare, experiment_items, paired_table
from pipeline.summary import Row, load_rows, print_summary
from pipeline.verdict import verdict

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["main"]

PAIRED = 3
"""Experiments, by score, that are compared with the baseline item by item."""


def main(argv: Sequence[str] | None = None) -> int:
    exit_with_parent()
    parser = argparse.ArgumentParser(prog="report.py", description="Tables and figures of a run.")
    parser.add_argument("--data-dir", type=path_argument, required=True, help="the run's folder")
    parser.add_argument("--out", type=path_argument, help="folder for the figures (default: DATA_DIR/report)")
    arguments = parser.parse_args(argv)
    try:
        return report(arguments.data_dir, arguments.out or arguments.data_dir / "report")
    except BrokenPipeError:
        return end_on_closed_pipe()
    except AsiError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code


def report(root: Path, out: Path) -> int:
    """Prints the tables of the run in `root` and draws its figures into `out`.

    Raises:
        UsageError: there is no run in `root`, or nothing was measured in it yet.
        JournalError: what lies there is damaged.
        StoreError: `out` cannot be written.
    """
    if not (root / "run.json").exists():
        raise UsageError(
            f"expected the data-dir of a run, got {root}", "name the folder that pipeline.py wrote: --data-dir DIR"
        )
    found = load_baseline(root)
    if found is None:
        raise UsageError(f"nothing has been measured in {root} yet", "let the pipeline finish its baselines first")
    baseline = found.baseline
    rows = load_rows(root)
    console = make_console()
    print_summary(console, root)
    if (table := _paired(root, rows, found)) is not None:
        console.print(table)
    tried = [run for row in rows for run in (*row.ended, *([row.run] if row.run else []))]
    if (said := hopeless_text(tried)) is not None:
        print(said)
    shown = [ReportRow(one.index, one.name, None, "root", one.run, one.score, "root", "") for one in found.roots]
    shown += [_report_row(row, verdict(row.run, baseline) if row.run else "") for row in rows if row.index is not None]
    try:
        drawn = draw_all(shown, baseline, out)
    except StoreError as error:
        raise StoreError(error.message, "free disk space, or name a folder that can be written: --out DIR") from error
    for path in drawn:
        print(f"drew {path}", flush=True)
    return 0


def _paired(root: Path, rows: Sequence[Row], found: Measured) -> Table | None:
    """The experiments with the best scores, item by item against the baseline."""
    base = baseline_items(root, found.baseline.program)
    stored = [row for row in rows if row.run is not None and row.index is not None]
    best = sorted(stored, key=lambda row: -(row.score if row.score is not None else -1.0))[:PAIRED]
    compared = []
    for row in best:
        assert row.run is not None and row.index is not None
        own = experiment_items(root, row.number, row.run)
        if own is not None:
            compared.append((row.index, row.name, compare(own, base)))
    return paired_table(compared, found.baseline.tasks)


def _report_row(row: Row, said: str) -> ReportRow:
    assert row.index is not None
    return ReportRow(row.index, row.name, row.parent_index, row.change, row.run, row.score, said, row.analysis[:400])


if __name__ == "__main__":
    sys.exit(main())
