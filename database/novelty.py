"""How much two programs share: token shingles, and a sketch of them (MinHash) that makes the nearest program quick to
find."""

from __future__ import annotations

import re
import threading
import zlib
from collections import OrderedDict

import numpy as np

from database import tree
from database.store import Session

__all__ = ["LONGEST_PROGRAM", "PERMUTATIONS", "Sketches", "distance", "shingles", "sketch"]

LONGEST_PROGRAM = 1 << 20
"""Characters of a program that are compared: its beginning. Programs of designs have some ten thousand."""
PERMUTATIONS = 128
_SHINGLE = 5
_PAGE = 5000
_KEPT_BYTES = 16 << 20
"""Shingles of the programs compared last; those of a design take some 20 KB."""
_EXACT = 3
_MIX = np.uint64(0x9E3779B97F4A7C15)
_TOKEN = re.compile(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|#[^\n]*|\w+|[^\w\s]')
_PRIME = np.uint64((1 << 31) - 1)
_RANDOM = np.random.default_rng(20250701)
_A = _RANDOM.integers(1, int(_PRIME), PERMUTATIONS, dtype=np.uint64)
_B = _RANDOM.integers(0, int(_PRIME), PERMUTATIONS, dtype=np.uint64)


def shingles(program: str) -> np.ndarray:
    """Hashes of every run of 5 tokens among the first 1,048,576 characters, without comments and triple-quoted texts:
    uint32 [n], sorted, each once, n >= 1.

    The rest of a longer program is not looked at: tokens take many times the memory of their text, and no other thread
    runs while they are found.
    """
    found = _TOKEN.findall(program[:LONGEST_PROGRAM])
    tokens = [token for token in found if token[0] != "#" and token[:3] not in ('"""', "'''")]
    coded = [zlib.crc32(token.encode("utf-8", "replace")) for token in tokens]
    coded += [0] * max(0, _SHINGLE - len(coded))
    values = np.array(coded, dtype=np.uint64)
    count = len(values) - _SHINGLE + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(_SHINGLE):
        mixed = mixed * _MIX + values[offset : offset + count] + np.uint64(1)
    return np.unique(((mixed ^ (mixed >> np.uint64(29))) * _MIX) >> np.uint64(32)).astype(np.uint32)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - |a & b| / |a | b| of two sets of shingles, in [0, 1]."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return 1 - shared / (len(a) + len(b) - shared)


def sketch(hashes: np.ndarray) -> bytes:
    """MinHash of a set of shingles: uint32 little-endian [128]. The share of equal positions estimates 1 - distance
    within 0.05."""
    values = hashes.astype(np.uint64) % _PRIME
    lowest = np.full(PERMUTATIONS, _PRIME, dtype=np.uint64)
    for start in range(0, len(values), 1024):
        hashed = (values[start : start + 1024, None] * _A + _B) % _PRIME
        lowest = np.minimum(lowest, hashed.min(axis=0))
    return lowest.astype("<u4").tobytes()


class Sketches:
    """The sketches of all stored programs, in memory; follows the store.

    It reads what came by the sequence number of the sketches. When the store's epoch says that something was removed,
    it asks for the numbers that are left, and drops all others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset(-1)

    def _reset(self, epoch: int) -> None:
        self._epoch = epoch
        self._size = 0
        self._sequence = 0
        """The last one read, whether or not it is still there."""
        self._sequences = np.zeros(64, dtype=np.int64)
        self._indices = np.zeros(64, dtype=np.int64)
        self._rows = np.zeros((64, PERMUTATIONS), dtype="<u4")
        self._shingles: OrderedDict[int, np.ndarray] = OrderedDict()
        """By sequence number, which no other program gets."""
        self._shingle_bytes = 0

    def nearest(self, session: Session, hashes: np.ndarray, before: int | None = None) -> tuple[int, float] | None:
        """The nearest program among the elements with an index below `before`.

        The sketches choose the three that look nearest; those are compared exactly. Sees what is committed.

        Returns:
            (index, distance), None when there is no earlier element.
        """
        with self._lock:
            self._follow(session)
            known = self._indices[: self._size]
            if not self._size:
                return None
            shared = (self._rows[: self._size] == np.frombuffer(sketch(hashes), dtype="<u4")).sum(axis=1)
            if before is not None:
                shared[known >= before] = -1
            best = np.argsort(-shared, kind="stable")[:_EXACT]
            chosen = [int(at) for at in best if shared[at] >= 0]
            found = [(distance(hashes, self._of(session, at)), int(known[at])) for at in chosen]
            nearest = min(found, default=None)
            return None if nearest is None else (nearest[1], nearest[0])

    def _of(self, session: Session, at: int) -> np.ndarray:
        """The shingles of the program in row `at`."""
        sequence = int(self._sequences[at])
        known = self._shingles.get(sequence)
        if known is not None:
            self._shingles.move_to_end(sequence)
            return known
        found = shingles(tree.element_of(session, int(self._indices[at])).program)
        self._shingles[sequence] = found
        self._shingle_bytes += found.nbytes
        while self._shingle_bytes > _KEPT_BYTES:
            self._shingle_bytes -= self._shingles.popitem(last=False)[1].nbytes
        return found

    def _follow(self, session: Session) -> None:
        epoch = int(session.state("epoch") or 0)
        if epoch < self._epoch:
            # The store went back to an earlier state.
            self._reset(epoch)
        elif epoch != self._epoch:
            self._epoch = epoch
            if self._size:
                self._keep(session.sketch_sequences())
        while True:
            page = session.sketches(self._sequence, _PAGE)
            if not page:
                return
            needed = self._size + len(page)
            if needed > len(self._indices):
                room = max(needed, 2 * len(self._indices)) - len(self._indices)
                self._sequences = np.concatenate([self._sequences, np.zeros(room, dtype=np.int64)])
                self._indices = np.concatenate([self._indices, np.zeros(room, dtype=np.int64)])
                self._rows = np.concatenate([self._rows, np.zeros((room, PERMUTATIONS), dtype="<u4")])
            self._sequences[self._size : needed] = [sequence for sequence, _, _ in page]
            self._indices[self._size : needed] = [index for _, index, _ in page]
            for offset, (_, _, row) in enumerate(page):
                self._rows[self._size + offset] = np.frombuffer(row, dtype="<u4")
            self._size, self._sequence = needed, page[-1][0]

    def _keep(self, sequences: np.ndarray) -> None:
        """Drops every row but those with these sequence numbers."""
        there = np.isin(self._sequences[: self._size], sequences)
        size = int(there.sum())
        if size == self._size:
            return
        # What comes before the first that is gone stays where it is.
        first = int(np.argmin(there))
        for rows in (self._sequences, self._indices, self._rows):
            rows[first:size] = rows[first : self._size][there[first:]]
        self._size = size
