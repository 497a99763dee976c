"""Going on from a kept checkpoint under another schedule: a finalist is extended, or decayed from a share of its run.

The end of the stable phase (and shares of it: checkpoint.stable of a profile) is kept with its optimiser. Since the
training stream's rows do not depend on how many there are, a run extended from there is the run that the longer
profile would have given, to the last bit on CPU.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import UsageError
from training.checkpoints import Identity, describe
from training.profiles import Profile

__all__ = ["branched", "require_lineage"]


def branched(profile: Profile, file: Path, decay_steps: int | None) -> Profile:
    """The profile under which a run goes on from `file`.

    Args:
        decay_steps: None: `profile` as it is, whose steps then say how far the run is extended; else the rate decays
            linearly over so many steps from the checkpoint on, and there the run ends.

    Raises:
        UsageError: the checkpoint cannot be read, or lies at or behind the profile's last step.
    """
    _, step = describe(file)
    if decay_steps is not None:
        if profile.train.schedule != "wsd":
            raise UsageError(
                f"--decay-steps needs a profile with train.schedule = 'wsd', {profile.name} has a cosine",
                "name the profile that the checkpoint was made with",
            )
        train = profile.train.model_copy(
            update={
                "steps": step + decay_steps,
                "decay": decay_steps,
                "warmup": min(profile.train.warmup, step),
                "final_lr": profile.train.final_lr if profile.train.final_lr < 1 else 0.0,
            }
        )
        checkpoint = profile.checkpoint.model_copy(update={"stable": []})
        name = f"{profile.name}-decay-{step}-{decay_steps}"
        return profile.model_copy(update={"name": name, "train": train, "checkpoint": checkpoint})
    if profile.train.steps <= step:
        raise UsageError(
            f"{file} stands at step {step}, and profile {profile.name} ends at step {profile.train.steps}",
            "name a profile with more steps, or --decay-steps N",
        )
    return profile


def require_lineage(file: Path, identity: Identity) -> None:
    """Raises:
    UsageError: the checkpoint is of another program or seed, or was trained on other data or another model.
    """
    found, _ = describe(file)
    same = (found.program_sha256, found.seed, found.lineage) == (
        identity.program_sha256,
        identity.seed,
        identity.lineage,
    )
    if not same:
        raise UsageError(
            f"{file} cannot be gone on from: expected {identity}; got {found} (program, seed, model, data, batch, "
            "init, device and trainer must be equal)",
            "name a checkpoint of this program, seed and scale",
        )
