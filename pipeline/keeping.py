"""Checkpoints cost disk: those of the best stored experiments stay, all others go once they are of no more use."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

from pipeline.experiment import Experiment
from training.checkpoints import FOLDER, settle

__all__ = ["keep_best"]

_ENDED = ("stored", "failed")


def keep_best(experiments: Path, count: int) -> None:
    """Removes the checkpoints of every ended experiment but the `count` with the highest score.

    Experiments under way keep theirs: they go on from them after a kill.

    Raises:
        StoreError: one cannot be removed.
    """
    holding = {path.parent.parent for path in experiments.glob(f"*/attempt-*/{FOLDER}")}
    ended = [one for one in (Experiment(int(path.name), path, "") for path in holding) if one.state in _ENDED]
    updates = {one.number: one.read("update") for one in ended}
    scores = [(float(update["score"]), number) for number, update in updates.items() if _scored(update)]
    best = {number for _, number in sorted(scores, reverse=True)[:count]}
    for one in ended:
        if one.number not in best:
            for folder in one.folder.glob(f"attempt-*/{FOLDER}"):
                settle(folder, keep=False)


def _scored(update: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    return update is not None and update["score"] is not None
