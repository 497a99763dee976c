"""The novelty index: FAISS over the windows of all motivations. A disposable cache: the store holds every vector.

It follows the store by the sequence number of the vectors; when the store's epoch says that something was removed or
replaced, what is gone is skipped. A session that sees an older state of the store than it is asked for that state, and
changes nothing. It is built anew when the embedding model differs, when the store itself has gone back, or when its
file is missing, damaged, or of another store. Rebuilding for speed (dropping what is skipped, approximate search of
many) happens in the background, while searches go on in what is there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import StoreError
from common.files import remove_abandoned
from database.store import Session, VectorRow, VectorState
from database.vector_file import Snapshot, read_vectors, write_vectors
from database.vectors import Vectors, approximate

__all__ = ["IndexStats", "VectorIndex"]

_LOG = logging.getLogger(__name__)
_PAGE = 2000
_SAVE_EVERY = 1024
_MANY_DEAD = 1000
_NOTHING = VectorState(-1, 0, None)
_PROBES = 8
_Read = Callable[[Callable[[Session], Any]], Any]


@dataclass(frozen=True)
class IndexStats:
    """`vectors` counts the windows that the index holds now; `orphans` are those of vanished elements among them, until
    they are dropped. `elements` counts the elements that the others belong to.
    `recall` is that of an approximate index, as measured when it was built; None while every search is exact."""

    vectors: int
    elements: int
    orphans: int
    dimension: int
    recall: float | None

    @property
    def active(self) -> int:
        """Windows of elements that are there."""
        return self.vectors - self.orphans


class VectorIndex:
    """Nearest motivations by inner product of unit vectors. Thread-safe.

    Args:
        file: where the cache is kept; None keeps it in memory only.
        exact: windows up to which every search is exact.
        read: `Store.read`, by which an older session is told from a store that has gone back; None where no session is
            used for longer than a search.
    """

    def __init__(self, file: Path | None, exact: int = 100_000, read: _Read | None = None) -> None:
        self._file = file
        self._read = read
        self._exact = exact
        self._lock = threading.Lock()
        self._vectors = Vectors()
        self._state = _NOTHING
        self._unsaved = 0
        self._loaded = file is None
        if file is not None:
            remove_abandoned(file)

    def search(self, session: Session, query: np.ndarray, k: int, before: int | None = None) -> list[tuple[int, float]]:
        """See `Vectors.search`."""
        with self._lock:
            older = self._follow(session)
            if older is None:
                return self._vectors.search(query, k, before)
            return self._search_older(session, older, query, k, before)

    def _search_older(
        self, session: Session, now: VectorState, query: np.ndarray, k: int, before: int | None
    ) -> list[tuple[int, float]]:
        """As `search`, among what a session knows that sees an older state `now` of the store."""
        vectors = self._vectors
        if now.epoch == self._state.epoch:
            # Nothing was removed since.
            return vectors.search(query, k, before, vectors.alive & (vectors.sequences <= now.sequence))
        known = session.vector_sequences()
        found = vectors.search(query, k, before, np.isin(vectors.sequences, known))
        # What was removed since, and dropped.
        lost = np.setdiff1d(known, vectors.sequences).tolist()
        if lost:
            rest, wanted, after = Vectors(), set(lost), lost[0] - 1
            while after < lost[-1] and (rows := session.windows(after, _PAGE)):
                rest.add([row for row in rows if row.sequence in wanted])
                after = rows[-1].sequence
            found += rest.search(query, k, before)
        return sorted(found, key=lambda item: (-item[1], item[0]))[:k]

    def rebuild(self, session: Session) -> IndexStats:
        """Builds the index from the store's vectors, whatever it held."""
        with self._lock:
            self._loaded = True
            self._reset()
            self._follow(session)
            return self._stats()

    def stats(self, session: Session) -> IndexStats:
        """What the index holds, brought up to date."""
        with self._lock:
            self._follow(session)
            return self._stats()

    def clean(self, session: Session) -> IndexStats:
        """Drops the orphans; returns what was there before, those included."""
        before = self.stats(session)
        if before.orphans:
            self.rebuild(session)
        return before

    def maintain(self, read: _Read) -> bool:
        """One step of upkeep in the background: follows, rebuilds for speed, saves; whether more is to be done.

        Args:
            read: `Store.read`.
        """
        read(self._catch_up)
        with self._lock:
            vectors = self._vectors
            many = vectors.total - vectors.dead > self._exact
            stale = vectors.dead > max(_MANY_DEAD, vectors.total // 10)
            tail = vectors.total - vectors.listed
            stale |= many and (not vectors.listed or tail > max(_MANY_DEAD, vectors.listed // 4))
            unsaved = self._unsaved >= max(_SAVE_EVERY, vectors.total // 10)
        if stale:
            self._rebuild_aside(read, many)
            return True
        if unsaved:
            self.save()
        return False

    def _catch_up(self, session: Session) -> None:
        with self._lock:
            self._follow(session)

    def _rebuild_aside(self, read: _Read, many: bool) -> None:
        """Builds another index from the store and puts it in the place of this one; searches go on meanwhile."""
        state: VectorState = read(lambda session: session.vector_state())
        fresh, after = Vectors(), 0
        while after < state.sequence:
            rows = read(partial(_page, after))
            if not rows:
                break
            fresh.add(rows)
            after = rows[-1].sequence
        if many and fresh.flat is not None:
            fresh = approximate(fresh)
        with self._lock:
            # What came or went since then is caught up with by the next search; the store's own number may be ahead of
            # a vector that is about to be stored.
            self._vectors, self._unsaved = fresh, self._unsaved + fresh.total
            self._state = VectorState(state.epoch, after, state.model)
        _LOG.info("vector index rebuilt: %d windows, recall %s", fresh.total, fresh.recall or "exact")

    def _stats(self) -> IndexStats:
        vectors = self._vectors
        owners = vectors.owners[vectors.alive]
        return IndexStats(vectors.total, len(np.unique(owners)), vectors.dead, vectors.dimension, vectors.recall)

    def _follow(self, session: Session) -> VectorState | None:
        """Takes in what came and went. The state that the session sees where that is older than what is held, which
        stays as it is then; else None."""
        now = session.vector_state()
        if not self._loaded:
            self._loaded = True
            self._load()
            if not self._belongs_to(session, now):
                _LOG.warning("%s is of another store or state: built anew", self._file)
                self._reset()
        ours = self._state
        if now.model != ours.model:
            self._reset()
        elif _precedes(now, ours):
            if self._read is not None and not _precedes(self._read(_state_of), ours):
                return now
            self._reset()
        elif now.epoch != ours.epoch:
            self._vectors.keep(session.vector_sequences())
            if not self._vectors.alive.any():
                self._reset()
        # The last of all may have been removed: nothing is alive beyond what the store counts now.
        self._state = VectorState(now.epoch, min(now.sequence, self._state.sequence), now.model)
        while self._state.sequence < now.sequence:
            rows = session.windows(self._state.sequence, _PAGE)
            if not rows:
                break
            self._vectors.add(rows)
            self._unsaved += len(rows)
            self._state = VectorState(now.epoch, rows[-1].sequence, now.model)
        return None

    def _belongs_to(self, session: Session, now: VectorState) -> bool:
        """Whether a loaded cache was made from this store: some of its windows are looked up."""
        vectors = self._vectors
        if now.model != self._state.model or now.epoch != self._state.epoch or not vectors.total:
            return True
        for position in np.unique(np.linspace(0, vectors.total - 1, _PROBES).astype(int)).tolist():
            if not vectors.alive[position]:
                continue
            rows = session.windows(int(vectors.sequences[position]) - 1, 1)
            if not rows or rows[0].sequence != vectors.sequences[position] or rows[0].index != vectors.owners[position]:
                return False
            if position >= vectors.listed and vectors.flat is not None:
                stored = vectors.flat.reconstruct(position - vectors.listed)
                if not any(np.array_equal(stored, window) for window in rows[0].windows):
                    return False
        return True

    def _reset(self) -> None:
        self._vectors = Vectors()
        self._state = _NOTHING
        self._unsaved += 1

    def save(self) -> None:
        """Writes the cache when it changed. A cache that cannot be written is only logged: it can be built again."""
        if self._file is None:
            return
        with self._lock:
            if not self._unsaved or not self._loaded:
                return
            snapshot = Snapshot.of(self._vectors, self._state)
            self._unsaved = 0
        # What another server over this store left, which was killed while it wrote.
        remove_abandoned(self._file)
        try:
            write_vectors(self._file, snapshot, self._lock)
        except StoreError as error:
            _LOG.warning("the vector cache was not written: %s", error.message)

    def _load(self) -> None:
        if self._file is None or not self._file.exists():
            return
        try:
            self._vectors, self._state = read_vectors(self._file.read_bytes())
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            _LOG.warning("%s is built anew: %s", self._file, error)
            return
        self._unsaved = 0


def _state_of(session: Session) -> VectorState:
    return session.vector_state()


def _precedes(now: VectorState, other: VectorState) -> bool:
    """Whether the store was in the state `now` before it was in the other one."""
    return (now.epoch, now.sequence) < (other.epoch, other.sequence)


def _page(after: int, session: Session) -> list[VectorRow]:
    return session.windows(after, _PAGE)
