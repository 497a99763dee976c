"""Weights go over to a fresh process whole, and whoever writes into a parameter but the optimiser is noticed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.process import REPOSITORY
from tests.training.test_train_ops import Mixer, changed, make, write
from training.profiles import load_profile
from training.scorer.client import CandidateFault
from training.scorer.confirm import UnrepeatableError
from training.scorer.fresh import Fresh, Weights, read_weights, write_weights
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


class Table(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(width))


class Making(Mixer):
    """Makes a module with a buffer in a forward pass of training, at first the first, and counts these passes."""

    waits = 0

    def __init__(self, hidden_size: int = 64, **_: Any) -> None:
        super().__init__(hidden_size)
        self.width, self.passes, self.table = hidden_size, 0, None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        if self.training:
            self.passes += 1
            if self.table is None and self.passes > self.waits:
                self.table = Table(self.width)  # type: ignore[assignment]
            if self.table is not None:
                self.table.scale += 0.1 * torch.rand(())
            self.seen = self.seen + 1
        scale = 1.0 if self.table is None else self.table.scale
        return super().forward(hidden_states * scale + self.seen)


class Here:
    """Behind the interface of a worker, its operations in this process."""

    def __init__(self, state: WorkerState) -> None:
        self.state = state

    def call(self, op: str, meta: dict[str, Any], arrays: Any = ()) -> tuple[dict[str, Any], list[np.ndarray]]:
        return OPS[op](self.state, meta, list(arrays), lambda *_: None)


def test_a_module_made_in_the_first_forward_gets_its_buffers(tmp_path: Path) -> None:
    state, _ = trained(tmp_path, Making)
    again, _ = make(PROFILE, Making, seed=7)
    drawn = torch.get_rng_state()
    write_weights(cast(Any, Here(again)), read_weights(cast(Any, Here(state)), 100_000))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (ask(again)[1][0] == ask(state)[1][0]).all()


def test_a_module_that_a_fresh_process_does_not_make_is_refused(tmp_path: Path) -> None:
    late = type("Late", (Making,), {"waits": 3})
    weights = read_weights(cast(Any, Here(trained(tmp_path, late)[0])), 100_000)
    with pytest.raises(UnrepeatableError, match=r"no module for blocks\.0\.mixer\.table\.scale"):
        write_weights(cast(Any, Here(make(PROFILE, late)[0])), weights)


class Telling:
    """Answers the scorer's questions for weights with `size` bytes of `count` tensors each time, of `total`."""

    def __init__(self, count: int, size: int, total: int) -> None:
        self.count, self.size, self.total, self.asked = count, size, total, 0

    def call(self, op: str, meta: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
        self.asked += 1
        assert self.asked < 100, "asked without end"
        told = [["x", "uint8"]] * self.count
        return {"total": self.total, "tensors": told}, [np.zeros(self.size, np.uint8)] * self.count


@pytest.mark.parametrize(
    "telling",
    [Telling(1, 1 << 27, 2), Telling(1, 0, 1 << 40), Telling(70_000, 0, 1)],
    ids=["large", "many", "empty"],
)
def test_more_buffers_than_a_fresh_process_is_given_are_refused(telling: Telling) -> None:
    with pytest.raises(UnrepeatableError, match="at most 64 MB"):
        read_weights(cast(Any, telling), 1000)


def test_all_fresh_processes_share_one_span_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lives: list[float] = []
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr("training.scorer.fresh.time", clock)

    def start(seconds: float) -> Any:
        lives.append(seconds)
        return object()

    def build(worker: Any) -> None:
        now[0] += 0.3

    with Fresh(start, build, 0.5) as fresh:
        fresh.open(Weights([], []))
        fresh.open(Weights([], []))
        with pytest.raises(CandidateFault, match=r"did not end within 0\.5 s") as caught:
            fresh.open(Weights([], []))
    assert caught.value.reason == "timeout"
    assert lives == pytest.approx([0.5, 0.2])


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
