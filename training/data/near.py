"""Near-duplicate documents by MinHash (Broder 1997) and locality-sensitive hashing, for corpora that exact shingles of
12 words would not fit into memory for.

Two documents count as near-duplicates when their sets of 5-word sequences overlap by about `threshold` (Jaccard) or
more. The hashing finds most such pairs, not all: at overlap 0.9 and threshold 0.8 nearly every one.
"""

from __future__ import annotations

import re

import numpy as np

__all__ = ["PERMUTATIONS", "Near", "signature"]

PERMUTATIONS = 128
_WORDS = 5
_SCHEME = "affine32"
_WORD = re.compile(r"\w+")


def signature(text: str) -> np.ndarray:
    """uint32 [128]: MinHash over the 5-word sequences of `text`, lower case, punctuation dropped."""
    from datasketch import MinHash

    words = _WORD.findall(text.lower())
    runs = {
        " ".join(words[at : at + _WORDS]).encode("utf-8", "replace") for at in range(max(1, len(words) - _WORDS + 1))
    }
    made = MinHash(PERMUTATIONS, scheme=_SCHEME)
    made.update_batch(list(runs))
    return np.asarray(made.hashvalues, dtype=np.uint32)


class Near:
    """Remembers signatures; `add` says whether one like it was there before."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._count = 0

    def add(self, values: np.ndarray) -> bool:
        """True where it is new, and then remembered; False where it is a near-duplicate."""
        from datasketch import MinHash

        made = MinHash(PERMUTATIONS, hashvalues=values, scheme=_SCHEME)
        if self._index.query(made):
            return False
        self._index.insert(self._count, made, check_duplication=False)
        self._count += 1
        return True
