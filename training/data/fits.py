"""Whether a tokenizer and the text that it cut fit the profile: refused before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import UsageError
from training.profiles import Profile

__all__ = ["HUB_ADVICE", "TEXT_ADVICE", "require_length", "require_vocabulary"]

TEXT_ADVICE = "name more text with --text"
"""Where the text is the user's files or docstrings."""
HUB_ADVICE = "raise data.train_chars of the profile, or name a larger dataset in data.dataset"
"""Where it is a dataset of the hub."""


def require_vocabulary(profile: Profile, ids: int) -> None:
    """
    Args:
        ids: of the tokenizer: one more than its highest.

    Raises:
        UsageError: the tokenizer has ids for which the model has no entry.
    """
    if ids > profile.model.vocab:
        raise UsageError(
            f"the tokenizer has {ids} entries, more than model.vocab = {profile.model.vocab}",
            f"set model.vocab of profile {profile.name} to at least {ids}",
        )


def require_length(profile: Profile, counts: Mapping[str, int], held_out: str, fix: str) -> None:
    """
    Args:
        counts: tokens of the sides `train` and `heldout`.
        held_out: what of the text is held out, in words.

    Raises:
        UsageError: a side is too short for a training row, or for the windows that are scored.
    """
    windows, length = profile.eval.heldout_sequences, profile.train.seq_len
    need = {
        "train": (4 * (length + 1), "training tokens"),
        # Windows that overlap would count tokens twice, and show one another's future (training/scorer/audit.py).
        "heldout": (windows * (length + 1), f"held-out tokens, so that the {windows} scored windows do not overlap"),
    }
    for side, (least, what) in need.items():
        if counts[side] < least:
            raise UsageError(
                f"the text is too short for profile {profile.name}: expected at least {least:,} {what}, got "
                f"{counts[side]:,} ({held_out} is held out, duplicates are removed)",
                fix,
            )
