"""Checkpoints of a training run: files that the trusted side writes beside a run's results, and how one is found again.

A checkpoint is one safetensors file: weights, AdamW's moments, buffers, generator states and the sums of the report
that is under way; in its metadata whose run it is, the step (which is the data position: the stream is a file of rows
in a fixed order), the seconds used so far, and every report until then. It is written beside, flushed and renamed, so
a kill leaves the one before; its SHA-256 stands in it, so a damaged one is known and passed over.

What a checkpoint may not do, since its numbers come from a process that holds candidate code:

- It is numbers only. The worker writes no file and names no path: arrays cross the pipe as frames of five dtypes, the
  scorer bounds their names and their bytes and writes them; safetensors is read back without pickle or code.
- It carries nothing of the held-out text: checkpoints are taken while `train.run` runs, and what is scored is shown
  after that. A run killed while it was scored goes on from the weights of before.
- It buys no training. Steps ascend, over kills too. CPU and wall seconds that were used count against the limits and
  the monitor's rules after a resume; they and the reports are in the part that the trusted side writes. What was used
  after the last checkpoint is lost with the process, so a program that kills itself gains at most one interval, once a
  start; what the worker could do beyond its steps in one process (more updates inside `forward`) it could do before.
- Weights that no training gave are no new hole: a program could set its own at any time. The score comes from logits
  on text it never saw, audited, whatever the weights.
- It belongs to one program, seed and baseline key (profile, corpus, trainer, versions, device); another's is refused.
  The digest finds damage, not malice: who can write the folder can write result.json as well.

Not kept: Python state of a candidate outside its registered parameters and buffers (a step counter). The verifier
refuses programs whose answers depend on such state where it finds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import StoreError, UsageError

__all__ = [
    "FOLDER",
    "Checkpoint",
    "Identity",
    "describe",
    "kept",
    "newest",
    "prune",
    "read",
    "refuse_foreign",
    "settle",
    "write",
]

FOLDER = "checkpoints"
"""Name of the folder beside a run's results."""
_VERSION = 1
_LARGEST_HEADER = 64 << 20
_STEP, _STABLE = "step", "stable"


@dataclass(frozen=True)
class Identity:
    """Whose run it is. The hashes are compared; the names are for people.

    Attributes:
        lineage: hash of all but the schedule, so that a run under another schedule can go on from it.
    """

    program_sha256: str
    baseline_key: str
    seed: int
    program: str = ""
    profile: str = ""
    lineage: str = ""

    def same_run(self, other: Identity) -> bool:
        return (self.program_sha256, self.baseline_key, self.seed) == (
            other.program_sha256,
            other.baseline_key,
            other.seed,
        )

    def __str__(self) -> str:
        return (
            f"program {self.program} ({self.program_sha256[:12]}), profile {self.profile}, seed {self.seed}, "
            f"key {self.baseline_key[:12]}"
        )


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory.

    Attributes:
        step: optimiser steps that are done.
        seconds, cpu_seconds: of training until then, read by the trusted side.
        reports: every report of training until then, as they went into metrics.jsonl.
        tensors: flat arrays by name.
    """

    identity: Identity
    step: int
    seconds: float
    cpu_seconds: float
    reports: list[dict[str, Any]]
    tensors: Mapping[str, np.ndarray] = field(repr=False)


def write(folder: Path, checkpoint: Checkpoint, *, stable: bool = False) -> Path:
    """Writes `checkpoint` into `folder` in one step.

    Args:
        stable: it ends a stable phase (or a share of it) and outlives later ones.

    Raises:
        OSError: the disk is full, or the folder cannot be written; files that were there are untouched.
    """
    from safetensors.numpy import save_file

    facts = {
        "version": _VERSION,
        **{name: value for name, value in vars(checkpoint).items() if name not in ("identity", "tensors")},
        "identity": asdict(checkpoint.identity),
    }
    text = json.dumps(facts, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_STABLE if stable else _STEP}-{checkpoint.step:09d}.safetensors"
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".writing-")
    os.close(descriptor)
    temporary = Path(name)
    try:
        metadata = {"asi_arch": text, "sha256": _digest(text, checkpoint.tensors)}
        try:
            save_file(dict(checkpoint.tensors), temporary, metadata)
        except Exception as error:  # safetensors wraps a full disk in an error of its own
            raise error if isinstance(error, OSError) else OSError(None, str(error), str(target)) from error
        _flush(temporary)
        temporary.chmod(0o644)
        temporary.replace(target)
        _flush(folder)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def read(path: Path) -> Checkpoint:
    """Reads one checkpoint and proves it whole.

    Raises:
        StoreError: it is damaged, or no checkpoint of this version.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        text = metadata["asi_arch"]
        if metadata["sha256"] != _digest(text, tensors):
            raise ValueError("its SHA-256 is another")
        facts = json.loads(text)
        if facts.pop("version") != _VERSION:
            raise ValueError("it was written by another version")
        return Checkpoint(identity=Identity(**facts.pop("identity")), tensors=tensors, **facts)
    except Exception as error:
        raise StoreError(f"the checkpoint {path} is damaged: {error}", f"remove {path}") from error


def newest(folder: Path, identity: Identity, say: Callable[[str], None]) -> Checkpoint | None:
    """The latest whole checkpoint of this run, None when there is none. A damaged one is told and passed over.

    Raises:
        UsageError: it is of another run.
    """
    for path in _files(folder):
        try:
            found = read(path)
        except StoreError as error:
            say(f"{error.message}; going back to the one before")
            continue
        _require(found.identity, identity, folder)
        return found
    return None


def refuse_foreign(folder: Path, identity: Identity) -> None:
    """Looks at the metadata of every checkpoint in `folder`.

    Raises:
        UsageError: one is of another program, profile or seed.
    """
    for path in _files(folder):
        facts = _facts(path)
        if facts is not None:
            _require(Identity(**facts["identity"]), identity, folder)


def kept(folder: Path) -> list[Path]:
    """Checkpoints of `folder`, the latest step first."""
    return _files(folder)


def prune(folder: Path, last: int) -> None:
    """Removes all but the latest `last` of `folder`, and what a kill left half-written. Stable ends stay."""
    for path in [path for path in _files(folder) if path.name.startswith(_STEP)][last:]:
        path.unlink(missing_ok=True)
    for path in folder.glob(".writing-*"):
        path.unlink(missing_ok=True)


def settle(folder: Path, keep: bool) -> None:
    """After a run has ended: removes its checkpoints, or all but the last and the stable ends.

    Raises:
        StoreError: they cannot be removed.
    """
    try:
        if keep:
            prune(folder, 1)
        elif folder.exists():
            shutil.rmtree(folder)
    except FileNotFoundError:
        return  # another thread was faster
    except OSError as error:
        raise StoreError(f"cannot remove the checkpoints in {folder}: {error.strerror}", f"remove {folder}") from error


def _require(found: Identity, wanted: Identity, folder: Path) -> None:
    if not found.same_run(wanted):
        raise UsageError(
            f"{folder} holds checkpoints of another run: expected {wanted}; got {found}",
            f"name another --out, or remove {folder}",
        )


def _files(folder: Path) -> list[Path]:
    """The latest first; at one step the stable end after the ordinary one."""
    if not folder.is_dir():
        return []
    files = [path for kind in (_STEP, _STABLE) for path in folder.glob(f"{kind}-*.safetensors")]
    return sorted(files, key=lambda path: (path.stem.partition("-")[2], path.stem), reverse=True)


def describe(path: Path) -> tuple[Identity, int]:
    """(Whose it is, steps that are done), from the header alone.

    Raises:
        UsageError: it is no checkpoint.
    """
    facts = _facts(path)
    if facts is None:
        raise UsageError(f"{path} is no checkpoint, or a damaged one", "name a file of a run's checkpoints folder")
    return Identity(**facts["identity"]), int(facts["step"])


def _facts(path: Path) -> dict[str, Any] | None:
    """From the header alone, without reading the tensors; None where it is damaged."""
    if not path.is_file():
        return None
    wrong = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    with contextlib.suppress(*wrong), path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length <= _LARGEST_HEADER:
            facts: dict[str, Any] = json.loads(json.loads(handle.read(length))["__metadata__"]["asi_arch"])
            Identity(**facts["identity"])
            int(facts["step"])
            return facts
    return None


def _digest(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\0{name} {array.dtype.name} {array.shape}\0".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
