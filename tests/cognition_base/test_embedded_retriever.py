"""The embedded retriever: the shared contract, and that no text breaks its full-text query."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cognition_base.embedded_retriever import EmbeddedRetriever, match_expression
from tests.contract.retriever_contract import *  # noqa: F403 - the contract's tests are collected here
from tests.contract.retriever_contract import direction, load


@pytest.fixture
def retriever() -> Iterator[EmbeddedRetriever]:
    empty = EmbeddedRetriever()
    yield empty
    empty.close()


@pytest.fixture(scope="module")
def filled() -> Iterator[EmbeddedRetriever]:
    retriever = EmbeddedRetriever()
    load(retriever)
    yield retriever
    retriever.close()


@given(text=st.text(max_size=300))
def test_any_text_can_be_searched(filled: EmbeddedRetriever, text: str) -> None:
    filled.find(text, direction(1)[None], 5)


def test_words_are_stemmed(filled: EmbeddedRetriever) -> None:
    plain = filled.find("convolutions", direction(1)[None], 5).lexical
    assert plain == filled.find("convolution", direction(1)[None], 5).lexical != []


def test_before_indexing_nothing_is_found() -> None:
    found = EmbeddedRetriever().find("x", np.ones((1, 4), np.float32), 5)
    assert not found.cosines and not found.lexical


def test_terms_are_quoted_once_and_bounded() -> None:
    assert match_expression('a "b" A AND') == '"a" OR "b" OR "and"'
    assert match_expression("... ___ !") == ""
    assert match_expression(" ".join(map(str, range(500)))).count(" OR ") == 127
