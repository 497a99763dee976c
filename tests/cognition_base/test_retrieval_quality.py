"""The shipped corpus behind the real service: symptoms find the papers that treat them, other talk finds nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cognition_base.client import CognitionClient
from cognition_base.corpus import FIELDS

QUERIES = json.loads((Path(__file__).parent / "queries.json").read_text(encoding="utf-8"))
SYMPTOMS = QUERIES["symptoms"]


@pytest.fixture(scope="module")
def client(cognition_url: str) -> Iterator[CognitionClient]:
    with CognitionClient(cognition_url) as client:
        yield client


def recall(client: CognitionClient, k: int, threshold: float) -> tuple[float, list[str]]:
    """Share of the symptom queries with an expected paper among the first k results, and the queries without one."""
    missed = []
    for symptom in SYMPTOMS:
        papers = {insight.paper_key for insight in client.search(symptom["query"], k=k, threshold=threshold)}
        if not papers & set(symptom["papers"]):
            missed.append(symptom["query"])
    return 1 - len(missed) / len(SYMPTOMS), missed


def test_symptoms_find_their_papers(client: CognitionClient) -> None:
    assert len(SYMPTOMS) >= 24
    share, missed = recall(client, k=3, threshold=0.0)
    print(f"recall@3 {share:.2f} over {len(SYMPTOMS)} symptom queries")
    assert share >= 0.8, missed


@pytest.mark.parametrize(("threshold", "least"), [(0.5, 0.8), (0.6, 0.7)])
def test_the_usual_thresholds_keep_what_was_found(client: CognitionClient, threshold: float, least: float) -> None:
    share, missed = recall(client, k=3, threshold=threshold)
    assert share >= least, missed


@pytest.mark.parametrize("query", QUERIES["unrelated"])
def test_unrelated_talk_finds_nothing(client: CognitionClient, query: str) -> None:
    assert client.search(query, k=50, threshold=0.5) == []
    assert client.search(query, k=3, threshold=0.0)


def test_results_carry_all_six_fields(client: CognitionClient) -> None:
    for insight in client.search(SYMPTOMS[0]["query"], k=50, threshold=0.5):
        assert all(getattr(insight, name) for name in FIELDS if name != "DESIGN_AI_INSTRUCTIONS")
        assert 0.5 <= insight.score <= 1


def test_a_long_analysis_is_found_by_the_part_that_matters(client: CognitionClient) -> None:
    filler = "The run finished as planned and the machine was quiet during the whole night. " * 30
    symptom = next(s for s in SYMPTOMS if "2311_04823" in s["papers"])
    papers = [insight.paper_key for insight in client.search(filler + symptom["query"], k=3, threshold=0.5)]
    assert set(papers) & set(symptom["papers"])
