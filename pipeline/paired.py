"""A design against the baseline on the same benchmark items, item by item.

All runs of a data-dir answer the same items, so their differences are paired: what makes an item easy or hard falls
out, and the standard error is a good deal smaller than that of two independent scores. It covers the choice of items.
How much training seeds differ it does not know: the baseline is the mean of its seeds, the design is one run, so a
difference beyond 2 SE holds for these trained models and is no verdict on the designs (pipeline/verdict.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from common.files import write_json
from common.records import Measurement, RunRecord
from common.text import printable
from training.items import FILE, RunItems, read_items

__all__ = ["Paired", "baseline_items", "compare", "experiment_items", "keep_baseline_items", "paired_table"]

FOLDER = "baselines"
"""Where a data-dir keeps the items of its baseline runs, a file a run."""


@dataclass(frozen=True)
class Paired:
    """A design minus the baseline on one task: accuracy (more is better), bits per byte (less is better)."""

    accuracy: Measurement
    bits_per_byte: Measurement | None


def compare(design: RunItems, baseline: Sequence[RunItems]) -> dict[str, Paired]:
    """Task by task, for those that both sides have with equally many items.

    Args:
        baseline: runs of the baseline over seeds; each item counts with its mean over them. Runs under another
            baseline key than the design's answered other items and are left out.
    """
    same = [run for run in baseline if run.baseline_key == design.baseline_key]
    found: dict[str, Paired] = {}
    for task, own in design.tasks.items():
        others = [run.tasks[task] for run in same if task in run.tasks]
        others = [other for other in others if len(other.scores) == len(own.scores)]
        if not others or not own.scores:
            continue
        bits = [other.bits_per_byte for other in others if other.bits_per_byte is not None]
        found[task] = Paired(
            _difference(own.scores, [other.scores for other in others]),
            _difference(own.bits_per_byte, bits) if own.bits_per_byte and len(bits) == len(others) else None,
        )
    return found


def _difference(own: Sequence[float], others: Sequence[Sequence[float]]) -> Measurement:
    """Mean of own - mean of others over items, with its standard error."""
    each = [one - statistics.fmean(rest) for one, *rest in zip(own, *others, strict=True)]
    se = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
    return Measurement(value=statistics.fmean(each), n=len(each), se=se)


def mean_difference(paired: Mapping[str, Paired], tasks: Sequence[str]) -> Measurement | None:
    """Mean accuracy difference over `tasks`, each with the same weight."""
    known = [paired[task].accuracy for task in tasks if task in paired]
    if not known:
        return None
    errors = [one.se for one in known if one.se is not None]
    return Measurement(
        value=statistics.fmean(one.value for one in known),
        n=sum(one.n for one in known),
        se=math.hypot(*errors) / len(known) if len(errors) == len(known) else None,
    )


def keep_baseline_items(root: Path, folders: Mapping[str, Path]) -> None:
    """Copies the items of baseline runs, kept in the cache of a machine, into the data-dir.

    Args:
        folders: file stem -> folder of the run.
    """
    for name, folder in folders.items():
        items = read_items(folder / FILE)
        if items is not None:
            write_json(root / FOLDER / f"{name}.json", items.model_dump(mode="json", exclude_none=True))


def baseline_items(root: Path, program: str) -> list[RunItems]:
    """The items of the runs of `program` that the data-dir keeps."""
    found = [read_items(path) for path in sorted((root / FOLDER).glob("*.json"))]
    return [items for items in found if items is not None and items.name == program]


def experiment_items(root: Path, number: int, run: RunRecord) -> RunItems | None:
    """The items of the run that experiment `number` stored."""
    found = (read_items(path) for path in sorted((root / "experiments" / f"{number:04d}").glob(f"*/{FILE}")))
    return next((items for items in found if items is not None and items.run_id == run.run_id), None)


def paired_table(compared: Sequence[tuple[int, str, Mapping[str, Paired]]], tasks: Sequence[str]) -> Table | None:
    """One line an experiment (index, name, differences): the mean over `tasks`, those that count, then every task."""
    shown = [one for one in compared if one[2]]
    if not shown:
        return None
    table = Table(
        title="Against the baseline on the same items: difference ± SE, * beyond 2 SE",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="acc: accuracy, more is better; bits: bits per byte of the correct answer, less is better. "
        "The SE is of the items; seeds of training differ too.",
        caption_justify="left",
    )
    table.add_column("#")
    table.add_column("name", overflow="fold")
    for heading in ("task", "items", "acc", "bits"):
        table.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=True)
    for index, name, paired in shown:
        mean = mean_difference(paired, tasks)
        label = f"mean of {sum(task in paired for task in tasks)}"
        table.add_row(str(index), escape(printable(name)), label, str(mean.n) if mean else "", _shown(mean), "")
        for task, one in paired.items():
            named = task if task in tasks else f"{task} (not counted)"
            table.add_row("", "", named, str(one.accuracy.n), _shown(one.accuracy), _shown(one.bits_per_byte))
    return table


def _shown(difference: Measurement | None) -> str:
    if difference is None:
        return "-"
    if difference.se is None:
        return f"{difference.value:+.3f}"
    mark = "*" if abs(difference.value) > 2 * difference.se > 0 else " "
    return f"{difference.value:+.3f} ± {difference.se:.3f}{mark}"
