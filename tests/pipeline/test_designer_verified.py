"""Programs of the designer pass the verifier and train, through the same jobs as in the loop.

Slow: the fast suite sees it of the designs of its whole runs, and trains every mechanism in
test_designer_mechanisms.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from common.settings import Settings
from pipeline.designer import MECHANISMS, genome_of, render
from pipeline.evolve.offline import GENOME_TRUST
from tests.pipeline.designs import genome_with
from tests.pipeline.running import TINY
from training.launcher import Launcher
from training.profiles import load_profile
from training.programs import Program

NAMES = sorted(MECHANISMS)


def verify_and_train(names: list[str], train: list[str], out: Path) -> None:
    """Every program of `names` is accepted; those of `train` also finish a short training run."""
    launcher = Launcher(Settings(), load_profile(str(TINY)))
    programs = {name: Program(name, render(genome_with(name), f"delta_net_{name}"), GENOME_TRUST) for name in names}
    assert all(genome_of(program.text) is not None for program in programs.values())
    reports = dict(zip(names, launcher.check(list(programs.values())), strict=True))
    refused = {
        name: [check.name for check in report.refusals()] for name, report in reports.items() if not report.accepted
    }
    assert not refused
    for name in train:
        run = launcher.train(programs[name], seed=0, out=out / name, run_id=name, checks=reports[name])
        assert run.status == "finished", (name, run.reason, run.detail)
        if run.efficiency is not None and reports[name].facts["decode"]:
            assert run.efficiency.decode is not None and run.efficiency.decode.value > 0 and run.efficiency.state_bytes
        assert run.heldout_loss is not None and run.heldout_loss.value < 6.3  # ln 512 = 6.24 before the first step


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_mechanism_is_verified_and_trained(tmp_path: Path) -> None:
    verify_and_train(NAMES, NAMES, tmp_path)
    print(f"{len(NAMES)} mechanisms accepted by the verifier and trained")
