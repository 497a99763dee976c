"""The job that checks programs, as `check.py` and the launcher send it to a scorer. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

from common.settings import Settings
from training.jobs import run_job
from training.profiles import Profile
from training.programs import Program, to_job

__all__ = ["PARALLEL", "WALL", "run_checks"]

PARALLEL = 2
"""Programs verified at the same time."""
WALL = 4.0
"""How many times as long as its CPU time a program, and one call to it, may take by the clock."""
_CUDA = 5
"""How many times as long checks may take on a GPU, where kernels are compiled at their first call (an estimate)."""
_START = 60.0
"""Seconds that a scorer, or the sandbox of one program, may take before and after its checks."""


def run_checks(
    programs: Sequence[Program],
    settings: Settings,
    profile: Profile,
    device: str,
    on_event: Callable[[dict[str, Any]], None],
    cancel: Event | None = None,
    **options: object,
) -> dict[str, Any]:
    """Verifies programs in one scorer process and returns its result {reports}; events as in training/scorer/check_job.

    Each program ends by itself within `WALL` times `check.seconds`; a scorer that takes longer than all of them may,
    `PARALLEL` at a time, has failed.

    Args:
        profile: whose sizes the programs are also tried at.
        device: "cpu" or "cuda", where everything may take `_CUDA` times as long.
        options: of the verifier (training.scorer.verifier.Options), beyond what the settings say.

    Raises:
        JobError: the scorer failed through a fault of ours, or did not end.
    """
    check = settings.check
    seconds, call_seconds = (s * (_CUDA if device == "cuda" else 1) for s in (check.seconds, check.call_seconds))
    job = {
        "programs": to_job(programs),
        "backend": settings.sandbox.backend,
        "image": settings.sandbox.image,
        "device": device,
        "parallel": PARALLEL,
        "options": {
            "memory_mb": settings.sandbox.memory_mb,
            "seconds": seconds,
            "call_seconds": call_seconds,
            "refuse_operations": check.operations,
            "profile_width": profile.model.hidden_size,
            "profile_heads": profile.model.heads,
            "profile_length": profile.train.seq_len,
            "profile_batch": profile.train.micro_batch or profile.train.batch,
            "profile_layers": profile.model.layers,
            **options,
        },
    }
    turns = -(-len(programs) // PARALLEL)
    return run_job("check", job, on_event, cancel, _START + turns * (WALL * seconds + _START))
