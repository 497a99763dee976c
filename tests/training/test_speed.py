"""benchmarks/training.py in its short form: both loops run, take turns, and the stages add up. No speed is asserted:
the machine of a test may be as busy as it likes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bare_loop, training
from common.process import REPOSITORY
from common.settings import load as load_settings
from training.architectures import SEEDS
from training.launcher import Launcher
from training.profiles import load_profile
from training.programs import Program, load

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"


@pytest.fixture(scope="module")
def launcher(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    flags = {"training": {"text": [text_file], "cache_dir": tmp_path_factory.mktemp("cache"), "device": "cpu"}}
    made = Launcher(load_settings(None, flags), load_profile(TINY))
    made.prepare()
    return made


@pytest.fixture(scope="module")
def delta_net() -> Program:
    return load(SEEDS["delta_net"], name="delta_net")


def test_a_worker_and_a_bare_loop_take_turns(launcher: Launcher, delta_net: Program) -> None:
    found = training.measure_worker(launcher, delta_net, steps=6, repeats=2)
    assert len(found.ours) == len(found.bare) == 2 and min(found.ours + found.bare) > 0
    assert found.ratios[0] <= found.ratios[-1] and found.ratio > 0
    assert not list(launcher.prepare().folder.glob("streams/*seed987000*")), "its stream is removed"


def test_the_parts_of_a_run_add_up(launcher: Launcher, delta_net: Program) -> None:
    (run,) = training.measure_runs(launcher, delta_net, runs=1)
    stages = run.stages
    assert min(stages.values()) > 0 and sum(stages.values()) == pytest.approx(2 * stages["total"])
    assert training.overhead([run]) == pytest.approx(1 - stages["train"] / stages["total"])
    assert list(run.wall) == list(run.cpu) == ["train", "heldout", "benchmarks", "audit"]
    assert min(run.wall.values()) > 0 and min(run.cpu.values()) > 0
    assert run.wall["heldout"] + run.wall["benchmarks"] < stages["score"], "the audit is no part of them"
    assert run.cpu["audit"] > run.cpu["heldout"], "processes were started for it"
    assert training.audit_share([run]) == pytest.approx(run.wall["audit"] / stages["train"])


def test_the_bare_loop_trains_the_same_model_on_the_same_tokens(launcher: Launcher, delta_net: Program) -> None:
    profile = training._shortened(launcher.profile, 20)
    job = training._job(launcher, profile, delta_net, launcher.prepare().stream(profile, 0))
    model = bare_loop.build(job)
    assert sum(p.numel() for p in model.parameters()) == job["budget"]
    inputs, targets = bare_loop.batches(job)
    assert inputs.shape == targets.shape == (20, profile.train.batch, profile.train.seq_len)
    text = (targets != bare_loop.IGNORED).all(-1)
    assert text.any() and not text.all() and (targets[text][:, :-1] == inputs[text][:, 1:]).all()
    places = targets[0] != bare_loop.IGNORED

    def loss() -> float:
        return float(torch.nn.functional.cross_entropy(model(inputs[0])[places], targets[0][places]).detach())

    before = loss()
    took = bare_loop.train(model, inputs, targets, job["train"], 20)
    assert loss() < before - 0.1 and min(took.values()) > 0
