"""Generated tasks: what a sequence holds, that it can be solved from its context alone, and how it is packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.process import REPOSITORY
from training.data import tasks
from training.data.packing import row_type, write_stream
from training.data.tokenizer import special_tokens
from training.profiles import Profile, TaskSpec, load_profile, task_lengths

SPEC = TaskSpec(symbols=32, recall_pairs=6, copy_items=5, copy_length=16, induction_length=12)


def solve(task: str, ids: list[int]) -> int:
    """The next token of a sequence of `task`, by its definition."""
    body = ids[1:]
    if task == "recall":
        split = body.index(tasks.SEPARATOR)
        pairs = dict(zip(body[:split:2], body[1:split:2], strict=True))
        return pairs[ids[-1]]
    if task == "copying":
        split = body.index(tasks.SEPARATOR)
        return [token for token in body[:split] if token != tasks.NOISE][len(body) - split - 1]
    return body[body.index(ids[-1]) + 1]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(tasks.GENERATORS)), st.integers(0, 2**32))
def test_every_answer_follows_from_what_stands_before_it(task: str, seed: int) -> None:
    sequence = tasks.GENERATORS[task](SPEC, np.random.default_rng(seed))
    assert sequence.answers
    for place in sequence.answers:
        assert solve(task, sequence.ids[:place]) == sequence.ids[place]


@pytest.mark.parametrize("task", sorted(tasks.GENERATORS))
def test_the_right_choice_is_the_solution(task: str) -> None:
    symbols = special_tokens(SPEC.symbols)
    ids = {symbol: number for number, symbol in enumerate(symbols)}
    items = tasks.generate_items(task, SPEC, 50, symbols, seed=1)
    for item in items:
        context = [ids[part + "|>"] for part in item["context"].split("|>")[:-1]]
        assert item["choices"][item["answer"]] == symbols[solve(task, context)]
    places = [item["answer"] for item in items]
    assert len(set(places)) == SPEC.choices, "the right choice must not always stand at one place"
    assert items != tasks.generate_items(task, SPEC, 50, symbols, seed=2)


def test_sequences_have_the_lengths_that_profiles_are_checked_against() -> None:
    random = np.random.default_rng(0)
    for (_, generate), most in zip(tasks.GENERATORS.items(), task_lengths(SPEC), strict=True):
        assert max(len(generate(SPEC, random).ids) for _ in range(50)) <= most


def test_cloze_choices_come_from_the_same_document() -> None:
    words = [f"{a}{b}{c}word" for a in "abcdef" for b in "ghij" for c in "klmno"]
    documents = [" ".join(np.random.default_rng(seed).permutation(words)) for seed in range(6)]
    items = tasks.cloze_items(documents, SPEC, 20, seed=0)
    assert len(items) == 20
    for item in items:
        source = next(text for text in documents if item["context"] in text)
        assert all(choice.strip() in source for choice in item["choices"])
        assert item["context"] + item["choices"][item["answer"]] in source


@pytest.fixture(scope="module")
def tiny() -> Profile:
    return load_profile(REPOSITORY / "tests" / "assets" / "tiny.toml")


def stream(profile: Profile, seed: int, target: Path) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(300, profile.model.vocab, 5000).astype(np.uint16)
    write_stream(profile, tokens, seed, target)
    kind = row_type(profile.model.vocab)
    return np.fromfile(target, dtype=kind).reshape(-1, profile.train.seq_len + 1)


def test_the_stream_mixes_text_and_tasks_in_the_profiles_share(tiny: Profile, tmp_path: Path) -> None:
    many = tiny.model_copy(update={"train": tiny.train.model_copy(update={"steps": 300})})
    rows = stream(many, 0, tmp_path / "a")
    assert len(rows) == 300 * tiny.train.batch
    generated = (rows < 0).any(axis=1)
    assert abs(generated.mean() - tiny.tasks.share) < 0.05
    assert (rows[~generated] >= 300).all()
    answers = rows[generated]
    assert (answers.max(axis=1) >= tasks.FIRST).all(), "every task row trains on some answers"
    # As in scoring, the first sequence of a row stands behind one end token.
    assert (answers[:, 0] == -1).all()


def test_the_stream_is_a_function_of_the_seed(tiny: Profile, tmp_path: Path) -> None:
    first, again, other = (
        stream(tiny, 1, tmp_path / "a"),
        stream(tiny, 1, tmp_path / "b"),
        stream(tiny, 2, tmp_path / "c"),
    )
    assert (first == again).all() and (first != other).any()


def test_large_vocabularies_need_no_sign() -> None:
    assert row_type(1024) == np.int16 and row_type(50257) == np.uint16
