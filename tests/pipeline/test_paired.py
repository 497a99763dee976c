"""Item by item against the baseline: the numbers, what is left out, and the table that the report prints."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.paired import (
    baseline_items,
    compare,
    experiment_items,
    keep_baseline_items,
    mean_difference,
    paired_table,
)
from tests.pipeline.labs import record
from training.items import FILE, RunItems, TaskItems, read_items, write_items


def items(name: str, seed: int = 0, key: str = "key-1", run: str = "r", **tasks: TaskItems) -> RunItems:
    return RunItems(run_id=run, name=name, seed=seed, baseline_key=key, tasks=tasks)


def right(marks: str, bits: list[float] | None = None) -> TaskItems:
    return TaskItems(right=marks, bits_per_byte=bits)


def test_differences_are_paired_by_item() -> None:
    random = np.random.default_rng(0)
    base = random.random(200) < 0.5
    better = base | (random.random(200) < 0.1)
    marks = ["".join(str(int(one)) for one in each) for each in (base, better)]
    found = compare(items("n", recall=right(marks[1])), [items("delta_net", recall=right(marks[0]))])["recall"]
    each = better.astype(float) - base
    assert found.accuracy.value == pytest.approx(each.mean()) and found.accuracy.n == 200
    assert found.accuracy.se == pytest.approx(each.std(ddof=1) / math.sqrt(200))
    unpaired = math.sqrt(base.var(ddof=1) / 200 + better.var(ddof=1) / 200)
    assert found.accuracy.se is not None and found.accuracy.se < unpaired / 2
    assert found.bits_per_byte is None


def test_the_baseline_is_the_mean_of_its_seeds() -> None:
    seeds = [
        items("delta_net", 0, recall=right("1100", [1, 1, 2, 2])),
        items("delta_net", 1, recall=right("1000", [3, 1, 2, 2])),
    ]
    found = compare(items("n", recall=right("1111", [1, 1, 1, 1])), seeds)["recall"]
    assert found.accuracy.value == pytest.approx((0 + 0.5 + 1 + 1) / 4)
    assert found.bits_per_byte is not None and found.bits_per_byte.value == pytest.approx((-1 + 0 - 1 - 1) / 4)


def test_other_items_are_not_compared() -> None:
    own = items("n", recall=right("1111"), cloze=right("10"))
    others = [items("delta_net", key="key-2", recall=right("0000")), items("delta_net", recall=right("000"))]
    assert compare(own, others) == {}
    assert mean_difference({}, ["recall"]) is None and paired_table([(3, "n", {})], ["recall"]) is None


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    base = items("delta_net", 1, recall=right("10", [0.5, 1.25]), squad=TaskItems(partial=[0.25, 1.0]))
    write_items(tmp_path / "cache", base)
    keep_baseline_items(tmp_path / "run", {"delta_net-seed1": tmp_path / "cache", "gone-seed0": tmp_path / "gone"})
    assert baseline_items(tmp_path / "run", "delta_net") == [base] and baseline_items(tmp_path / "run", "n") == []
    run = record("n", "p", 0, "key-1", 4.0)
    for attempt, own in enumerate((items("n", run="other"), items("n", run=run.run_id, recall=right("11"))), 1):
        write_items(tmp_path / "run" / "experiments" / "0007" / f"attempt-{attempt}", own)
    assert experiment_items(tmp_path / "run", 7, run) == own
    assert experiment_items(tmp_path / "run", 8, run) is None
    (tmp_path / FILE).write_text('{"version": 1, "tasks": ')
    assert read_items(tmp_path / FILE) is None


def test_the_table_marks_what_is_beyond_two_errors() -> None:
    base = items("delta_net", recall=right("01" * 50, [1.0] * 100), cloze=right("01" * 50))
    own = items("n", recall=right("1" * 100, [1.0, 1.1] * 50), cloze=right("0110" * 25))
    table = paired_table([(3, "n[/x]", compare(own, [base]))], ["recall"])
    assert table is not None
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "n[/x]" in text and "mean of 1" in text
    assert "recall" in text and "+0.500 ± 0.050*" in text and "+0.050 ± 0.005*" in text
    assert "cloze (not counted)" in text and "+0.000 ± 0.071" in text
