"""The file of the vector cache: written in pieces, so that neither searches nor requests wait for a large one.

A magic line, a line of JSON, three arrays with an entry a position, the exact index as float32 rows, the approximate
one as FAISS writes it, and the SHA-256 of all that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import replacing
from database.exact_index import ExactIndex, load_faiss
from database.store import VectorState
from database.vectors import Vectors

__all__ = ["Snapshot", "read_vectors", "write_vectors"]

_MAGIC = b"asi-arch vectors 3\n"
_ROWS = 4096
_DIGEST = 64


@dataclass(frozen=True)
class Snapshot:
    """What `vectors` held at one moment. Later additions go behind the positions that it names."""

    vectors: Vectors
    state: VectorState
    owners: np.ndarray
    sequences: np.ndarray
    alive: np.ndarray
    rows: int
    """Of the exact index."""

    @classmethod
    def of(cls, vectors: Vectors, state: VectorState) -> Snapshot:
        rows = 0 if vectors.flat is None else int(vectors.flat.ntotal)
        return cls(vectors, state, vectors.owners, vectors.sequences, vectors.alive, rows)


def write_vectors(file: Path, snapshot: Snapshot, lock: AbstractContextManager[Any]) -> None:
    """Replaces the file.

    Args:
        lock: keeps others from adding to the exact index; held for a few milliseconds at a time.

    Raises:
        StoreError: it cannot be written.
    """
    digest = hashlib.sha256()
    with replacing(file) as handle:

        def put(data: Any) -> int:
            digest.update(data)
            return handle.write(data)

        for piece in _pieces(snapshot, lock):
            put(piece)
        if snapshot.vectors.lists is not None:
            # It is complete when it is built, and only searched from then on.
            faiss = load_faiss()
            faiss.write_index(snapshot.vectors.lists, faiss.PyCallbackIOWriter(put))
        handle.write(digest.hexdigest().encode())


def _pieces(snapshot: Snapshot, lock: AbstractContextManager[Any]) -> Iterator[Any]:
    vectors, state = snapshot.vectors, snapshot.state
    header = {
        "epoch": state.epoch,
        "sequence": state.sequence,
        "model": state.model,
        "widest": vectors.widest,
        "recall": vectors.recall,
        "positions": len(snapshot.owners),
        "rows": snapshot.rows,
        "dimension": vectors.dimension,
        "exact": vectors.flat is not None,
    }
    yield _MAGIC
    yield json.dumps(header).encode() + b"\n"
    yield np.ascontiguousarray(snapshot.owners, dtype="<i8").data
    yield np.ascontiguousarray(snapshot.sequences, dtype="<i8").data
    yield np.ascontiguousarray(snapshot.alive, dtype=np.uint8).data
    for start in range(0, snapshot.rows, _ROWS):
        assert vectors.flat is not None
        with lock:
            block = vectors.flat.reconstruct_n(start, min(_ROWS, snapshot.rows - start))
        yield np.ascontiguousarray(block, dtype="<f4").data


def read_vectors(data: bytes) -> tuple[Vectors, VectorState]:
    """What a cache file holds.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: it is damaged, or of another release.
    """
    faiss = load_faiss()
    if not data.startswith(_MAGIC):
        raise ValueError("not a vector cache of this release")
    body, said = memoryview(data)[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha256(body).hexdigest().encode() != said:
        raise ValueError("its checksum differs")
    end = data.index(b"\n", len(_MAGIC)) + 1
    header = json.loads(data[len(_MAGIC) : end])
    take = _taker(body[end:])
    count, rows, dimension = header["positions"], header["rows"], header["dimension"]
    owners, sequences = (take("<i8", count).astype(np.int64) for _ in range(2))
    alive = take(np.uint8, count).astype(bool)
    flat = None
    if header["exact"]:
        flat = ExactIndex(dimension)
        if rows:
            flat.add(take("<f4", rows * dimension).reshape(rows, dimension).astype(np.float32, copy=False))
    rest = take(np.uint8, None)
    vectors = Vectors(
        flat=flat,
        lists=faiss.deserialize_index(rest) if len(rest) else None,
        recall=header["recall"],
        owners=owners,
        sequences=sequences,
        alive=alive,
        widest=int(header["widest"]),
    )
    if vectors.total != vectors.listed + rows:
        raise ValueError("its parts differ in length")
    return vectors, VectorState(header["epoch"], header["sequence"], header["model"])


def _taker(data: memoryview) -> Callable[[Any, int | None], np.ndarray]:
    """Takes so many numbers of a type from `data`, one part after the other; None for what is left."""
    place = 0

    def take(kind: Any, count: int | None) -> np.ndarray:
        nonlocal place
        found = (
            np.frombuffer(data, dtype=kind, count=-1 if count is None else count, offset=place)
            if (count is None or count) and place < len(data)
            else np.zeros(0, dtype=kind)
        )
        place += found.nbytes
        return found

    return take
