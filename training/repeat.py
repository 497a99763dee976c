"""The command that repeats a run, for its record: every setting that was given, wherever it was given."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from common.settings import Settings, flags_of
from training.programs import Program

__all__ = ["profile_word", "repeating_command"]


def profile_word(settings: Settings, profile: str) -> str:
    """What --profile takes for the profile of this name: the path that was given, or the name."""
    given = settings.run.profile
    return given if Path(given).stem == profile else profile


def repeating_command(
    settings: Settings,
    profile: str,
    program: Program,
    seed: int,
    *,
    file: str = "PROGRAM",
    out: str = "DIR",
    more: Sequence[str] = (),
) -> str:
    """A line for a shell in the repository.

    Args:
        profile: name or path, as --profile takes it.
        file, out: what train.py was told; in a run of the loop the words stand for the program of its element and any
            folder.
        more: flags of this run alone.
    """
    words = [file, "--profile", profile, "--seed", str(seed), "--out", out]
    words += ["--reference"] if program.reference else []
    # Only the user can vouch for a program on the command line; the loop knows its designer's by rendering them.
    words += ["--trust"] if program.trust in ("user", "genome") else []
    for section in ("sandbox", "training", "monitor"):
        words += flags_of(getattr(settings, section), section)
    return "python training/train.py " + shlex.join([*words, *more])
