"""Ranking: reciprocal rank and the calibrated score."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cognition_base.fusion import Found, calibrate, fuse, reciprocal_rank
from common.embeddings import DEFAULT_MODEL

rankings = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), max_size=3)


def test_an_item_second_in_both_lists_beats_one_first_in_one() -> None:
    assert reciprocal_rank([["a", "b", "c"], ["d", "b", "e"]])[0] == "b"


@given(rankings)
def test_fusion_keeps_every_item_once_and_ignores_the_order_of_lists(lists: list[list[str]]) -> None:
    fused = reciprocal_rank(lists)
    assert sorted(fused) == sorted({item for ranking in lists for item in ranking})
    assert fused == reciprocal_rank(lists[::-1])


@given(st.lists(st.sampled_from("abcdefgh"), unique=True))
def test_one_list_stays_in_its_order(ranking: list[str]) -> None:
    assert reciprocal_rank([ranking, ranking]) == ranking == reciprocal_rank([ranking])


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_the_score_is_monotone_and_in_range(a: float, b: float) -> None:
    for model in (DEFAULT_MODEL, "another"):
        low, high = calibrate(min(a, b), model), calibrate(max(a, b), model)
        assert 0 <= low <= high <= 1


def test_the_thresholds_in_use_lie_between_unrelated_and_good_cosines() -> None:
    assert calibrate(0.22, DEFAULT_MODEL) < 0.5 < calibrate(0.38, DEFAULT_MODEL)
    assert calibrate(0.42, DEFAULT_MODEL) > 0.6
    assert calibrate(0.7, "another") == pytest.approx(0.7)


def test_order_comes_from_ranks_and_scores_from_cosines() -> None:
    found = Found({"near": 0.6, "both": 0.5, "far": 0.1}, ["both", "far"])
    fused = fuse(found, "another")
    assert [name for name, _ in fused] == ["both", "far", "near"] or fused[0][0] == "both"
    assert dict(fused) == pytest.approx({"near": 0.6, "both": 0.5, "far": 0.1})
