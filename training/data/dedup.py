"""Near-duplicate removal: no long line and no 12-word sequence occurs in two documents, on whichever side of the split.

Docstrings repeat each other so much that a random split leaks a third of its 12-word sequences into the training text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["SHINGLE", "Deduplicator", "shingles"]

SHINGLE = 12
"""Words of one sequence that must not repeat."""
LINE = 40
"""Characters from which a repeated line counts as a duplicate; shorter ones ("Returns") are ordinary language."""
SHORTEST = 200
_WORD = re.compile(r"\w+")


def shingles(text: str) -> set[str]:
    """All sequences of 12 words of `text`, lower case, punctuation dropped."""
    words = _WORD.findall(text.lower())
    return {" ".join(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1)}


class Deduplicator:
    """Remembers what it let through; feed it the training side first, then the held-out side.

    Guarantee: after `filter`, no line of 40 or more characters and no 12-word sequence of a returned document occurs
    in another document that this object has returned. Paraphrases are not found.
    """

    def __init__(self) -> None:
        self._lines: set[int] = set()
        self._shingles: set[int] = set()

    def filter(self, documents: Iterable[str]) -> list[str]:
        """Documents without the lines that repeat earlier ones; those that fall under 200 characters are dropped."""
        kept = (self._filter_one(document) for document in documents)
        return [document for document in kept if document is not None]

    def _filter_one(self, document: str) -> str | None:
        lines: list[str] = []
        words: list[str] = []
        new_lines: set[int] = set()
        new_shingles: set[int] = set()
        for line in document.splitlines():
            bare = line.strip()
            identity = hash(bare) if len(bare) >= LINE else None
            if identity is not None and identity in self._lines:
                continue
            own = _WORD.findall(bare.lower())
            window = words[-(SHINGLE - 1) :] + own
            found = (
                {hash(" ".join(window[at : at + SHINGLE])) for at in range(len(window) - SHINGLE + 1)} if own else set()
            )
            if not found.isdisjoint(self._shingles):
                continue
            lines.append(line)
            words = window
            new_shingles |= found
            if identity is not None:
                new_lines.add(identity)
        text = "\n".join(lines).strip("\n")
        if len(text) < SHORTEST:
            return None
        self._lines |= new_lines
        self._shingles |= new_shingles
        return text
