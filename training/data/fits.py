"""Whether text, tokenizer and shards are there and fit the profile: refused before anything is trained."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import packages_distributions
from typing import Any

from common.errors import UsageError
from training.data import extract
from training.data.tokenizer import MARKERS, Codec, special_tokens
from training.profiles import OWN_TASKS, DataSpec, Profile

__all__ = [
    "HUB_ADVICE",
    "TEXT_ADVICE",
    "needs_symbols",
    "package_versions",
    "require_length",
    "require_shards",
    "require_vocabulary",
]

TEXT_ADVICE = "name more text with --text"
"""Where the text is the user's files or docstrings."""
HUB_ADVICE = "raise data.train_chars of the profile, or name a larger dataset in data.dataset"
"""Where it is a dataset of the hub."""


MOST_PADDING = 2
"""model.vocab must be below so many times the tokenizer's entries: a rounder size, up to the next power of two, is
quicker on a GPU; what is above is a mistake, whose rows take memory and learn nothing."""


def require_vocabulary(profile: Profile, ids: int, what: str = "the tokenizer") -> None:
    """
    Args:
        ids: of the tokenizer: one more than its highest.
        what: which tokenizer, in words.

    Raises:
        UsageError: the tokenizer has ids for which the model has no entry, or the model far more entries than it.
    """
    vocab = profile.model.vocab
    if ids > vocab:
        raise UsageError(
            f"{what} has {ids} entries, more than model.vocab = {vocab}",
            f"set model.vocab of profile {profile.name} to at least {ids}",
        )
    if vocab >= MOST_PADDING * ids:
        raise UsageError(
            f"{what} has {ids} entries, and model.vocab = {vocab} is not below {MOST_PADDING} times as many",
            f"set model.vocab of profile {profile.name} to {ids}, or to a rounder number below {MOST_PADDING * ids}",
        )


def package_versions(data: DataSpec) -> dict[str, str]:
    """Versions of the packages whose docstrings are read: training first, then held-out.

    Raises:
        UsageError: data.train names one that is not installed. JobError: one of data.heldout, which are pinned, is not.
    """
    for name in data.train:
        if not extract.installed(name):
            near = difflib.get_close_matches(name, sorted(packages_distributions()), n=1)
            raise UsageError(
                f"data.train names {name!r}, and there is no installed package of that name",
                (f"did you mean {near[0]}? " if near else "") + "Correct data.train of the profile, or install it",
            )
    return {name: extract.package_version(name) for name in (*data.train, *data.heldout)}


def needs_symbols(profile: Profile) -> bool:
    """Whether generated tasks are trained on or scored: their sequences are ids that the tokenizer must have."""
    return profile.tasks.share > 0 or bool(set(profile.eval.benchmarks) & set(OWN_TASKS) - {"cloze"})


def require_shards(profile: Profile, manifest: Mapping[str, Any], codec: Codec, folder: str) -> None:
    """
    Args:
        manifest: of the shards; its `tokenizer` is the name of theirs, missing in older ones.
        codec: their tokenizer.
        folder: where they lie, for the message.

    Raises:
        UsageError: they were cut by another tokenizer than data.tokenizer, its size does not fit model.vocab, or the
            ids of markers and symbols are others than those of the profile's tasks.
    """
    shards = f"the shards in {folder}"
    again = "make shards with this profile: python training/prepare.py --profile PROFILE --text FILE... --out DIR"
    _require_name(profile, manifest.get("tokenizer"), codec, shards, again)
    require_vocabulary(profile, codec.size, f"the tokenizer of {shards}")
    if needs_symbols(profile):
        _require_symbols(profile, codec, shards, again)


def _require_name(profile: Profile, named: str | None, codec: Codec, shards: str, again: str) -> None:
    wanted, trained = profile.data.tokenizer, _has(codec, special_tokens(0))
    if named is None:
        # Its file does not tell which one of the hub it is, only whether it has the markers of ours.
        same, found = (wanted == "bpe") == trained, "'bpe'" if trained else "one of the hub"
    else:
        same, found = named == wanted, repr(named)
    if not same:
        other = named or ("bpe" if trained else None)
        set_it = f"set data.tokenizer = {other!r}" if other else "set data.tokenizer to its name"
        raise UsageError(
            f"{shards} were tokenised with {found}, and data.tokenizer of profile {profile.name} is {wanted!r}",
            f"{set_it}, or {again}",
        )


def _require_symbols(profile: Profile, codec: Codec, shards: str, again: str) -> None:
    """Training takes a symbol by its id and scoring by its text: both must mean the same token."""
    spec = profile.tasks
    wanted = special_tokens(spec.symbols, spec.wider)
    if _has(codec, wanted):
        return
    place = next(number for number, token in enumerate(wanted) if codec.encode_items(token) != [number])
    markers = " and the markers of the wider tasks" if spec.wider else ""
    raise UsageError(
        f"the tokenizer of {shards} has {_symbols_of(codec)} task symbols, and profile {profile.name} needs "
        f"{spec.symbols}{markers}: {wanted[place]} should be its token {place}, and is "
        f"{codec.encode_items(wanted[place])}",
        f"{again}; or set tasks.symbols and tasks.names to what the shards have; or train and score without generated "
        "tasks (tasks.share = 0, none of them in eval.benchmarks)",
    )


def _has(codec: Codec, tokens: Sequence[str]) -> bool:
    """Whether `tokens` are the ids 0, 1, ... of the tokenizer."""
    return all(codec.encode_items(token) == [number] for number, token in enumerate(tokens))


def _symbols_of(codec: Codec) -> int:
    """Task symbols at their ids."""
    first, symbols = 1 + len(MARKERS), 0
    while codec.encode_items(f"<|s{symbols}|>") == [first + symbols]:
        symbols += 1
    return symbols


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
