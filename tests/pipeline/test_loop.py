"""The lanes: whatever goes wrong in one ends all of them loudly."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.settings import load
from pipeline.experiment import Experiment
from pipeline.lab import Cancelled, Ideas
from pipeline.loop import Loop


def lab(tmp_path: Path, all_elements: Any, experiments: int | None = 2) -> Any:
    """Just enough of a Lab for lanes that fail before their first stage."""
    run = {"data_dir": tmp_path, "parallel": 2} | ({"experiments": experiments} if experiments else {})
    cancelled = threading.Event()
    return SimpleNamespace(
        settings=load(None, {"run": run}),
        workspace=SimpleNamespace(
            experiments=tmp_path,
            run_id="run",
            experiment=lambda number: Experiment(number, tmp_path / str(number), "run"),
        ),
        console=SimpleNamespace(note=lambda text: None, line=lambda *words: None),
        database=SimpleNamespace(all_elements=all_elements),
        ideas=Ideas(),
        cancelled=cancelled,
        ask=lambda call: call(),
    )


@pytest.mark.timeout(30)
@pytest.mark.parametrize("error", [ValueError("unforeseen"), OSError(28, "No space left on device")])
def test_an_unforeseen_error_in_a_lane_ends_the_loop_with_it(tmp_path: Path, error: Exception) -> None:
    def fail(after: int) -> Any:
        raise error

    with pytest.raises(type(error), match=str(error.args[-1])):
        Loop(lab(tmp_path, fail), []).run()


@pytest.mark.timeout(30)
def test_what_breaks_off_after_ctrl_c_is_no_error(tmp_path: Path) -> None:
    def interrupted(after: int) -> Any:
        made.cancelled.set()
        raise ConnectionError("closed")

    made = lab(tmp_path, interrupted)
    with pytest.raises(Cancelled):
        Loop(made, []).run()
