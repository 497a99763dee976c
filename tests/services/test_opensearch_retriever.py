"""The OpenSearch retriever against a real node: the shared contract, its indices, and the whole service on it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from opensearchpy import OpenSearch

from cognition_base.client import CognitionClient
from cognition_base.corpus import Entry
from cognition_base.opensearch_retriever import OpenSearchRetriever
from common.errors import ServiceError
from tests.cognition_base.test_retrieval_quality import QUERIES, recall
from tests.contract.retriever_contract import *  # noqa: F403 - the contract's tests are collected here
from tests.contract.retriever_contract import CORPUS, direction, load
from tests.fixtures_services import CACHE, running
from tests.services.opensearch.node import opensearch_node

pytestmark = [pytest.mark.services, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with opensearch_node(tmp_path_factory.mktemp("opensearch") / "home") as url:
        yield url


@pytest.fixture(scope="module")
def admin(node: str) -> Iterator[OpenSearch]:
    with OpenSearch(hosts=[node], timeout=30) as client:
        yield client


@pytest.fixture
def retriever(node: str, admin: OpenSearch) -> Iterator[OpenSearchRetriever]:
    empty = OpenSearchRetriever(node, f"test_{uuid.uuid4().hex}")
    yield empty
    admin.indices.delete(index=f"{empty.alias}-v*", ignore_unavailable=True)
    empty.close()


def generations(admin: OpenSearch, retriever: OpenSearchRetriever) -> list[str]:
    return sorted(admin.indices.get(index=f"{retriever.alias}-v*"))


def test_an_unchanged_corpus_is_neither_embedded_nor_written_again(
    node: str, admin: OpenSearch, retriever: OpenSearchRetriever
) -> None:
    load(retriever)
    before = generations(admin, retriever)

    def never(entries: Sequence[Entry]) -> np.ndarray:
        raise AssertionError("asked for vectors")

    again = OpenSearchRetriever(node, retriever.alias)
    again.index(CORPUS, model="synthetic", vectors=never)
    again.close()
    assert generations(admin, retriever) == before
    with pytest.raises(AssertionError, match="asked for vectors"):
        retriever.index(CORPUS, model="another model", vectors=never)


def test_each_rebuild_is_a_new_index_behind_the_same_alias(admin: OpenSearch, retriever: OpenSearchRetriever) -> None:
    load(retriever)
    (first,) = generations(admin, retriever)
    load(retriever, fresh=True)
    (second,) = generations(admin, retriever)
    assert first != second and list(admin.indices.get_alias(name=retriever.alias)) == [second]
    settings = admin.indices.get_settings(index=second)[second]["settings"]["index"]
    assert settings["number_of_replicas"] == "0"
    field = admin.indices.get_mapping(index=second)[second]["mappings"]["properties"]["symptom_vector"]
    assert field["method"]["engine"] == "lucene" and field["method"]["space_type"] == "cosinesimil"


def test_a_build_that_was_killed_is_swept_up_later(admin: OpenSearch, retriever: OpenSearchRetriever) -> None:
    old = f"{retriever.alias}-v{int((time.time() - 7200) * 1000)}"
    recent = f"{retriever.alias}-v{int((time.time() - 60) * 1000)}"
    for name in (old, recent):
        admin.indices.create(index=name, body={"settings": {"index": {"number_of_replicas": 0}}})
    load(retriever)
    names = generations(admin, retriever)
    assert old not in names and recent in names


def test_an_index_that_is_not_ours_is_left_alone(node: str, admin: OpenSearch) -> None:
    name = f"foreign_{uuid.uuid4().hex}"
    admin.index(index=name, body={"text": "someone's document"}, refresh=True)
    retriever = OpenSearchRetriever(node, name)
    with pytest.raises(ServiceError, match="alias of ours"):
        load(retriever)
    retriever.close()
    assert admin.count(index=name)["count"] == 1
    admin.indices.delete(index=name)


def test_a_search_before_anything_is_indexed_is_a_service_error(retriever: OpenSearchRetriever) -> None:
    with pytest.raises(ServiceError):
        retriever.find("x", direction(0)[None], 5)


def test_the_service_finds_symptoms_through_opensearch(node: str, embedding_url: str, tmp_path: Path) -> None:
    env = {
        "ASI_SERVICES__EMBEDDING_URL": embedding_url,
        "ASI_COGNITION__INDEX_DIR": str(CACHE / "cognition"),
        "ASI_COGNITION__OPENSEARCH_URL": node,
    }
    script = str(Path(__file__).resolve().parents[2] / "cognition_base" / "rag_api.py")
    argv = [script, "--port", "0", "--retriever", "opensearch"]
    with running(argv, env) as (url, _), CognitionClient(url) as client:
        share, missed = recall(client, k=3, threshold=0.0)
        print(f"recall@3 {share:.2f} through OpenSearch")
        assert share >= 0.8, missed
        for query in QUERIES["unrelated"]:
            assert client.search(query, k=50, threshold=0.5) == []
        assert client.stats()["index_name"] == "cognition_rag"
    # A second start finds the index as it is and embeds nothing: it needs no vectors at all.
    started = time.monotonic()
    with running(
        argv, env | {"ASI_COGNITION__INDEX_DIR": str(tmp_path), "ASI_SERVICES__EMBEDDING_URL": "http://127.0.0.1:9"}
    ):
        print(f"second start {time.monotonic() - started:.1f} s")
