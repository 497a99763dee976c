"""The user's own text files as documents: blocks of a file, each on one side, training or held out.

Neighbouring blocks tell of the same things, so a side is never decided block by block. Whole files are held out, taken
in an order that their content gives, as many as fit into the share that is to be held out. Where these are less than
half of that share (few files, or one that is most of the text), each file is cut at one place instead, and its end is
held out. Files with the same content count as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from common.errors import UsageError
from training.data.extract import SHORTEST
from training.data.shards import file_sha256

__all__ = ["Side", "documents"]

BLOCK = 4000
"""Characters of one block."""
Side = Literal["train", "heldout"]


def documents(files: Sequence[Path], one_in: int) -> Iterator[tuple[str, Side]]:
    """The blocks of the files, in order, each with its side. Blocks end at an empty line where one is near.

    Args:
        files: regular files.
        one_in: of so many characters one is held out, as nearly as files and blocks allow.

    Raises:
        UsageError: a file cannot be read as UTF-8 text.
    """
    contents = [_content(path) for path in files]
    held = _held_out({content: path.stat().st_size for content, path in zip(contents, files, strict=True)}, one_in)
    for content, path in zip(contents, files, strict=True):
        blocks = _blocks(_text(path))
        cut = (0 if content in held else len(blocks)) if held else _cut(blocks, one_in)
        for number, block in enumerate(blocks):
            yield block, "train" if number < cut else "heldout"


def _content(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UsageError:
    return UsageError(f"cannot read the text file {path}: {error}", "name readable UTF-8 files with --text")


def _held_out(sizes: dict[str, int], one_in: int) -> set[str]:
    """Which files, by content, are held out whole; none where these were too little."""
    total, taken = sum(sizes.values()), 0
    held: set[str] = set()
    for content in sorted(sizes):
        if (taken + sizes[content]) * one_in <= total:
            held.add(content)
            taken += sizes[content]
    return held if taken * 2 * one_in >= total else set()


def _cut(blocks: Sequence[str], one_in: int) -> int:
    """How many blocks come before the end that is held out: of two or more, at least one is on each side."""
    need, cut = sum(map(len, blocks)) / one_in, len(blocks)
    while cut > 1 and sum(map(len, blocks[cut:])) < need:
        cut -= 1
    return cut


def _blocks(text: str) -> list[str]:
    # A short file must still give a held-out block: never fewer than ten blocks where there is text for them.
    size = min(BLOCK, max(SHORTEST, len(text) // 10))
    blocks: list[str] = []
    current: list[str] = []
    length = 0
    for line in text.splitlines():
        current.append(line)
        length += len(line) + 1
        if (length >= size and not line.strip()) or length >= 2 * size:
            blocks.append("\n".join(current).strip("\n"))
            current, length = [], 0
    if length >= SHORTEST or (current and not blocks):
        blocks.append("\n".join(current).strip("\n"))
    return [block for block in blocks if block.strip()]
