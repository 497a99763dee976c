"""Weights go over to a fresh process whole, and whoever writes into a parameter but the optimiser is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.process import REPOSITORY
from tests.training.test_train_ops import Mixer, changed, make, write
from training.profiles import load_profile
from training.worker import train, weights
from training.worker.state import WorkerState

OPS = {**train.OPS, **weights.OPS}
PROFILE = changed(load_profile(REPOSITORY / "tests" / "assets" / "tiny.toml"), steps=6)
TOKENS = np.arange(40, dtype=np.int32).reshape(2, 20)


class Keeping(Mixer):
    """Has buffers of every kind: one that is made late, one without memory of its own, complex and half ones."""

    def __init__(self, hidden_size: int = 64, **_: Any) -> None:
        super().__init__(hidden_size)
        self.register_buffer("scale", torch.ones(1).expand(hidden_size))
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("low", torch.zeros(3, dtype=torch.bfloat16))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        if "late" not in self._buffers:
            self.register_buffer("late", torch.full((4,), 0.5))
        if self.training:
            self.late += 1  # type: ignore[operator]
            self.phase = self.phase * 1j
            self.low = self.low + 1
        out = super().forward(hidden_states, attention_mask)[0]
        return out * self.scale * self.late[0] * self.phase.real[0] * self.low[0], None, None


def ask(state: WorkerState) -> tuple[dict[str, Any], list[np.ndarray]]:
    return OPS["train.logits"](state, {}, [TOKENS], lambda *_: None)


def trained(folder: Path, mixer: type[nn.Module] = Mixer) -> tuple[WorkerState, dict[str, Any]]:
    state, _ = make(PROFILE, mixer)
    return state, OPS["train.run"](state, write(PROFILE, folder), [], lambda *_: None)[0]


def restored(state: WorkerState, mixer: type[nn.Module]) -> tuple[WorkerState, dict[str, Any]]:
    told, arrays = OPS["train.read"](state, {"from": 0}, [], lambda *_: None)
    assert told["total"] == len(arrays) == len(told["tensors"])
    again, _ = make(PROFILE, mixer, seed=7)
    return again, OPS["train.write"](again, {"tensors": told["tensors"], "last": True}, arrays, lambda *_: None)[0]


def test_a_restored_model_answers_as_the_trained_one(tmp_path: Path) -> None:
    state, _ = trained(tmp_path, Keeping)
    again, refused = restored(state, Keeping)
    assert not refused and (ask(again)[1][0] == ask(state)[1][0]).all()


@pytest.mark.parametrize("extra", [3, 0])
def test_weights_of_another_model_are_refused(extra: int, tmp_path: Path) -> None:
    state, _ = trained(tmp_path, type("Larger", (Mixer,), {"extra": 3}))
    _, refused = restored(state, type("Other", (Mixer,), {"extra": extra}))
    assert bool(refused) is (extra == 0)
    told, arrays = OPS["train.read"](state, {"from": 0}, [], lambda *_: None)
    again, _ = make(PROFILE, type("Larger", (Mixer,), {"extra": 3}))
    refused = OPS["train.write"](again, {"tensors": told["tensors"][1:], "last": True}, arrays[1:], lambda *_: None)[0]
    assert "parameters more" in refused["refused"]


class Writing(Mixer):
    """Writes into one element of a parameter, at its third step."""

    how = "data"

    def __init__(self, hidden_size: int = 64, **_: Any) -> None:
        super().__init__(hidden_size)
        self.seen = 0

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        self.seen += 1
        if self.seen == 3 and self.how == "data":
            self.outer.weight.data[1, 1] += 1e-7
        if self.seen == 3 and self.how == "sum kept":
            with torch.no_grad():
                self.outer.weight[0, 0] += 0.5
                self.outer.weight[0, 1] -= 0.5
        if self.seen == 3 and self.how == "memory":
            self.outer.weight.data = self.outer.weight.data.clone()
        if self.seen == 3 and self.how == "object":
            self.outer.weight = nn.Parameter(self.outer.weight.detach().clone())
        return super().forward(hidden_states, attention_mask)


@pytest.mark.parametrize("how", ["data", "sum kept", "memory", "object"])
def test_training_ends_where_a_parameter_was_changed(how: str, tmp_path: Path) -> None:
    _, answer = trained(tmp_path, type("Writing", (Writing,), {"how": how}))
    assert answer == {"changed": {"parameter": "blocks.0.mixer.outer.weight", "step": 3}}


def test_a_parameter_that_is_no_number_is_unchanged(tmp_path: Path) -> None:
    class Broken(Mixer):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
            return super().forward(hidden_states * float("nan"), attention_mask)

    state, answer = trained(tmp_path, Broken)
    assert "changed" not in answer and np.isnan(ask(state)[1][0]).all()


def test_a_parameter_that_answering_changes_is_told(tmp_path: Path) -> None:
    class Late(Mixer):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
            if not self.training:
                self.inner.bias.data += 1
            return super().forward(hidden_states, attention_mask)

    state, answer = trained(tmp_path, Late)
    assert "changed" not in answer
    again, _ = restored(state, Late)
    for asked in (state, again):
        assert ask(asked)[0] == {"changed": "blocks.0.mixer.inner.bias"}


def test_parameters_of_several_dtypes_are_one_before_training(tmp_path: Path) -> None:
    class Doubles(Mixer):
        def __init__(self, hidden_size: int = 64, **_: Any) -> None:
            super().__init__(hidden_size)
            self.gain = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
            return super().forward(hidden_states * self.gain.to(hidden_states.dtype), attention_mask)

    state, _ = trained(tmp_path, Doubles)
    again, refused = restored(state, Doubles)
    assert not refused and (ask(again)[1][0] == ask(state)[1][0]).all()
    assert {p.dtype for p in again.instances["model"].parameters()} == {torch.float32}
