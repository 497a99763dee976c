"""What a worker says of itself is believed in no form but the right one, and the parameters it has are all counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training.scorer.answers import model_sizes, next_report, peak_memory, prepared_facts, size_refusal, training_report
from training.scorer.heldout import ForgedError
from training.worker.registers import all_parameters, named_parameters

GOOD = {
    "step": 5,
    "loss": 2.5,
    "task_loss": None,
    "lr": 1e-3,
    "grad_norm": 1,
    "memory_mb": 2.0,
}


def test_a_report_passes_as_it_is() -> None:
    assert training_report({**GOOD, "other": "dropped", "tokens": 1e12, "seconds": -1}, 5) == GOOD


@pytest.mark.parametrize("every", [1, 5, 7, 30, 100])
def test_the_next_report_is_known_from_any_step_on(every: int) -> None:
    reported = [step for step in range(1, 31) if step % every == 0 or step in (1, 30)]
    for done in range(31):
        assert next_report(done, every, 30) == next((step for step in reported if step > done), None)


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf"), -float("inf"), 1e300, 10**400])
def test_a_loss_that_is_not_finite_is_none(loss: Any) -> None:
    assert training_report({**GOOD, "loss": loss}, 5)["loss"] is None


@pytest.mark.parametrize(
    "change",
    [
        *({"step": step} for step in (None, 4, 6, 10, 5.0, True, "5", [5], 10**400)),
        *(
            {name: value}
            for name in ("loss", "task_loss", "lr", "grad_norm", "memory_mb")
            for value in ("1", [1], {}, True)
        ),
    ],
)
def test_a_report_of_another_form_is_forged(change: dict[str, Any]) -> None:
    with pytest.raises(ForgedError):
        training_report({**GOOD, **change}, 5)


@pytest.mark.parametrize("missing", ["step", "loss"])
def test_a_report_without_a_part_is_forged(missing: str) -> None:
    with pytest.raises(ForgedError):
        training_report({key: value for key, value in GOOD.items() if key != missing}, 5)


def test_a_report_after_the_last_is_forged() -> None:
    with pytest.raises(ForgedError, match="expected no report"):
        training_report(GOOD, None)


SIZES = ("parameters", "mixer_parameters", "ffn_width", "embedding", "head", "mlps", "norms")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([*GOOD, *SIZES, "versions", "hardware", "peak_memory_mb"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, json_values, max_size=8))
def test_no_answer_raises_anything_but_forged(answer: dict[str, Any]) -> None:
    for judge in (prepared_facts, model_sizes, peak_memory, lambda meta: training_report(meta, 1)):
        try:
            judge(answer)
        except ForgedError:
            continue


def test_sizes_off_the_budget_are_refused() -> None:
    sizes = dict.fromkeys(("parameters", "ffn_width", "embedding", "mlps", "norms"), 9)
    assert model_sizes({**sizes, "mixer_parameters": 0, "head": 0})["parameters"] == 9
    assert size_refusal(1004, 1000, 0.005) is None and size_refusal(5, None, 0.005) is None
    assert "over budget" in (size_refusal(1006, 1000, 0.005) or "")
    assert "under budget" in (size_refusal(994, 1000, 0.005) or "")


class Hiding(nn.Module):
    """Tells of no parameters, by every method that there is for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.inner[1].weight = self.inner[0].weight

    def parameters(self, recurse: bool = True) -> Any:
        return iter(())

    named_parameters = modules = named_modules = children = named_children = parameters  # type: ignore[assignment]


def test_hidden_parameters_are_counted_once() -> None:
    outer = nn.Sequential(Hiding(), nn.Linear(4, 2))
    assert sum(p.numel() for p in all_parameters(outer)) == 16 + 4 + 4 + 8 + 2
    plain = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"a": nn.Conv1d(3, 3, 2), "b": nn.LayerNorm(3)}))
    assert [id(p) for p in all_parameters(plain)] == [id(p) for p in plain.parameters()]


def test_parameters_under_one_name_are_both_found() -> None:
    outer = nn.Module()
    outer.a = nn.Linear(2, 2, bias=False)
    outer._parameters["a.weight"] = nn.Parameter(torch.ones(5))
    assert sum(p.numel() for p in all_parameters(outer)) == 4 + 5
    assert [*named_parameters(outer)] == ["a.weight", "a.weight'"]
