"""The novelty index: FAISS over the windows of all motivations. A disposable cache: the store holds every vector.

It follows the store by the sequence number of the vectors, and is built anew when the store's epoch (something was
removed or replaced) or the embedding model differs, or its file is missing, stale or damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import StoreError
from common.files import write_atomic
from database.store import Session, VectorState

__all__ = ["IndexStats", "VectorIndex"]

_LOG = logging.getLogger(__name__)
_MAGIC = b"asi-arch vectors 1\n"
_PAGE = 2000
_SAVE_EVERY = 1024


@dataclass(frozen=True)
class IndexStats:
    """`vectors` counts windows, `elements` the elements they belong to."""

    vectors: int
    elements: int
    orphans: int
    dimension: int


class VectorIndex:
    """Exact nearest motivations by inner product of unit vectors. Thread-safe.

    Args:
        file: where the cache is kept; None keeps it in memory only.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._index: Any = None
        self._owners = np.zeros(0, dtype=np.int64)
        self._state = VectorState(-1, 0, 0, None)
        self._widest = 1
        self._unsaved = 0
        self._loaded = file is None

    def search(self, session: Session, query: np.ndarray, k: int, before: int | None = None) -> list[tuple[int, float]]:
        """The `k` elements whose nearest window is nearest to any window of `query`.

        Args:
            query: float32 [w, dimension], unit norm.
            before: only elements with a lower index.

        Returns:
            (index, cosine) nearest first, one entry an element.
        """
        with self._lock:
            self._follow(session)
            if self._index is None or query.shape[1] != self._index.d or not len(self._owners):
                return []
            # An element holds at most `widest` windows, so that many a wanted element cannot miss one.
            many = min(len(self._owners), k * self._widest)
            parameters = None
            if before is not None and (self._owners >= before).any():
                import faiss

                allowed = np.flatnonzero(self._owners < before)
                parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(allowed))  # type: ignore[call-arg]
            block = np.ascontiguousarray(query, dtype=np.float32)
            cosines, positions = self._index.search(block, many, params=parameters)
            best: dict[int, float] = {}
            for cosine, position in zip(cosines.ravel().tolist(), positions.ravel().tolist(), strict=True):
                if position >= 0:
                    owner = int(self._owners[position])
                    best[owner] = max(best.get(owner, -1.0), min(cosine, 1.0))
            return sorted(best.items(), key=lambda item: (-item[1], item[0]))[:k]

    def rebuild(self, session: Session) -> IndexStats:
        """Builds the index from the store's vectors, whatever it held."""
        with self._lock:
            self._loaded = True
            self._reset(VectorState(-1, 0, 0, None))
            self._follow(session)
            self._save()
            return self._stats()

    def stats(self, session: Session) -> IndexStats:
        """What the index holds, brought up to date; `orphans` is how many windows of vanished elements that removed."""
        with self._lock:
            if not self._loaded:
                self._loaded = True
                self._load()
            orphans = 0
            if session.vector_state().epoch != self._state.epoch and len(self._owners):
                known = [facts.index for facts in session.facts()]
                orphans = int((~np.isin(self._owners, known)).sum())
            self._follow(session)
            return self._stats(orphans)

    def _stats(self, orphans: int = 0) -> IndexStats:
        dimension = 0 if self._index is None else int(self._index.d)
        return IndexStats(len(self._owners), len(set(self._owners.tolist())), orphans, dimension)

    def save(self) -> None:
        """Writes the cache when it changed. A cache that cannot be written is only logged: it can be built again."""
        with self._lock:
            self._save()

    def _follow(self, session: Session) -> None:
        if not self._loaded:
            self._loaded = True
            self._load()
        now = session.vector_state()
        if (now.epoch, now.model) != (self._state.epoch, self._state.model) or now.sequence < self._state.sequence:
            self._reset(VectorState(now.epoch, 0, 0, now.model))
        while self._state.sequence < now.sequence:
            rows = session.windows(self._state.sequence, _PAGE)
            if not rows:
                break
            self._add([(row.index, row.windows) for row in rows])
            self._state = VectorState(now.epoch, rows[-1].sequence, self._state.elements + len(rows), now.model)
        if self._state.elements != now.elements:
            # The file and the store disagree about what was stored: only a full build is right then.
            _LOG.warning(
                "vector cache holds %d elements, the store %d: building it anew", self._state.elements, now.elements
            )
            self._reset(VectorState(now.epoch, 0, 0, now.model))
            self._state = VectorState(now.epoch, 0, 0, now.model)
            rows = session.windows(0, now.sequence)
            self._add([(row.index, row.windows) for row in rows])
            self._state = VectorState(now.epoch, now.sequence, len(rows), now.model)
        if self._unsaved >= _SAVE_EVERY:
            self._save()

    def _add(self, rows: list[tuple[int, np.ndarray]]) -> None:
        import faiss

        if not rows:
            return
        faiss.omp_set_num_threads(1)
        if self._index is None:
            self._index = faiss.IndexFlatIP(rows[0][1].shape[1])
        block = np.concatenate([windows for _, windows in rows]).astype(np.float32, copy=False)
        self._index.add(np.ascontiguousarray(block))
        owners = np.repeat([index for index, _ in rows], [len(windows) for _, windows in rows])
        self._owners = np.concatenate([self._owners, owners.astype(np.int64)])
        self._widest = max(self._widest, *(len(windows) for _, windows in rows))
        self._unsaved += len(block)

    def _reset(self, state: VectorState) -> None:
        self._index = None
        self._owners = np.zeros(0, dtype=np.int64)
        self._state = state
        self._widest = 1
        self._unsaved += 1

    def _save(self) -> None:
        if self._file is None or not self._unsaved or not self._loaded:
            return
        import faiss

        block = b"" if self._index is None else faiss.serialize_index(self._index).tobytes()
        owners = self._owners.astype("<i8").tobytes()
        header = {
            "epoch": self._state.epoch,
            "sequence": self._state.sequence,
            "elements": self._state.elements,
            "model": self._state.model,
            "widest": self._widest,
            "owners": len(owners),
            "sha256": hashlib.sha256(owners + block).hexdigest(),
        }
        try:
            write_atomic(self._file, _MAGIC + json.dumps(header).encode() + b"\n" + owners + block)
            self._unsaved = 0
        except StoreError as error:
            _LOG.warning("the vector cache was not written: %s", error.message)

    def _load(self) -> None:
        if self._file is None or not self._file.exists():
            return
        import faiss

        try:
            data = self._file.read_bytes()
            if not data.startswith(_MAGIC):
                raise ValueError("not a vector cache")
            line, _, rest = data[len(_MAGIC) :].partition(b"\n")
            header = json.loads(line)
            if hashlib.sha256(rest).hexdigest() != header["sha256"]:
                raise ValueError("its checksum differs")
            cut = int(header["owners"])
            index = faiss.deserialize_index(np.frombuffer(rest[cut:], dtype=np.uint8)) if rest[cut:] else None
            owners = np.frombuffer(rest[:cut], dtype="<i8").astype(np.int64)
            if len(owners) != (0 if index is None else index.ntotal):
                raise ValueError("its parts differ in length")
            state = VectorState(header["epoch"], header["sequence"], header["elements"], header["model"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            _LOG.warning("%s is built anew: %s", self._file, error)
            return
        self._index, self._owners, self._state = index, owners, state
        self._widest, self._unsaved = int(header["widest"]), 0
