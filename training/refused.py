"""The record of a program that was not trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.records import CheckReport, RunRecord
from training.command_run import command_record
from training.programs import Program
from training.run import Run

if TYPE_CHECKING:
    from training.launcher import Launcher

__all__ = ["refused_record"]


def refused_record(
    launcher: Launcher,
    program: Program,
    report: CheckReport | None,
    *,
    seed: int,
    run_id: str,
    command: str,
    wall: float,
) -> RunRecord:
    """The record of a program that was not trained: the check, which took `wall` seconds, refused it or was interrupted
    (`report` None)."""
    ended = {"status": "stopped", "reason": "interrupted", "detail": "the check was interrupted"}
    if report is not None:
        ended = {"status": "failed", "reason": "refused", "detail": report.why_refused()}
    if launcher.command is not None:
        return command_record(
            launcher, program, report or (), ended, seed=seed, run_id=run_id, repeat=command, total=round(wall, 3)
        )
    run = Run(launcher, program, seed, Path(), run_id, report or (), None, command)
    checked = sum(check.seconds or 0.0 for check in run.checks)
    return run.record(ended, launcher.prepare(), max(0.0, round(wall - checked, 3)))
