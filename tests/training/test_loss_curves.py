"""Golden numbers: the training curves of the seed architectures at the CPU profiles, which must not drift.

The text is that of the pinned packages, the same bytes everywhere, so the curves are those of
tests/assets/loss_curves.json wherever the pins are the same: to the last bit on one kind of CPU, within TOLERANCE on
others. They are changed only with a reason, in the commit that gives it (a pin that changes the text gives another
`corpus`, too).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.process import REPOSITORY
from common.settings import load
from training.architectures import SEEDS
from training.launcher import Launcher
from training.profiles import load_profile
from training.programs import load as load_program

CURVES = json.loads((REPOSITORY / "tests" / "assets" / "loss_curves.json").read_text())
TOLERANCE = 0.05
"""Nats: rounding of another CPU, grown over a run, stays below; a wrong rate or a shifted target does not."""
RUNS = [(profile, program) for profile, curves in CURVES.items() for program in curves["programs"]]


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "program"), RUNS)
def test_a_seed_architecture_learns_as_it_did(profile: str, program: str, tmp_path: Path) -> None:
    settings = load(None, {"run": {"profile": profile}, "training": {"device": "cpu"}})
    launcher = Launcher(settings, load_profile(profile))
    assert launcher.prepare().sha256 == CURVES[profile]["corpus"], "the text has changed: make the curves again"
    known = CURVES[profile]["programs"][program]
    record = launcher.train(load_program(SEEDS[program], name=program), seed=0, out=tmp_path, run_id="golden")
    assert record.status == "finished", record.detail
    print(f"{profile}, {program}: held-out loss {record.heldout_loss}, known {known['heldout_loss']}")
    assert record.train_loss == pytest.approx(known["train_loss"], abs=TOLERANCE)
    assert record.heldout_loss is not None
    assert record.heldout_loss.value == pytest.approx(known["heldout_loss"], abs=TOLERANCE)


def test_the_asset_holds_curves_that_fall_and_differ() -> None:
    """A check of the file alone, no run: numbers that a broken one would leave behind are not taken for golden ones.
    Runs are compared with them by the slow test above."""
    for profile, curves in CURVES.items():
        steps = str(load_profile(profile).train.steps)
        losses = [curve["heldout_loss"] for curve in curves["programs"].values()]
        assert len(set(losses)) == len(losses)
        for curve in curves["programs"].values():
            assert curve["train_loss"]["1"] > 6 and curve["train_loss"][steps] < curve["train_loss"]["1"] - 1
