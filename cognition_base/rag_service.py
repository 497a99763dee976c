"""The retrieval service: corpus, embedder and retriever behind search, paper and reinit."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognition_base.corpus import SHIPPED, Entry, load_corpus
from cognition_base.embedded_retriever import EmbeddedRetriever
from cognition_base.fusion import Retriever, fuse
from cognition_base.vectors import VectorCache, default_folder
from common.embeddings import Embedder, expected_model
from common.errors import ServiceError
from common.settings import Settings

__all__ = ["INDEX_NAME", "RagService", "build_retriever"]

INDEX_NAME = "cognition_rag"
MIN_CANDIDATES = 20


@dataclass(frozen=True)
class _Corpus:
    """One generation of the corpus, replaced as a whole."""

    entries: Mapping[str, Entry]
    papers: Mapping[str, list[Entry]]
    model: str


def build_retriever(settings: Settings) -> Retriever:
    """The retriever the settings name."""
    if settings.cognition.retriever == "opensearch":
        from cognition_base.opensearch_retriever import OpenSearchRetriever  # 0.5 s that the default does not pay

        return OpenSearchRetriever(settings.cognition.opensearch_url, INDEX_NAME, settings.services.timeout)
    return EmbeddedRetriever()


class RagService:
    """Finds entries of the corpus for a description of symptoms. Thread-safe; `load` before anything else."""

    def __init__(self, settings: Settings, embedder: Embedder, retriever: Retriever) -> None:
        self.folder = settings.cognition.corpus or SHIPPED
        self.cache_folder = Path(settings.cognition.index_dir or default_folder())
        self.expected = expected_model(settings)
        self.embedder = embedder
        self.retriever = retriever
        self._corpus: _Corpus | None = None
        self._loading = threading.Lock()

    @property
    def ready(self) -> bool:
        return self._corpus is not None

    def load(self, *, fresh: bool = False) -> None:
        """Reads the corpus and indexes it. Until it is done, searches answer from the corpus before.

        Args:
            fresh: build the index again even where one of the same content exists.

        Raises:
            UsageError: a paper file is wrong; the corpus before stays.
            ServiceError: the embedding server or OpenSearch fails.
        """
        with self._loading:
            self._load(self._corpus.model if self._corpus else self.expected, fresh)

    def search(self, query: str, k: int, threshold: float) -> list[dict[str, Any]]:
        """The k best entries with a score of at least `threshold`, best first, as they go over the wire.

        A query longer than the embedding window is compared by its best window.

        Raises:
            ServiceError: not ready, or the embedding server or OpenSearch fails.
        """
        self._ready()
        vectors = self.embedder.windows([query])[0]
        if self._ready().model != self.embedder.model:
            with self._loading:
                if self._ready().model != self.embedder.model:
                    self._load(self.embedder.model, fresh=False)
        corpus = self._ready()
        found = self.retriever.find(query, vectors, max(MIN_CANDIDATES, 2 * k))
        ranked = [(name, score) for name, score in fuse(found, corpus.model) if score >= threshold]
        known = [(corpus.entries[name], score) for name, score in ranked if name in corpus.entries]
        return [_document(entry) | {"score": score} for entry, score in known[:k]]

    def paper(self, paper_key: str) -> list[dict[str, Any]]:
        """All entries of one paper; none for a key that is not in the corpus."""
        return [_document(entry) for entry in self._ready().papers.get(paper_key, [])]

    def stats(self) -> dict[str, Any]:
        """What the index holds: zeros before it is ready."""
        corpus = self._corpus
        return {
            "total_documents": len(corpus.entries) if corpus else 0,
            "unique_papers": len(corpus.papers) if corpus else 0,
            "index_name": INDEX_NAME,
        }

    def _ready(self) -> _Corpus:
        if self._corpus is None:
            raise ServiceError("the corpus is still being indexed", "ask /health until it answers 200", 503)
        return self._corpus

    def _load(self, model: str, fresh: bool) -> None:
        entries = load_corpus(self.folder)
        vectors = VectorCache(self.embedder, model, self.cache_folder)
        self.retriever.index(entries, model=model, vectors=vectors, fresh=fresh)
        papers: dict[str, list[Entry]] = {}
        for entry in entries:
            papers.setdefault(entry.paper_key, []).append(entry)
        self._corpus = _Corpus({entry.id: entry for entry in entries}, papers, model)


def _document(entry: Entry) -> dict[str, Any]:
    return {"id": entry.id, "paper_key": entry.paper_key, **entry.texts()}
