"""Key vectors of the corpus, kept on disk between starts."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cognition_base.corpus import Entry
from common.embeddings import Embedder
from common.errors import StoreError
from common.files import write_atomic

__all__ = ["VectorCache", "default_folder"]


def default_folder() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME/asi-arch/cognition, or the same under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "asi-arch" / "cognition"


class VectorCache:
    """Embeds the keys of entries, each once: vectors are kept in one file a model, by the hash of the text.

    The file is only a cache: one that is missing, damaged or cannot be written costs time, never an answer.
    """

    def __init__(self, embedder: Embedder, model: str, folder: Path) -> None:
        self.embedder = embedder
        self.model = model
        self.file = folder / f"vectors-{re.sub(r'[^A-Za-z0-9]+', '-', model)[-80:]}.npz"
        self.embedded = 0
        """Texts this object had to embed."""

    def __call__(self, entries: Sequence[Entry]) -> np.ndarray:
        """The vectors of both keys of each entry: float32 [n, 2, dimension].

        Raises:
            ServiceError: the embedding server fails.
        """
        texts = [text for entry in entries for text in entry.search_keys()]
        hashes = [hashlib.sha256(f"{self.model}\0{text}".encode()).hexdigest() for text in texts]
        known = self._read()
        missing = {name: text for name, text in zip(hashes, texts, strict=True) if name not in known}
        if missing:
            known |= dict(zip(missing, self.embedder.embed(list(missing.values())), strict=True))
            self.embedded += len(missing)
            self._write({name: known[name] for name in hashes})
        return np.stack([known[name] for name in hashes]).reshape(len(entries), 2, -1)

    def _read(self) -> dict[str, np.ndarray]:
        try:
            with np.load(io.BytesIO(self.file.read_bytes()), allow_pickle=False) as stored:
                hashes, vectors = stored["hashes"], stored["vectors"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return {}
        if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(hashes):
            return {}
        if not np.allclose((vectors**2).sum(axis=1), 1.0, atol=1e-3):
            return {}
        return {str(name): vector for name, vector in zip(hashes, vectors, strict=True)}

    def _write(self, known: dict[str, np.ndarray]) -> None:
        content = io.BytesIO()
        np.savez(content, hashes=np.array(list(known)), vectors=np.stack(list(known.values())).astype(np.float32))
        try:
            write_atomic(self.file, content.getvalue())
        except StoreError as error:
            print(f"the vectors are not kept for the next start: {error.message}", file=sys.stderr)
