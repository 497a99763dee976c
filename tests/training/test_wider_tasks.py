"""A profile that names the wider set of tasks: learnt in the one stream, each scored with chance, n and error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common.process import REPOSITORY
from common.settings import load as load_settings
from tests.training.test_launcher import MEAN, program
from training.data.corpus import load_items
from training.items import read_items
from training.launcher import Launcher
from training.profiles import OWN_TASKS, STREAM_TASKS, Profile, load_profile

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"


def wide(**changes: dict[str, Any]) -> Profile:
    """The tiny profile with every task that there is."""
    spec = load_profile(TINY).model_dump()
    sizes = {"names": list(STREAM_TASKS), "symbols": 24, "needle_length": 40, "state_length": 6}
    changed = {"tasks": {**sizes, **changes.get("tasks", {})}, "eval": {"benchmarks": list(OWN_TASKS)}}
    for section, values in {**changes, **changed}.items():
        spec[section] = {**spec[section], **values}
    return Profile.model_validate(spec)


def test_every_task_of_the_wider_set_is_learnt_and_scored(
    text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache, out = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("out")
    flags = {"training": {"text": [text_file], "cache_dir": cache, "device": "cpu"}}
    launcher = Launcher(load_settings(None, flags), wide())
    record = launcher.train(program(MEAN), seed=0, out=out, run_id="wide")
    assert record.status == "finished", record.detail
    assert tuple(record.benchmarks) == OWN_TASKS
    few = {"parity": 1 / 2, "permutation_s3": 1 / 3}
    for name, score in record.benchmarks.items():
        assert score.chance == pytest.approx(few.get(name, 1 / 4)), name
        assert 8 <= score.n <= 40 and score.se is not None
        assert score.bits_per_byte is not None and score.bits_per_byte.value > 0
    kept = read_items(out / "items.json")
    assert kept is not None and tuple(kept.tasks) == OWN_TASKS
    lengths = {
        name: {item["context"].count("|>") for item in items}
        for name, items in load_items(launcher.prepare().items).items()
    }
    assert lengths["needle_2x"] == {127} and lengths["needle_4x"] == {255} and max(lengths["needle"]) < 40


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {"names": ["recall", "juggling"]}}, "tasks.names must be different ones of"),
        ({"tasks": {"names": ["recall", "recall"]}}, "tasks.names must be different ones of"),
        ({"tasks": {"names": ["recall", "copying", "induction"]}}, "need these tasks in tasks.names"),
        ({"tasks": {"symbols": 16}}, "tasks.symbols must be at least 18"),
        ({"tasks": {"mad_length": 10}}, "tasks.mad_length must be at least"),
        ({"tasks": {"needle_length": 100}}, "train.seq_len must be at least 101"),
        ({"train": {"seq_len": 1024}}, "needle_4x needs 4 x train.seq_len of at most 2048"),
        ({"model": {"vocab": 300}}, "model.vocab must be at least"),
    ],
)
def test_a_task_that_cannot_be_is_refused(changes: dict[str, dict[str, Any]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        wide(**changes)
