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
from training.data.sequences import third
from training.data.tasks_mad import facts
from training.data.tokenizer import WIDER_MARKERS, special_tokens
from training.profiles import FIRST_TASKS, LONGER_TASKS, STREAM_TASKS, Profile, TaskSpec, load_profile, task_lengths

SPEC = TaskSpec(symbols=32, recall_pairs=6, copy_items=5, copy_length=16, induction_length=12, names=list(STREAM_TASKS))
KEYS = third(SPEC, 0)
LIMITED = {"parity": 2, "permutation_s3": 3}
"""Tasks with fewer possible answers than choices."""


def solve(task: str, ids: list[int]) -> int:
    """The next token of a sequence of `task`, by its definition."""
    body = ids[1:]
    split = body.index(tasks.SEPARATOR) if tasks.SEPARATOR in body else 0
    if task == "recall":
        pairs = dict(zip(body[:split:2], body[1:split:2], strict=True))
        return pairs[ids[-1]]
    if task == "copying":
        return [token for token in body[:split] if token != tasks.NOISE][len(body) - split - 1]
    if task == "fuzzy_recall":
        *_, (key, said) = runs(body[split + 1 :])
        return dict(runs(body[:split]))[key][len(said)]
    if task == "compression":
        return body[KEYS.index(ids[-1])]
    if task == "memorisation":
        return facts(SPEC)[ids[-1]]
    if task == "parity":
        return tasks.FIRST + 2 + sum(token - tasks.FIRST for token in body[:split]) % 2
    if task.startswith("permutation"):
        size = int(task[-1])
        swaps = [(one, two) for one in range(size) for two in range(one + 1, size)]
        things = tasks.FIRST + len(swaps)
        place = ids[-1] - things
        for token in reversed(body[:split]):  # back to where the thing stood at first
            one, two = swaps[token - tasks.FIRST]
            place = {one: two, two: one}.get(place, place)
        return things + place
    return body[body.index(ids[-1]) + 1]


def runs(tokens: list[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of key tokens and the value tokens behind them; the last may lack some."""
    found: list[tuple[list[int], list[int]]] = []
    for token in tokens:
        if token in KEYS and (not found or found[-1][1]):
            found.append(([], []))
        found[-1][token not in KEYS].append(token)
    return [(tuple(key), tuple(value)) for key, value in found]


def test_every_task_has_a_generator_a_length_and_a_marker() -> None:
    assert tuple(tasks.GENERATORS) == STREAM_TASKS and set(task_lengths(SPEC)) == set(STREAM_TASKS)
    assert tuple(tasks.LONGER) == LONGER_TASKS
    assert (*FIRST_TASKS, *WIDER_MARKERS) == STREAM_TASKS
    assert special_tokens(32, wider=True)[: len(special_tokens(32))] == special_tokens(32)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(tasks.GENERATORS)), st.integers(0, 2**32))
def test_every_answer_follows_from_what_stands_before_it(task: str, seed: int) -> None:
    sequence = tasks.GENERATORS[task](SPEC, np.random.default_rng(seed))
    assert sequence.answers
    for place in sequence.answers:
        assert solve(task, sequence.ids[:place]) == sequence.ids[place]


@pytest.mark.parametrize("task", sorted([*tasks.GENERATORS, *tasks.LONGER]))
def test_the_right_choice_is_the_solution(task: str) -> None:
    symbols = special_tokens(SPEC.symbols, wider=True)
    ids = {symbol: number for number, symbol in enumerate(symbols)}
    items = tasks.generate_items(task, SPEC, 50, symbols, 1, seq_len=64)
    for item in items:
        context = [ids[part + "|>"] for part in item["context"].split("|>")[:-1]]
        assert item["choices"][item["answer"]] == symbols[solve(task, context)]
        assert len(set(item["choices"])) == LIMITED.get(task, SPEC.choices)
        assert task not in tasks.LONGER or len(context) == tasks.LONGER[task] * 64 - 1
    places = [item["answer"] for item in items]
    assert len(set(places)) == LIMITED.get(task, SPEC.choices), "the right choice must not always stand at one place"
    assert items != tasks.generate_items(task, SPEC, 50, symbols, 2, seq_len=64)


def test_sequences_have_the_lengths_that_profiles_are_checked_against() -> None:
    random = np.random.default_rng(0)
    for task, generate in tasks.GENERATORS.items():
        lengths = [1 + len(generate(SPEC, random).ids) for _ in range(200)]
        assert 0.7 * task_lengths(SPEC)[task] <= max(lengths) <= task_lengths(SPEC)[task], task


def test_facts_are_the_same_in_every_sequence_and_tell_apart_from_chance() -> None:
    assert facts(SPEC) == facts(SPEC.model_copy(update={"mad_pairs": 3})) and len(set(facts(SPEC).values())) == 10
    seen = [tasks.GENERATORS["memorisation"](SPEC, np.random.default_rng(seed)).ids[1:] for seed in range(20)]
    assert {pair for ids in seen for pair in zip(ids[::2], ids[1::2], strict=True)} == set(facts(SPEC).items())


def test_no_position_alone_gives_a_wider_answer_away() -> None:
    """Guessing the most frequent answer, or repeating what was asked, stays near chance on state tracking."""
    for task, size in (("parity", 2), ("permutation_s3", 3), ("permutation_s5", 5)):
        made = [tasks.GENERATORS[task](SPEC, np.random.default_rng(seed)) for seed in range(600)]
        said = [sequence.ids[-1] for sequence in made]
        assert max(map(said.count, set(said))) / 600 < 1 / size + 0.08
        repeated = sum(sequence.ids[-1] == sequence.ids[-2] for sequence in made) / 600
        assert repeated < 1 / size + 0.15


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
