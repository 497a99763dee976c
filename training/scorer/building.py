"""Lets a worker prepare itself, load its program and build its model, as a training job says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training.profiles import Profile
from training.scorer import answers
from training.scorer.client import Worker
from training.scorer.heldout import ForgedError

__all__ = ["build", "launched", "prepare", "rebuild"]


def launched(job: dict[str, Any], start: Callable[[float], Worker], seconds: float) -> Worker:
    """A process that may live for so many seconds, in which nothing of the program has run, with torch imported and
    precision and seeds fixed."""
    worker = start(seconds)
    try:
        prepare(job, worker)
    except BaseException:
        worker.close()
        raise
    return worker


def rebuild(job: dict[str, Any], profile: Profile, parameters: int, worker: Worker) -> None:
    """Builds in a started process the model of so many parameters that was built before."""
    built = build(job, profile, worker)
    if "refused" in built or answers.model_sizes(built)["parameters"] != parameters:
        raise ForgedError(f"a fresh process builds another model: {str(built)[:300]}")


def prepare(job: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Fixes precision and seeds of the process; facts about it."""
    facts, _ = worker.call(
        "train.prepare", {"seed": job["seed"], "dtype": job["dtype"], "deterministic": job.get("deterministic", False)}
    )
    return facts


def build(job: dict[str, Any], profile: Profile, worker: Worker) -> dict[str, Any]:
    """Loads the program, builds the model: its sizes as said."""
    worker.load()
    model = profile.model
    built, _ = worker.call(
        "train.build",
        {
            "model": model.model_dump(mode="json"),
            "mixers": [model.mixer_arguments(layer) for layer in range(model.layers)],
            "budget": job["budget"],
            "init": job["init"],
            "compile": bool(job.get("compile")),
        },
    )
    return built
