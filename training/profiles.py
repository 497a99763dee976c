"""Profiles: named scales. One TOML file in training/profiles holds model, data, tasks, optimisation, scoring and
limits; the keys of each stand in training/sections.py.

A profile is the whole definition of an experiment's size: two runs of one profile and one seed train on the same tokens
in the same order and are scored on the same items.
"""

from __future__ import annotations

import reprlib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from common.errors import UsageError
from common.files import read_regular, sha256_text
from training.sections import (
    FIRST_TASKS,
    LONGER_TASKS,
    LONGEST_CONTEXT,
    MOST_IDS,
    OWN_TASKS,
    STREAM_TASKS,
    CheckpointSpec,
    DataSpec,
    EvalSpec,
    LimitSpec,
    ModelSpec,
    SearchSpec,
    Spec,
    TaskSpec,
    TrainSpec,
    task_lengths,
)

__all__ = [
    "FIRST_TASKS",
    "LONGER_TASKS",
    "LONGEST_CONTEXT",
    "MOST_IDS",
    "OWN_SHARE",
    "OWN_TASKS",
    "STREAM_TASKS",
    "CheckpointSpec",
    "DataSpec",
    "EvalSpec",
    "LimitSpec",
    "ModelSpec",
    "Profile",
    "SearchSpec",
    "TaskSpec",
    "TrainSpec",
    "load_profile",
    "own_benchmarks",
    "profile_names",
    "task_lengths",
]

FOLDER = Path(__file__).resolve().parent / "profiles"
OWN_SHARE = 0.1
"""Share of the rows that hold task sequences where --benchmarks own adds them to a profile without any."""


class Profile(Spec):
    """One named scale. Immutable; `fingerprint` is the hash of all that changes a result."""

    name: str
    description: str
    model: ModelSpec
    data: DataSpec
    tasks: TaskSpec = TaskSpec()
    train: TrainSpec
    eval: EvalSpec
    search: SearchSpec
    limits: LimitSpec
    checkpoint: CheckpointSpec = CheckpointSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        if self.tasks.share > 0 and self.data.tokenizer != "bpe":
            raise ValueError("tasks.share > 0 needs data.tokenizer = 'bpe': the task symbols are in its vocabulary")
        own = [name for name in self.eval.benchmarks if name in OWN_TASKS]
        if set(own) - {"cloze"} and self.data.tokenizer != "bpe":
            raise ValueError(f"eval.benchmarks {own} need data.tokenizer = 'bpe': their symbols are in its vocabulary")
        absent = [name for name in own if _learnt_as(name) not in (*self.tasks.names, "cloze")]
        if absent:
            raise ValueError(f"eval.benchmarks {absent} need these tasks in tasks.names, got {self.tasks.names}")
        if "needle_4x" in own and 4 * self.train.seq_len > LONGEST_CONTEXT:
            raise ValueError(
                f"needle_4x needs 4 x train.seq_len of at most {LONGEST_CONTEXT}, what scoring keeps of a context, "
                f"got {4 * self.train.seq_len}"
            )
        longest = max(task_lengths(self.tasks)[name] for name in self.tasks.names)
        if self.tasks.share > 0 and longest > self.train.seq_len:
            raise ValueError(f"train.seq_len must be at least {longest} for these tasks, got {self.train.seq_len}")
        if self.train.warmup + self.train.decay > self.train.steps:
            raise ValueError(
                f"train.warmup + train.decay must not exceed train.steps = {self.train.steps}, "
                f"got {self.train.warmup} + {self.train.decay}"
            )
        if (self.eval.validation_every or 0) % self.train.report_every:
            raise ValueError(
                f"eval.validation_every must be a multiple of train.report_every = {self.train.report_every}, "
                f"got {self.eval.validation_every}"
            )
        if self.checkpoint.stable and self.train.schedule != "wsd":
            raise ValueError("checkpoint.stable needs train.schedule = 'wsd': a cosine has no stable phase")
        least = 256 + self.tasks.symbols + 16 + (len(STREAM_TASKS) if self.tasks.wider else 0)
        if self.data.tokenizer == "bpe" and self.model.vocab < least:
            raise ValueError(
                f"model.vocab must be at least {least}, as bytes and task symbols come first, got {self.model.vocab}"
            )
        return self

    def fingerprint(self) -> str:
        """SHA-256 over all that changes a result: not description, search, limits, or when checkpoints are made."""
        return sha256_text(self.model_dump_json(exclude={"description", "search", "limits", "checkpoint"}))

    def stable_steps(self) -> list[int]:
        """Steps at which a checkpoint ends a share of the stable phase (warm-up counted in it)."""
        end = self.train.steps - self.train.decay
        return sorted({max(1, round(share * end)) for share in self.checkpoint.stable})


def own_benchmarks(profile: Profile) -> Profile:
    """`profile` with the project's own tasks as its only benchmarks (--benchmarks own): those that it names; where it
    names none, the first ones and cloze, learnt in `OWN_SHARE` of the rows, or cloze alone where the tokenizer has no
    symbols for the others.

    Raises:
        UsageError: they do not fit the profile, as where its sequences are too short for them.
    """
    own = [name for name in profile.eval.benchmarks if name in OWN_TASKS]
    tasks = profile.tasks
    if not own and profile.data.tokenizer == "bpe":
        own = [*FIRST_TASKS, "cloze"]
        tasks = tasks.model_copy(update={"share": tasks.share or OWN_SHARE, "names": list(FIRST_TASKS)})
    scored = profile.eval.model_copy(update={"benchmarks": own or ["cloze"]})
    try:
        return Profile.model_validate({**dict(profile), "eval": scored, "tasks": tasks})
    except ValidationError as error:
        wrong = "\n".join(_explain(item) for item in error.errors())
        raise UsageError(
            f"the project's own benchmarks do not fit profile {profile.name}: {wrong}",
            f"correct profile {profile.name}, or leave out --benchmarks own",
        ) from error


def _learnt_as(task: str) -> str:
    return "needle" if task in LONGER_TASKS else task


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """Loads a shipped profile by name, or a TOML file like them by path.

    Raises:
        UsageError: there is no such profile, or a value in it is wrong.
    """
    path = FOLDER / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path)
    known = ", ".join(profile_names())
    if path.suffix != ".toml" or not path.is_file():
        if path.suffix == ".toml" or path.exists() or len(path.parts) > 1:
            wrong = "is no TOML file" if path.exists() else "does not exist"
            raise UsageError(f"the profile file {path} {wrong}", f"name a file that is there, or one of: {known}")
        raise UsageError(
            f"unknown profile {str(name_or_path)!r}; there are: {known}",
            "name one of these with --profile, or a TOML file like those in training/profiles",
        )
    try:
        return Profile.model_validate({"name": path.stem, **tomllib.loads(read_regular(path).decode())})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise UsageError(f"{path} is not a readable TOML file: {error}", "correct the line that is named") from error
    except ValidationError as error:
        wrong = "\n".join(_explain(item) for item in error.errors())
        raise UsageError(f"profile {path}: {wrong}", f"correct {path}; training/sections.py lists every key") from error


_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "of at least",
    "less_than": "below",
    "less_than_equal": "of at most",
}


def _explain(item: Any) -> str:
    """One error of pydantic's in one line: the key, what was expected, what came."""
    kind, key = item["type"], ".".join(map(str, item["loc"]))
    if kind == "value_error":  # of a validator of ours, which names the keys and what came
        return str(item["ctx"]["error"])
    if kind == "missing":
        return f"{key}: this key is missing"
    if kind == "extra_forbidden":
        return f"{key}: there is no such key"
    if kind in _BOUNDS:
        (bound,) = item["ctx"].values()
        return f"{key}: expected a number {_BOUNDS[kind]} {bound}, got {item['input']!r}"
    return f"{key}: {item['msg']}, got {reprlib.repr(item['input'])}"
