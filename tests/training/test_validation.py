"""The validation loss: what it is measured on, that the scorer computes it, and that it leaves no trace in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from tests.training.test_train_ops import TINY, Mixer, make, write
from training.profiles import Profile, load_profile
from training.results import learning_curve
from training.scorer.heldout import ForgedError, log_softmax
from training.scorer.scoring import heldout_windows
from training.scorer.validation import Sample, sample_of, validation_windows
from training.worker.train import OPS


class Moody(Mixer):
    """Draws random numbers and counts its calls in two buffers, in evaluation too, and adds all to its output. One
    buffer is written into, the other replaced."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("again", torch.zeros(()))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None, None]:
        self.calls += 1
        self.again = self.again + 1
        noise = nn.functional.dropout(hidden_states, 0.1, training=True) * torch.sin(self.calls) * torch.cos(self.again)
        return super().forward(hidden_states + 0.1 * noise)


@given(st.integers(200, 4000), st.integers(2, 30), st.integers(4, 40), st.integers(1, 12))
def test_no_validation_window_touches_a_scored_one(tokens: int, scored: int, seq_len: int, count: int) -> None:
    text = np.arange(tokens, dtype=np.uint16)
    rows = validation_windows(text, scored, seq_len, count)
    assert rows.shape[1] == seq_len + 1 and len(rows) <= count
    assert not np.isin(rows, heldout_windows(text, scored, seq_len)).any()
    assert len(np.unique(rows)) == rows.size, "each stands once"
    if tokens > scored * (2 * seq_len + 4):
        assert len(rows) == min(count, scored - 1)


def trained(
    profile: Profile, call: dict[str, Any], arrays: list[np.ndarray]
) -> tuple[list[dict[str, Any]], list[Tensor], list[tuple[dict[str, Any], Any]]]:
    """(Reports without what a clock or the system says, weights and buffers, all events)."""
    events: list[tuple[dict[str, Any], Any]] = []
    state, _ = make(profile, Moody)
    OPS["train.run"](state, call, arrays, lambda meta, arrays=(): events.append((meta, arrays)))
    reports = [{**meta, "memory_mb": 0} for meta, _ in events if "step" in meta]
    return reports, list(state.instances["model"].state_dict().values()), events


def test_training_with_validation_is_training_without_it(tmp_path: Path) -> None:
    profile = load_profile(TINY)
    rows = np.random.default_rng(0).integers(0, profile.model.vocab, (3, 17)).astype(np.int32)
    sample = Sample(rows, profile.model.vocab)
    call = write(profile, tmp_path)
    plain, weights, _ = trained(profile, call, [])
    asked, same, events = trained(profile, {**call, "validation": {"every": 7}}, sample.asked())
    assert plain == asked and all(map(torch.equal, weights, same))
    sent = [(meta["validation"], arrays) for meta, arrays in events if "validation" in meta]
    assert [step for step, _ in sent] == [7, 14, 21, 28, 30]
    losses = [sample.told(list(arrays)).loss for _, arrays in sent]
    assert all(loss is not None and 0 < loss < 10 for loss in losses)


def test_the_loss_is_the_mean_over_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).integers(0, 50, (4, 9)).astype(np.int32)
    logits = np.random.default_rng(2).normal(size=(4, 8, 50)).astype(np.float32)
    each = -np.take_along_axis(log_softmax(logits), rows[:, 1:, None], -1)[..., 0]
    whole = Sample(rows, 50)
    assert len(whole.places) == 32
    assert whole.told([logits.reshape(32, 50)]).loss == pytest.approx(each.mean(), abs=1e-6)
    monkeypatch.setattr("training.scorer.validation.MOST_BYTES", 10 * 4 * 50)
    part = Sample(rows, 50)
    assert len(part.places) == 8, "every fourth place where all would be too much"
    row, place = part.places.T
    assert part.told([logits[row, place]]).loss == pytest.approx(each[row, place].mean(), abs=1e-6)


@pytest.mark.parametrize("answer", [[], [np.zeros((2, 50), np.float32)], [np.zeros((32, 50), np.float64)]])
def test_an_answer_of_another_form_is_forged(answer: list[np.ndarray]) -> None:
    sample = Sample(np.zeros((4, 9), np.int32), 50)
    with pytest.raises(ForgedError, match="validation sample"):
        sample.told(answer)
    assert sample.told([np.full((32, 50), np.nan, np.float32)]).loss is None, "what is not finite is no loss"


def test_each_task_is_asked_for_its_answers_alone() -> None:
    profile = load_profile("cpu")
    tokens = np.random.default_rng(3).integers(0, profile.model.vocab, 300_000).astype(np.uint16)
    sample = sample_of(profile, tokens)
    assert sample is not None and list(sample.tasks) == profile.tasks.names
    asked, places = sample.asked()
    assert asked.shape == (len(sample.rows) + 2 * len(sample.tasks), profile.train.seq_len) and asked.min() >= 0
    targets = sample._rows[places[:, 0], places[:, 1] + 1]
    logits = np.zeros((len(places), profile.model.vocab), np.float32)
    logits[np.arange(len(places)), targets] = 1.0
    assert set(sample.told([logits]).tasks.values()) == {1.0}
    first, *_, last = profile.tasks.names
    logits[-len(sample.tasks[last][1]) :, 0] = 2.0
    assert (said := sample.told([logits]).tasks)[first] == 1.0 and said[last] == 0.0
    logits[-1] = np.nan
    assert (said := sample.told([logits]).tasks)[first] == 1.0 and said[last] is None


def test_the_area_is_the_mean_over_the_steps() -> None:
    found = learning_curve([(10, 6.0), (20, 4.0), (50, 3.0)])
    assert found is not None and found.value == pytest.approx((10 * 5.0 + 30 * 3.5) / 40) and found.n == 3
    assert learning_curve([(10, 6.0)]) is None


def test_validation_comes_with_a_report() -> None:
    spec = load_profile(TINY).model_dump()
    spec["eval"]["validation_every"] = 7
    with pytest.raises(ValidationError, match=r"multiple of train\.report_every = 5, got 7"):
        Profile.model_validate(spec)
