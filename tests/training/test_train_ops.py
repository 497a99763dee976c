"""The worker's training operations: equal size, schedules, the optimiser, and that a tiny model learns and repeats."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.process import REPOSITORY
from training.data.packing import row_type, write_stream
from training.profiles import Profile, load_profile
from training.worker.batches import batches
from training.worker.model import LanguageModel, OverBudgetError, fit_width
from training.worker.optimizer import AdamW, learning_rate
from training.worker.ranks import Ranks
from training.worker.state import WorkerState
from training.worker.train import OPS, _losses

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"


class Mixer(nn.Module):
    """A cumulative mean with a projection of adjustable size."""

    extra = 0

    def __init__(self, hidden_size: int = 64, **_: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size + self.extra)
        self.outer = nn.Linear(hidden_size + self.extra, hidden_size)
        nn.init.constant_(self.inner.bias, 0.5)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None, None]:
        assert attention_mask is None
        x = self.inner(hidden_states).cumsum(1)
        return self.outer(x / torch.arange(1, x.shape[1] + 1)[:, None]), None, None


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile(TINY)


def make(
    profile: Profile, mixer: type[nn.Module] = Mixer, budget: int | None = None, **meta: Any
) -> tuple[WorkerState, dict[str, Any]]:
    state = WorkerState(cls=mixer)
    OPS["train.prepare"](
        state,
        {
            "seed": 0,
            "dtype": "float32",
            **{key: meta.pop(key) for key in ("seed", "dtype", "deterministic") if key in meta},
        },
        [],
        lambda _: None,
    )
    spec = profile.model
    call = {
        "model": spec.model_dump(mode="json"),
        "mixers": [spec.mixer_arguments(layer) for layer in range(spec.layers)],
        "budget": budget,
        "init": meta.pop("init", "program"),
    }
    return state, OPS["train.build"](state, call, [], lambda _: None)[0]


def write(profile: Profile, folder: Path) -> dict[str, Any]:
    """Writes a stream and returns the call that trains on it."""
    tokens = (np.arange(5000) * 7 % 50 + 300).astype(np.uint16)
    write_stream(profile, tokens, 0, folder / "stream")
    return {
        "stream": str(folder / "stream"),
        "type": row_type(profile.model.vocab).name,
        "train": profile.train.model_dump(mode="json"),
    }


def fit(profile: Profile, state: WorkerState, folder: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    OPS["train.run"](state, write(profile, folder), [], lambda meta, arrays=(): events.append(meta))
    return events


def changed(profile: Profile, **train: Any) -> Profile:
    return profile.model_copy(update={"train": profile.train.model_copy(update=train)})


def test_every_mixer_gets_the_same_total_size(profile: Profile) -> None:
    _, base = make(profile)
    assert base["ffn_width"] == profile.model.ffn
    for extra in (5, 16):
        larger = type("Larger", (Mixer,), {"extra": extra})
        state, sizes = make(profile, larger, budget=base["parameters"])
        assert abs(sizes["parameters"] - base["parameters"]) <= profile.model.tolerance * base["parameters"]
        assert sizes["mixer_parameters"] > base["mixer_parameters"] and sizes["ffn_width"] < base["ffn_width"]
        counted = sum(p.numel() for p in state.instances["model"].parameters())
        assert counted == sizes["parameters"]


def test_a_mixer_larger_than_the_whole_baseline_is_over_budget(profile: Profile) -> None:
    huge = type("Huge", (Mixer,), {"extra": 2000})
    _, answer = make(profile, huge, budget=make(profile)[1]["parameters"])
    assert set(answer) == {"refused"} and answer["refused"].startswith("over budget")


@settings(max_examples=60, deadline=None)
@given(st.integers(1000, 10**8), st.integers(10, 5000), st.integers(1, 4000))
def test_fitted_widths_meet_the_tolerance_or_are_refused(fixed: int, unit: int, width: int) -> None:
    budget = fixed + unit * width
    found = fit_width(fixed, unit, budget, 0.005)
    assert found >= 1 and abs(fixed + unit * found - budget) <= 0.005 * budget
    with pytest.raises(OverBudgetError):
        fit_width(budget + unit, unit, budget - unit, 1e-9)


def test_init_program_keeps_what_the_mixer_set_and_fla_resets_it(profile: Profile) -> None:
    kept = make(profile)[0].instances["model"].blocks[0].mixer.inner
    reset = make(profile, init="fla")[0].instances["model"].blocks[0].mixer.inner
    assert (kept.bias == 0.5).all() and (reset.bias == 0).all()
    assert reset.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_training_learns_and_repeats_bit_for_bit(profile: Profile, tmp_path: Path) -> None:
    first_state, _ = make(profile)
    first = fit(profile, first_state, tmp_path)
    assert first[-1]["loss"] < first[0]["loss"] - 0.3
    assert [event["step"] for event in first] == [1, 5, 10, 15, 20, 25, 30]
    assert all(event["task_loss"] > 0 for event in first[1:])
    second_state, _ = make(profile)
    second = fit(profile, second_state, tmp_path)
    assert [event["loss"] for event in first] == [event["loss"] for event in second]
    tokens = np.arange(2 * 20, dtype=np.int32).reshape(2, 20)
    outputs = [OPS["train.logits"](state, {}, [tokens], lambda _: None)[1][0] for state in (first_state, second_state)]
    assert (outputs[0] == outputs[1]).all() and outputs[0].dtype == np.float32
    other_state, _ = make(profile, seed=1)
    assert fit(profile, other_state, tmp_path)[-1]["loss"] != first[-1]["loss"]


def test_micro_batches_give_the_same_training(profile: Profile, tmp_path: Path) -> None:
    whole = fit(profile, make(profile)[0], tmp_path)
    split = changed(profile, micro_batch=3)
    parts = fit(split, make(split)[0], tmp_path)
    assert [event["loss"] for event in parts] == pytest.approx([event["loss"] for event in whole], rel=1e-4)


class Sum(nn.Module):
    """A running sum of random numbers for each place of a text."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(length))


class Noisy(Mixer):
    """Draws from torch's generator, keeps a frozen weight, a buffer, and another in a module that it makes when it
    first runs."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("seen", torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.sum: Sum | None = None

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if self.sum is None:
            self.sum = Sum(hidden_states.shape[1])
        if self.training:
            self.seen += torch.rand(3)
            self.sum.value = self.sum.value + torch.rand(len(self.sum.value))
            hidden_states = hidden_states + 0.001 * self.sum.value[:, None]
            hidden_states = hidden_states + 0.01 * torch.randn_like(hidden_states) + 0.001 * self.seen.mean()
        return super().forward(hidden_states)


@pytest.mark.parametrize("step", [3, 17, 30])
def test_a_run_that_goes_on_from_a_snapshot_is_the_run_that_was_not_broken_off(
    profile: Profile, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.worker.snapshot.PIECE", 1 << 12)  # many pieces, sent over many steps
    call = write(profile, tmp_path)
    events: list[dict[str, Any]] = []
    pieces: list[tuple[str, np.ndarray]] = []

    def emit(meta: dict[str, Any], arrays: Any = ()) -> None:
        if "checkpoint" in meta:
            pieces.append((meta["checkpoint"]["name"], arrays[0]))
        else:
            events.append(meta)

    whole, _ = make(profile, Noisy)
    OPS["train.run"](whole, {**call, "checkpoint": {"steps": None, "seconds": None, "at": [step]}}, [], emit)
    assert len(pieces) > 10
    again, _ = make(profile, Noisy, seed=5)  # nothing of it may matter
    again.values["seed"] = 0
    for name, array in pieces:
        OPS["train.restore"](again, {"name": name}, [array], emit)
    before, events = events, []
    sizes: Counter[str] = Counter()
    for name, array in pieces:
        sizes[name] += array.size
    resume = {"step": step, "sizes": dict(sizes)}
    OPS["train.run"](again, {**call, "resume": resume}, [], emit)
    kept = [[{k: v for k, v in event.items() if k != "memory_mb"} for event in one] for one in (before, events)]
    assert kept[1] == [event for event in kept[0] if event["step"] > step]
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    one, two = (OPS["train.logits"](state, {}, [tokens], lambda _: None)[1][0] for state in (whole, again))
    assert (one == two).all()


def test_a_snapshot_of_another_model_is_refused_and_changes_nothing(profile: Profile, tmp_path: Path) -> None:
    state, _ = make(profile)
    before = [parameter.clone() for parameter in state.instances["model"].parameters()]
    OPS["train.restore"](state, {"name": "weights"}, [np.zeros(7, dtype=np.float32)], lambda _: None)
    resume = {"step": 3, "sizes": {"weights": 7}}
    answer, _ = OPS["train.run"](state, {**write(profile, tmp_path), "resume": resume}, [], lambda _: None)
    assert "the model has" in answer["refused"]
    assert all(map(torch.equal, before, state.instances["model"].parameters()))
    state, _ = make(profile)
    state.ranks = Ranks(1, 2)  # it must not wait for rank 0, which refuses
    answer, _ = OPS["train.run"](state, {**write(profile, tmp_path), "resume": resume}, [], lambda _: None)
    assert "does not fit" in answer["refused"]


def test_z_loss_and_auxiliary_loss_are_added_only_by_setting(profile: Profile, tmp_path: Path) -> None:
    class Auxiliary(Mixer):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Any, None]:  # type: ignore[override]
            return super().forward(hidden_states)[0], self.inner.weight.square().sum(), None

    plain_loss = [event["loss"] for event in fit(profile, make(profile)[0], tmp_path)]
    assert [event["loss"] for event in fit(profile, make(profile, Auxiliary)[0], tmp_path)] == plain_loss
    added = changed(profile, aux_loss=10.0)
    with_aux, without = make(added, Auxiliary)[0], make(profile, Auxiliary)[0]
    fit(added, with_aux, tmp_path), fit(profile, without, tmp_path)
    sizes = [state.instances["model"].blocks[0].mixer.inner.weight.square().sum() for state in (with_aux, without)]
    assert sizes[0] < 0.7 * sizes[1]
    normalisers = []
    for weight in (0.0, 1.0):
        spec = changed(profile, z_loss=weight)
        state, _ = make(spec)
        fit(spec, state, tmp_path)
        logits = OPS["train.logits"](state, {}, [np.arange(60, dtype=np.int32).reshape(1, 60)], lambda _: None)[1][0]
        normalisers.append(float(np.square(np.log(np.exp(logits).sum(-1))).mean()))
    assert normalisers[1] < 0.7 * normalisers[0]


@pytest.mark.slow
def test_recomputed_activations_give_the_same_training(profile: Profile, tmp_path: Path) -> None:
    spec = changed(profile, recompute=True)
    one, two = (fit(each, make(each)[0], tmp_path) for each in (profile, spec))
    assert [event["loss"] for event in two] == pytest.approx([event["loss"] for event in one], rel=1e-5)


def test_sizes_by_part_add_up(profile: Profile) -> None:
    for tied in (True, False):
        spec = profile.model_copy(update={"model": profile.model.model_copy(update={"tied": tied})})
        sizes = make(spec)[1]
        parts = sizes["mixer_parameters"] + sum(sizes[name] for name in ("embedding", "head", "mlps", "norms"))
        assert parts == sizes["parameters"] and (sizes["head"] == 0) == tied


def test_a_loss_that_is_not_finite_is_reported_as_none(profile: Profile, tmp_path: Path) -> None:
    class Broken(Mixer):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
            return hidden_states / 0.0, None, None

    assert fit(profile, make(profile, Broken)[0], tmp_path)[0]["loss"] is None


def test_bfloat16_training_uses_autocast(profile: Profile, tmp_path: Path) -> None:
    class Casting(Mixer):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
            return super().forward(hidden_states.to(torch.bfloat16))

    with pytest.raises(RuntimeError, match=r"(?i)dtype"):
        fit(profile, make(profile, Casting)[0], tmp_path)
    assert fit(profile, make(profile, Casting, dtype="bfloat16")[0], tmp_path)[-1]["loss"] < 6.5


def test_losses_are_summed_in_float32_whatever_the_model_computes_in(profile: Profile, tmp_path: Path) -> None:
    def first(dtype: str) -> tuple[Tensor, Tensor]:
        state, _ = make(profile, dtype=dtype)
        meta = write(profile, tmp_path)
        shape = (profile.train.steps * profile.train.batch, profile.train.seq_len + 1)
        rows = np.memmap(meta["stream"], dtype=meta["type"], mode="r", shape=shape)
        (part,) = next(batches(rows, profile.train.batch, profile.train.batch, "cpu"))
        losses, total = _losses(state, state.instances["model"], part, meta["train"])
        return total, losses @ part.weights

    for dtype in ("float32", "bfloat16"):
        total, wanted = first(dtype)
        assert total.dtype == torch.float32 and total.item() == wanted.item()


@pytest.mark.slow
def test_deterministic_mode_ends_a_run_that_cannot_repeat_and_changes_no_other(
    profile: Profile, tmp_path: Path
) -> None:
    class Scatters(Mixer):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
            return super().forward(hidden_states)

    plain = fit(profile, make(profile)[0], tmp_path)
    fit(profile, make(profile, Scatters)[0], tmp_path)
    try:
        again = fit(profile, make(profile, deterministic=True)[0], tmp_path)
        assert [event["loss"] for event in again] == [event["loss"] for event in plain]
        with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
            fit(profile, make(profile, Scatters, deterministic=True)[0], tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)


def test_logits_at_places_are_those_of_the_whole(profile: Profile) -> None:
    state, _ = make(profile)
    tokens = np.arange(30, dtype=np.int32).reshape(2, 15)
    whole = OPS["train.logits"](state, {}, [tokens], lambda _: None)[1][0]
    places = np.array([[1, 3], [0, 14]], dtype=np.int32)
    some = OPS["train.logits"](state, {}, [tokens, places], lambda _: None)[1][0]
    assert whole.shape == (2, 15, profile.model.vocab)
    np.testing.assert_allclose(some, whole[places[:, 0], places[:, 1]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_the_optimiser_is_adamw_with_clipping(profile: Profile, fused: bool) -> None:
    torch.manual_seed(0)
    model = LanguageModel([Mixer(hidden_size=16)], 16, 8, 40, True, 1e-5)
    spec = profile.train.model_dump(mode="json")
    one, two = spec["betas"]
    weights = [p.detach().double().clone() for p in model.parameters()]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    optimizer = AdamW(model, spec, fused=fused)
    for step in range(1, 6):
        optimizer.gradients.zero_()
        (model(torch.randint(0, 40, (2, 12))).square().mean() * 100).backward()
        gradients = [p.grad.double().clone() for p in model.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for w, m, v, g in zip(weights, first, second, gradients, strict=True):
            clipped = g * min(1.0, spec["clip"] / norm.item())
            m.mul_(one).add_(clipped * (1 - one))
            v.mul_(two).add_(clipped**2 * (1 - two))
            w.mul_(1 - 1e-2 * spec["weight_decay"] * (w.dim() >= 2))
            w.sub_(1e-2 * m / (1 - one**step) / ((v / (1 - two**step)).sqrt() + spec["eps"]))
        assert optimizer.step(1e-2).item() == pytest.approx(norm.item(), rel=1e-5)
    for parameter, wanted in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-4, atol=1e-6)


def test_schedules(profile: Profile) -> None:
    base = {"lr": 1.0, "final_lr": 0.1, "steps": 100, "warmup": 10, "decay": 20}
    cosine = [learning_rate(step, {**base, "schedule": "cosine"}) for step in range(1, 101)]
    stable = [learning_rate(step, {**base, "schedule": "wsd"}) for step in range(1, 101)]
    for rates in (cosine, stable):
        assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
        assert all(a >= b for a, b in pairwise(rates[9:]))
    assert stable[9:80] == [1.0] * 71 and cosine[54] == pytest.approx(0.55, abs=0.01)
    published = {**base, "schedule": "wsd", "decay": 0, "final_lr": 1.0}
    assert learning_rate(100, published) == 1.0


def test_what_surrounds_the_mixers_can_be_compiled_and_computes_the_same(profile: Profile) -> None:
    traced: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        traced.append(len(inputs))
        return graph.forward

    tokens, found = torch.randint(0, 512, (2, 16)), []
    for fused in (False, True):
        state, _ = make(profile)
        model: LanguageModel = state.instances["model"]
        names = [name for name, _ in model.named_parameters()]
        if fused:
            model.fuse(backend)
        assert [name for name, _ in model.named_parameters()] == names
        scored = model.eval()(tokens).detach()
        assert not traced, "scoring stays as it is"
        loss = torch.nn.functional.cross_entropy(model.train()(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        found.append((scored, loss.detach(), *(parameter.grad for parameter in model.parameters())))
    assert traced, "nothing was compiled"
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled)
