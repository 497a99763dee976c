"""What the report says of hopeless runs, and whose checkpoints stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.files import write_json
from common.records import Forecast, Measurement, RunRecord
from pipeline.hopeless import hopeless_text
from pipeline.keeping import keep_best


def record(number: int, loss: float | None, spared: bool | None, step: int = 200) -> RunRecord:
    why = None
    if spared is not None:
        why = Forecast(step=100, loss=6.0, predicted=5.9, low=5.6, threshold=5.5, peers=9, spared=spared)
    finished = loss is not None
    return RunRecord(
        run_id=str(number), name="n", profile="tiny", seed=0, status="finished" if finished else "stopped",
        reason=None if finished else "hopeless", program_sha256="p", baseline_key="k", forecast=why,
        heldout_loss=Measurement(value=loss, n=10) if loss is not None else None,
        train_loss={"1": 7.0, str(step): 5.0}, seconds={"train_cpu": 10.0} if finished else {},
    )  # fmt: skip


def test_saved_seconds_and_wrong_endings_are_counted() -> None:
    runs = [record(1, 5.0, None), record(2, None, False, step=100), record(3, 5.4, True), record(4, 5.9, True)]
    said = hopeless_text(runs)
    assert said is not None and "3 runs predicted" in said and "; 1 ended, " in said
    assert "about 5 CPU seconds" in said and "14% of all" in said and "1 of 2 would have been candidates" in said
    assert hopeless_text(runs[:1]) is None


def experiment(root: Path, number: int, **stages: dict[str, Any]) -> Path:
    folder = root / f"{number:04d}"
    (folder / "attempt-1" / "checkpoints").mkdir(parents=True)
    for stage, value in stages.items():
        write_json(folder / f"{stage}.json", value)
    return folder / "attempt-1" / "checkpoints"


def test_checkpoints_of_the_best_and_of_what_runs_stay(tmp_path: Path) -> None:
    update = {"index": 1, "name": "n", "gain": None, "seconds": 1.0}
    scored = [experiment(tmp_path, n, update={**update, "score": score}) for n, score in ((1, 1.0), (2, 3.0), (3, 2.0))]
    unscored = experiment(tmp_path, 4, update={**update, "score": None})
    running = experiment(tmp_path, 5)
    keep_best(tmp_path, 2)
    assert [folder.exists() for folder in (*scored, unscored, running)] == [False, True, True, False, True]
