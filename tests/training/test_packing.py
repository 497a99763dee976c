"""Where `data.order` is `epochs`: every window of the text once an epoch, from any step on and for any number of
ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.process import REPOSITORY
from training.data.corpus import prepare_corpus
from training.data.packing import row_type, write_stream
from training.data.shards import TokenFiles
from training.profiles import Profile, load_profile, profile_names
from training.worker.batches import batches
from training.worker.ranks import Ranks

TINY = load_profile(REPOSITORY / "tests" / "assets" / "tiny.toml")


def profile(steps: int, batch: int, seq_len: int, share: float) -> Profile:
    train = TINY.train.model_copy(update={"steps": steps, "batch": batch, "seq_len": seq_len})
    return TINY.model_copy(
        update={
            "data": TINY.data.model_copy(update={"order": "epochs"}),
            "train": train,
            "tasks": TINY.tasks.model_copy(update={"share": share}),
        }
    )


def stream(profile: Profile, tokens: np.ndarray | TokenFiles, target: Path, seed: int = 0) -> np.ndarray:
    write_stream(profile, tokens, seed, target)
    return np.fromfile(target, row_type(profile.model.vocab)).reshape(-1, profile.train.seq_len + 1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_window_comes_once_an_epoch(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    length = data.draw(st.integers(32, 70))
    tokens = np.arange(data.draw(st.integers(length + 1, 40 * length)), dtype=np.uint16)
    made = profile(
        data.draw(st.integers(2, 40)), data.draw(st.integers(1, 9)), length, data.draw(st.sampled_from([0.0, 0.3]))
    )
    rows = stream(made, tokens, tmp_path_factory.mktemp("s") / "stream", data.draw(st.integers(0, 99)))
    text = rows[(rows >= 0).all(axis=1)]
    assert (np.diff(text, axis=1) == 1).all() and not (text[:, 0] % length).any()
    windows = (len(tokens) - 1) // length
    for start in range(0, len(text), windows):
        epoch = text[start : start + windows, 0] // length
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(windows))


def test_each_epoch_and_each_seed_has_an_order_of_its_own(tmp_path: Path) -> None:
    made = profile(20, 10, 32, 0.0)  # two epochs of 100 windows
    first, other = (stream(made, np.arange(3201, dtype=np.uint16), tmp_path / "s", seed)[:, 0] for seed in (0, 1))
    orders = [tuple(part) for rows in (first, other) for part in (rows[:100], rows[100:])]
    assert len(set(orders)) == 4 and len({frozenset(order) for order in orders}) == 1
    assert all(order != tuple(sorted(order)) for order in orders)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_number_of_ranks_from_any_step_reads_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    batch, steps = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 12))
    folder, tokens = tmp_path_factory.mktemp("s"), np.arange(32 * 30 + 5, dtype=np.uint16)
    rows = stream(profile(steps, batch, 32, 0.0), tokens, folder / "whole")
    first, world = data.draw(st.integers(0, steps - 1)), data.draw(st.integers(1, batch))
    shares = [Ranks(rank, world).share(batch) for rank in range(world)]
    micro = data.draw(st.integers(1, batch))
    read = [list(batches(rows, batch, micro, "cpu", first, share)) for share in shares]
    begun = [
        start
        for number in range(steps - first)
        for one in read
        for part in one[number]
        for start in part.tokens[:, 0].tolist()
    ]
    assert begun == rows[first * batch :, 0].tolist()
    # A run that was asked for fewer steps begins with the same rows.
    assert (stream(profile(first + 1, batch, 32, 0.0), tokens, folder / "short") == rows[: (first + 1) * batch]).all()


def test_large_profiles_read_in_epochs_and_those_of_the_cpu_at_random() -> None:
    orders = {name: load_profile(name).data.order for name in profile_names()}
    assert {name for name, order in orders.items() if order == "random"} == {"cpu-smoke", "cpu", "cpu-long"}


def test_both_orders_share_a_corpus_and_not_a_stream(text_file: Path, tmp_path: Path) -> None:
    made = profile(4, 2, 64, 0.0)
    random = made.model_copy(update={"data": TINY.data})
    corpus = prepare_corpus(random, tmp_path, [text_file])
    assert prepare_corpus(made, tmp_path, [text_file]).folder == corpus.folder
    assert corpus.stream(random, 0).read_bytes() != corpus.stream(made, 0).read_bytes()
