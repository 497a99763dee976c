"""What both retrievers promise. A test module imports these tests and provides the fixture `retriever`: an empty one.

Vectors here are synthetic directions, so that every cosine is known.
"""

from __future__ import annotations

import threading
from binascii import crc32
from collections.abc import Sequence

import numpy as np
import pytest

from cognition_base.corpus import Entry
from cognition_base.fusion import Retriever, fuse

DIMENSION = 16
TOPICS = ("recall", "forgetting", "convolution", "normalisation", "positions", "routing", "parity", "copying")
HOSTILE = (
    'NEAR("recall" forgetting, 3) AND NOT *',
    "\" OR 1=1 --; DROP TABLE entries; '",
    "DESIGN_INSIGHT:recall^9 /rec.*/ [a TO z] {} () \\ ~ ! && ||",
    "?!.,;:-_ ()",
    "\x00\x01\x02",
    "漢字 ünïcode ☃ \U0001f9e0 \u202e right to left",
    "recall " * 1500,
    " ".join(f"word{n}" for n in range(1500)),
    "the and of a in to is",
    "漢" * 5000,
    " ".join("漢字仮名" * 3 + str(n) for n in range(200)),
)


def direction(seed: int) -> np.ndarray:
    """A unit vector of its own for each seed: float32 [DIMENSION]."""
    vector = np.random.default_rng(seed).normal(size=DIMENSION).astype(np.float32)
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


def entry(topic: str, paper: str = "") -> Entry:
    return Entry(
        paper_key=paper or f"2401_{crc32(topic.encode()):010d}",
        position=1,
        design_insight=f"### DESIGN_INSIGHT_HIGH: what helps {topic}",
        experimental_trigger_patterns=f"Tasks of {topic} score at chance.",
        background=f"Earlier work on {topic}.",
        algorithmic_innovation=f"A gate for {topic}.",
        implementation_guidance="Small changes.",
    )


def vectors_of(entries: Sequence[Entry]) -> np.ndarray:
    """Two synthetic keys an entry: float32 [n, 2, DIMENSION]."""
    return np.stack([[direction(crc32(f"{e.id}{key}".encode())) for key in (0, 1)] for e in entries])


CORPUS = [entry(topic) for topic in TOPICS]


def load(retriever: Retriever, entries: Sequence[Entry] = CORPUS, *, fresh: bool = False) -> None:
    retriever.index(entries, model="synthetic", vectors=vectors_of, fresh=fresh)


def test_nothing_is_found_by_meaning_before_something_is_indexed_and_then_all_is(retriever: Retriever) -> None:
    load(retriever)
    found = retriever.find("recall", direction(0)[None], 20)
    assert set(found.cosines) == {e.id for e in CORPUS}


def test_cosines_are_exact_over_both_keys_and_all_windows(retriever: Retriever) -> None:
    load(retriever)
    query = np.stack([direction(5), direction(6), direction(7)])
    found = retriever.find("positions", query, 20)
    for e, keys in zip(CORPUS, vectors_of(CORPUS), strict=True):
        assert found.cosines[e.id] == pytest.approx(float((keys @ query.T).max()), abs=1e-4)


def test_words_find_what_contains_them(retriever: Retriever) -> None:
    load(retriever)
    for topic, e in zip(TOPICS, CORPUS, strict=True):
        assert retriever.find(f"low {topic}", direction(0)[None], 20).lexical[0] == e.id


def test_both_ways_of_finding_agree_on_the_first(retriever: Retriever) -> None:
    load(retriever)
    keys = vectors_of(CORPUS)
    for number, e in enumerate(CORPUS):
        found = retriever.find(e.experimental_trigger_patterns, keys[number, 1][None], 20)
        first, score = fuse(found, "synthetic")[0]
        assert first == e.id and score == pytest.approx(1.0, abs=1e-4)


def test_the_limit_bounds_what_words_find(retriever: Retriever) -> None:
    load(retriever)
    assert len(retriever.find("chance", direction(0)[None], 3).lexical) <= 3


def test_a_new_corpus_replaces_the_old(retriever: Retriever) -> None:
    load(retriever, CORPUS[:4])
    load(retriever, CORPUS[4:])
    found = retriever.find("recall parity", direction(0)[None], 20)
    assert set(found.cosines) | set(found.lexical) == {e.id for e in CORPUS[4:]}
    load(retriever, CORPUS[4:], fresh=True)
    again = retriever.find("recall parity", direction(0)[None], 20)
    assert again.cosines == pytest.approx(dict(found.cosines)) and again.lexical == found.lexical


def test_a_failed_build_leaves_the_old_index(retriever: Retriever) -> None:
    load(retriever)

    def fails(entries: Sequence[Entry]) -> np.ndarray:
        raise RuntimeError("no vectors today")

    with pytest.raises(RuntimeError):
        retriever.index(CORPUS[:2], model="synthetic", vectors=fails, fresh=True)
    assert len(retriever.find("recall", direction(0)[None], 20).cosines) == len(CORPUS)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_syntax(retriever: Retriever, text: str) -> None:
    load(retriever)
    found = retriever.find(text, direction(0)[None], 20)
    assert set(found.cosines) == {e.id for e in CORPUS}
    assert set(found.lexical) <= set(found.cosines)


def test_searches_during_a_rebuild_see_one_corpus_or_the_other(retriever: Retriever) -> None:
    one, other = CORPUS[:4], CORPUS[4:]
    expected = [{e.id for e in one}, {e.id for e in other}]
    load(retriever, one)
    seen: list[set[str]] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def search() -> None:
        while not stop.is_set():
            try:
                found = retriever.find("chance", direction(3)[None], 20)
            except Exception as error:  # noqa: BLE001 - handed to the test's own thread
                failures.append(error)
                return
            seen.append(set(found.cosines))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        load(retriever, other)
        load(retriever, one)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    # An index may be swapped between two calls of one search; what is then gone is left out, nothing is mixed in.
    assert seen and all(any(ids <= whole for whole in expected) for ids in seen)
