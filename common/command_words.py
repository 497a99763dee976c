"""The user's own training script (training.command) as words, before anything is filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

__all__ = ["PLACEHOLDERS", "file_of", "filled", "from_here", "words_of"]

PLACEHOLDERS = {
    "program": "file with the program to train, OUT/NAME.py",
    "name": "its name, as the first cell of a row of results may say it",
    "profile": "name of the profile",
    "seed": "training seed",
    "out": "folder for the result files, in which the command runs",
}
"""What stands in braces in a word -> what takes its place."""
_IN_BRACES = re.compile(r"(?<!\$)\{(\w+)\}")


def words_of(command: str) -> list[str]:
    """The words of `command`, split as a POSIX shell does; no shell reads them.

    Raises:
        ValueError: there is none, a quote is left open, or braces hold what is no placeholder (`${...}` is left to a
            shell that is named in the command itself).
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"words as a shell splits them ({error})") from error
    if not words:
        raise ValueError("a command, such as 'bash train.sh {program} {seed} {out}'")
    unknown = [name for word in words for name in _IN_BRACES.findall(word) if name not in PLACEHOLDERS]
    if unknown:
        raise ValueError(f"placeholders out of {', '.join('{' + name + '}' for name in PLACEHOLDERS)}")
    return words


def from_here(command: str) -> str:
    """`command` with the files that it names by a relative path, or by `~`, named from the root: it will run in another
    folder, and no shell reads it.

    The first word without a slash is looked up on PATH, as in a shell.
    """
    words = words_of(command)
    for number, word in enumerate(words):
        named = "/" in word if number == 0 else not word.startswith("-")
        if named and (path := file_of(word)) is not None:
            words[number] = str(path.absolute())
    return shlex.join(words)


def file_of(word: str) -> Path | None:
    """The regular file that `word` names, with `~` as a shell reads it; None where it names none."""
    try:
        path = Path(word).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError):  # too long for a name, or the home of nobody: a word that is something else
        return None


def filled(words: list[str], values: Mapping[str, str]) -> list[str]:
    """`words` with every placeholder replaced. Without any, the name is added as the last word, as the published
    system calls a training script: `bash SCRIPT NAME`."""
    if not any(_IN_BRACES.search(word) for word in words):
        return [*words, values["name"]]
    return [_IN_BRACES.sub(lambda match: values[match[1]], word) for word in words]
