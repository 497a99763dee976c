"""What a result depends on besides the program: device, versions, code of the trainer, commit. Imports no torch."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from common.errors import StoreError, UsageError
from common.files import sha256_text
from common.process import REPOSITORY
from training.architectures import SEEDS
from training.profiles import Profile

__all__ = [
    "MODEL_SOURCE",
    "TRAINER_SOURCES",
    "find_device",
    "git_commit",
    "require_processes",
    "seed_programs",
    "source_hash",
    "versions",
    "visible_cards",
]

TRAINER_SOURCES = (
    "training/worker/model.py",
    "training/worker/registers.py",
    "training/worker/batches.py",
    "training/worker/guard.py",
    "training/worker/optimizer.py",
    "training/worker/program.py",
    "training/worker/ranks.py",
    "training/worker/snapshot.py",
    "training/worker/state.py",
    "training/worker/train.py",
    "training/worker/trial.py",
    "training/worker/validation.py",
    "training/worker/weights.py",
    "training/data/packing.py",
    "training/data/sequences.py",
    "training/data/tasks.py",
    "training/data/tasks_mad.py",
    "training/data/tasks_state.py",
    "training/items.py",
    "training/profiles.py",
    "training/sections.py",
    "training/scorer/answers.py",
    "training/scorer/audit.py",
    "training/scorer/benchmarks.py",
    "training/scorer/building.py",
    "training/scorer/confirm.py",
    "training/scorer/fresh.py",
    "training/scorer/heldout.py",
    "training/scorer/items.py",
    "training/scorer/scored.py",
    "training/scorer/scoring.py",
    "training/scorer/train_job.py",
    "training/scorer/validation.py",
    "training/scorer/verdict.py",
    *sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "training/fla_compat").rglob("*.py")),
)
"""What a training result depends on besides profile, corpus and program."""
VERIFIER_SOURCES = tuple(
    path.relative_to(REPOSITORY).as_posix()
    for folder in ("training/scorer/verifier", "training/worker")
    for path in sorted((REPOSITORY / folder).glob("*.py"))
)
"""What a check report depends on besides the program."""
_PACKAGES = ("torch", "numpy", "tokenizers", "lm-eval")
MODEL_SOURCE = TRAINER_SOURCES[:2]


def find_device(wanted: str = "auto") -> str:
    """The device that jobs compute on, found without importing torch: "cuda" where the driver shows a GPU, else "cpu".

    Raises:
        UsageError: cuda is asked for and there is no GPU.
    """
    present = visible_cards() > 0
    if wanted == "cuda" and not present:
        raise UsageError("training.device is cuda, but the driver shows no GPU", "set training.device to auto or cpu")
    return "cuda" if present and wanted != "cpu" else "cpu"


def visible_cards(devices: Path = Path("/dev")) -> int:
    """How many GPUs a job may use: those that CUDA_VISIBLE_DEVICES lists where it is set, else all of the driver."""
    present = len(list(devices.glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def require_processes(processes: int, profile: Profile, device: str) -> None:
    """Raises:
    UsageError: there are fewer rows in a batch, or fewer GPUs, than processes that are to share them.
    """
    cards = visible_cards() if device == "cuda" else processes
    for most, what in ((profile.train.batch, f"the rows of a batch of profile {profile.name}"), (cards, "the GPUs")):
        if processes > most:
            raise UsageError(
                f"expected at most {most} training processes, {what}, got {processes}",
                "lower --nproc-per-node or training.processes",
            )


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def seed_programs() -> dict[str, str]:
    """Name -> hash of the seeds of the search; the other shipped programs are no part of a baseline."""
    return {name: sha256_text(path.read_text(encoding="utf-8")) for name, path in SEEDS.items()}


def source_hash(names: Sequence[str]) -> str:
    """Hash of these files of ours, named from the repository root."""
    try:
        return sha256_text("\0".join((REPOSITORY / name).read_text(encoding="utf-8") for name in names))
    except OSError as error:
        raise StoreError(f"cannot read {error.filename}: {error.strerror}", "check out the repository again") from error


@functools.cache
def git_commit() -> str | None:
    """The commit that is checked out, None where git does not say."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
