"""Figures of a run: every one that has data is a readable image, whatever is missing."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import pytest

from common.errors import StoreError
from common.records import Baseline, BenchmarkScore, Measurement, RunRecord
from pipeline.figure_curves import draw_curves
from pipeline.figures import ReportRow, draw_all

BASELINE = Baseline(
    key="k",
    profile="cpu",
    seeds=[0, 1, 2],
    loss=4.15,
    loss_sd=0.027,
    benchmark=0.3,
    benchmark_sd=0.02,
    tasks=["recall", "copying"],
)
MECHANISMS = ("token shift", "output gate", "scalar decay", "elu feature map", "path fusion")


def record(index: int, rng: random.Random, **changes: object) -> RunRecord:
    loss = 4.15 + rng.gauss(0, 0.06)
    values: dict[str, object] = {
        "run_id": str(index),
        "name": f"n{index}",
        "profile": "cpu",
        "seed": 0,
        "status": "finished",
        "program_sha256": "0" * 64,
        "baseline_key": "k",
        "heldout_loss": Measurement(value=loss, n=4096, se=0.012),
        "benchmarks": {
            task: BenchmarkScore(value=rng.uniform(0.2, 0.6), n=100, se=0.045, chance=0.25)
            for task in ("recall", "copying", "cloze")
        },
        "train_loss": {str(step): loss + 3 * 2 ** (-step / 200) + rng.gauss(0, 0.02) for step in range(1, 2002, 100)},
        "design": {"mechanisms": rng.sample(MECHANISMS, 2)},
    }
    return RunRecord.model_validate({**values, **changes})


def rows(count: int, seed: int = 1, **changes: object) -> list[ReportRow]:
    rng = random.Random(seed)
    made = [
        ReportRow(index, name, None, "root", record(index, rng, **{**changes, "design": None}), None, "baseline", "")
        for index, name in ((1, "delta_net"), (2, "gated_delta_net"))
    ]
    for index in range(3, count + 3):
        name = f"delta_net_{rng.choice(MECHANISMS).replace(' ', '_')}_{index}"
        run = record(index, rng, **changes)
        score = None if rng.random() < 0.1 else rng.uniform(0.8, 2.2)
        made.append(ReportRow(index, name, rng.randint(1, index - 1), "a gate", run, score, "tie", "text"))
    return made


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


ALL = ["progress.png", "training_curves.png", "benchmarks.png", "tree.png", "mechanisms.png"]


def test_every_figure_is_drawn(tmp_path: Path) -> None:
    paths = draw_all(rows(15), BASELINE, tmp_path / "report")
    assert [path.name for path in paths] == ALL
    assert all(500 < width < 4000 and 250 < height < 5000 for width, height in map(size, paths))
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(ALL)


def picture(elements: list[ReportRow]) -> bytes:
    figure, drawn = draw_curves(elements, BASELINE), io.BytesIO()
    assert figure is not None
    figure.savefig(drawn, format="png", dpi=50)
    return drawn.getvalue()


def test_the_validation_loss_takes_the_place_of_the_second_half() -> None:
    without, measured = rows(3), rows(3, validation_loss={"400": 4.6, "800": 4.4, "1200": 4.3})
    assert picture(without) == picture(without) != picture(measured)


def test_figures_without_data_are_left_out(tmp_path: Path) -> None:
    def names(elements: list[ReportRow]) -> list[str]:
        return [path.name for path in draw_all(elements, BASELINE, tmp_path)]

    assert names([]) == []
    assert names(rows(0)) == ["training_curves.png", "benchmarks.png"]
    assert names(rows(3, benchmarks={}, train_loss={}, design=None)) == ["progress.png", "tree.png"]
    bare = [ReportRow(row.index, row.name, row.parent, "", None, None, "", "") for row in rows(3)]
    assert names(bare) == ["tree.png"]


def test_missing_numbers_and_odd_parents_are_drawn(tmp_path: Path) -> None:
    base = BASELINE.model_copy(update={"loss_sd": None, "benchmark": None, "tasks": []})
    odd = rows(4, heldout_loss=Measurement(value=4.1, n=1))
    odd[3] = ReportRow(4, "delta_net_self", 4, "", odd[3].run, None, "", "")
    odd[4] = ReportRow(5, "delta_net_orphan", 99, "", odd[4].run, None, "", "")
    assert len(draw_all(odd, base, tmp_path)) == 5


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        draw_all(rows(1), BASELINE, tmp_path / "file" / "report")
