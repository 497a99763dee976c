"""The retriever over an OpenSearch node: k-NN of the lucene engine and BM25, asked in one msearch, fused by our code.

Neither the native k-NN engines nor the neural-search plugin are needed: it runs on any OpenSearch with k-NN.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from opensearchpy import OpenSearch
from opensearchpy.exceptions import ImproperlyConfigured, OpenSearchException

from cognition_base.corpus import FIELDS, Entry, corpus_digest
from cognition_base.fusion import Found, VectorSource, query_words
from common.errors import ServiceError, UsageError

__all__ = ["OpenSearchRetriever"]

VECTORS = ("symptom_vector", "idea_vector")
ALL_TEXT = "all_text"
"""The six fields as one, so that BM25 counts a word wherever it stands."""
ORPHAN_SECONDS = 3600.0


class OpenSearchRetriever:
    """Keeps each generation of the corpus in an index of its own, NAME-v<milliseconds>, and moves the alias NAME to it.

    The index remembers the content it was made from, so a restart on an unchanged corpus embeds and writes nothing.

    Args:
        url: http(s)://[user:password@]host:port of any node.
        alias: the name the index is known by.
        timeout: seconds to wait for one answer.

    Raises, from every method:
        ServiceError: the node does not answer, or refuses.
    """

    def __init__(self, url: str, alias: str, timeout: float = 30.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"expected cognition.opensearch_url like http://127.0.0.1:9200, got {url!r}")
        self.alias = alias
        self.shown = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
        self._building = threading.Lock()
        with self._errors():
            self._client = OpenSearch(hosts=[url], timeout=timeout, max_retries=2, retry_on_timeout=True)

    def index(self, entries: Sequence[Entry], *, model: str, vectors: VectorSource, fresh: bool = False) -> None:
        """See `Retriever.index`."""
        meta = {"digest": corpus_digest(entries), "model": model}
        with self._building, self._errors():
            current = self._current()
            if not fresh and list(current.values()) == [meta]:
                return
            name = f"{self.alias}-v{time.time_ns() // 1_000_000}"
            try:
                self._build(name, entries, vectors(entries), meta)
                moves = [{"remove": {"index": old, "alias": self.alias}} for old in current]
                self._client.indices.update_aliases(
                    body={"actions": [*moves, {"add": {"index": name, "alias": self.alias}}]}
                )
            except BaseException:
                self._client.indices.delete(index=name, ignore_unavailable=True)
                raise
            for old in {*current, *self._orphans(name)}:
                self._client.indices.delete(index=old, ignore_unavailable=True)

    def find(self, text: str, query: np.ndarray, limit: int) -> Found:
        """See `Retriever.find`. The cosines are exact, of every entry that any of the searches returned."""
        searches: list[dict[str, Any]] = []
        for body in [
            {"match": {ALL_TEXT: " ".join(query_words(text))}},
            *({"knn": {field: {"vector": row.tolist(), "k": limit}}} for row in query for field in VECTORS),
        ]:
            searches += [{"index": self.alias}, {"size": limit, "_source": False, "query": body}]
        with self._errors():
            answers = self._client.msearch(body=searches)["responses"]
            for answer in answers:
                if "error" in answer:
                    raise ServiceError(f"OpenSearch at {self.shown} refused a search: {str(answer['error'])[:300]}")
            hits = [[hit["_id"] for hit in answer["hits"]["hits"]] for answer in answers]
            return Found(self._cosines(sorted({name for ids in hits for name in ids}), query), hits[0])

    def close(self) -> None:
        self._client.close()

    def _cosines(self, ids: list[str], query: np.ndarray) -> dict[str, float]:
        if not ids:
            return {}
        answer = self._client.mget(index=self.alias, body={"ids": ids}, _source_includes=",".join(VECTORS))
        cosines = {}
        for document in answer["docs"]:
            # One that is gone was deleted with its index between the two calls.
            if document.get("found"):
                keys = np.array([document["_source"][field] for field in VECTORS], dtype=np.float32)
                cosines[document["_id"]] = float((keys @ query.T).max())
        return cosines

    def _current(self) -> dict[str, dict[str, Any]]:
        """The indices the alias points to, each with what it was made from."""
        if not self._client.indices.exists_alias(name=self.alias):
            if self._client.indices.exists(index=self.alias):
                raise ServiceError(
                    f"expected {self.alias} on {self.shown} to be an alias of ours, found an index of that name",
                    f"delete or rename the index {self.alias}; nothing was changed",
                )
            return {}
        answer = self._client.indices.get_mapping(index=self.alias)
        return {name: value["mappings"].get("_meta", {}) for name, value in answer.items()}

    def _orphans(self, name: str) -> Iterator[str]:
        """Older generations that a killed build left behind."""
        prefix = f"{self.alias}-v"
        for other, value in self._client.indices.get(index=f"{prefix}*").items():
            stamp = other.removeprefix(prefix)
            old = stamp.isdigit() and int(stamp) / 1000 < time.time() - ORPHAN_SECONDS
            if old and other != name and not value.get("aliases"):
                yield other

    def _build(self, name: str, entries: Sequence[Entry], vectors: np.ndarray, meta: Mapping[str, str]) -> None:
        self._client.indices.create(index=name, body=_index_body(vectors.shape[-1], meta))
        lines: list[dict[str, Any]] = []
        for entry, keys in zip(entries, vectors, strict=True):
            document = {"paper_key": entry.paper_key, **entry.texts()}
            document |= {field: key.tolist() for field, key in zip(VECTORS, keys, strict=True)}
            lines += [{"index": {"_id": entry.id}}, document]
        for start in range(0, len(lines), 200):
            answer = self._client.bulk(index=name, body=lines[start : start + 200])
            if answer["errors"]:
                failed = next(item["index"]["error"] for item in answer["items"] if "error" in item["index"])
                raise ServiceError(f"OpenSearch at {self.shown} refused an entry: {str(failed)[:300]}")
        self._client.indices.refresh(index=name)
        self._client.cluster.health(index=name, wait_for_status="yellow")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OpenSearchException, ImproperlyConfigured) as error:
            raise ServiceError(
                f"OpenSearch at {self.shown} failed: {str(error)[:500]}",
                "start it, correct cognition.opensearch_url, or use --retriever embedded",
            ) from error


def _index_body(dimension: int, meta: Mapping[str, str]) -> dict[str, Any]:
    method = {"name": "hnsw", "engine": "lucene", "space_type": "cosinesimil"}
    vector = {"type": "knn_vector", "dimension": dimension, "method": method}
    texts = {name: {"type": "text", "index": False, "copy_to": ALL_TEXT} for name in FIELDS}
    texts[ALL_TEXT] = {"type": "text", "analyzer": "english"}
    return {
        "settings": {"index": {"knn": True, "number_of_shards": 1, "number_of_replicas": 0}},
        "mappings": {
            "dynamic": "strict",
            "_meta": dict(meta),
            "properties": {"paper_key": {"type": "keyword"}, **texts, **dict.fromkeys(VECTORS, vector)},
        },
    }
