"""Sampling policies keep the published ranks and never show the parent as its own reference."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from common.knobs import Sample
from pipeline.sample.policies import POLICIES, RankPolicy


@given(size=st.integers(1, 80), seed=st.integers(0, 10**6), policy=st.sampled_from(sorted(POLICIES)))
def test_references_are_distinct_and_exclude_the_parent(size: int, seed: int, policy: str) -> None:
    selection = POLICIES[policy](Sample()).choose(list(range(1, size + 1)), random.Random(seed))
    assert selection.parent not in selection.references
    assert len(set(selection.references)) == len(selection.references) == min(4, size - 1)


@given(size=st.integers(1, 80), seed=st.integers(0, 10**6))
def test_rank_policy_keeps_the_published_ranks(size: int, seed: int) -> None:
    selection = RankPolicy().choose(list(range(1, size + 1)), random.Random(seed))
    assert 1 <= selection.parent <= 10
    if size >= 14:
        assert all(11 <= reference <= 50 for reference in selection.references)


def test_every_top_rank_can_be_parent_and_the_same_seed_chooses_the_same() -> None:
    ranked = list(range(1, 51))
    parents = {RankPolicy().choose(ranked, random.Random(seed)).parent for seed in range(400)}
    assert parents == set(range(1, 11))
    assert RankPolicy().choose(ranked, random.Random(7)) == RankPolicy().choose(ranked, random.Random(7))
