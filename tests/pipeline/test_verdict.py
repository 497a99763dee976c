"""Verdicts: words follow from the difference in seed SDs, and one seed is never called a win."""

from __future__ import annotations

import math

import pytest

from common.records import Baseline, Measurement, RunRecord
from pipeline.measured import mean_run
from pipeline.verdict import against_baseline, between_runs, verdict

BASELINE = Baseline(
    key="k",
    profile="cpu",
    seeds=[0, 1, 2],
    loss=4.0,
    loss_sd=0.02,
    benchmark=0.5,
    benchmark_sd=0.05,
    tasks=["recall"],
    sd_dof=2,
)


def run(loss: float | None, bench: float | None = None, key: str = "k") -> RunRecord:
    return RunRecord(
        run_id="r",
        name="n",
        profile="cpu",
        seed=0,
        status="finished",
        program_sha256="0",
        baseline_key=key,
        heldout_loss=None if loss is None else Measurement(value=loss, n=1000, se=0.01),
        benchmark_mean=None if bench is None else Measurement(value=bench, n=100, se=0.05),
    )


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (4.03, "tie (-1.5 SD)"),
        (3.97, "tie (+1.5 SD)"),
        (3.95, "perhaps better (+2.5 SD)"),
        (4.1, "worse (-5.0 SD)"),
        (4.09, "perhaps worse (-4.5 SD)"),  # inside the 95 % band of 2 degrees of freedom: 4.97 SD
        (None, "no loss"),
    ],
)
def test_words(loss: float | None, said: str) -> None:
    assert verdict(run(loss), BASELINE) == said


def test_without_a_seed_spread_nothing_is_claimed_in_sds() -> None:
    assert verdict(run(3.9), BASELINE.model_copy(update={"loss_sd": None})) == "perhaps better (no seed SD)"


def test_standard_errors_follow_from_the_number_of_seeds() -> None:
    difference = against_baseline(run(3.95, 0.6), BASELINE, "benchmark")
    assert difference is not None
    assert difference.value == pytest.approx(0.1) and difference.se == pytest.approx(0.05 * math.sqrt(4 / 3))
    pair = between_runs(run(3.95), run(4.0), BASELINE)
    assert pair is not None and pair.se == pytest.approx(0.02 * math.sqrt(2)) and pair.sds == pytest.approx(2.5)


def test_more_seeds_on_both_sides_narrow_the_error() -> None:
    mean = mean_run([run(3.9), run(4.1).model_copy(update={"seed": 1})])
    assert mean.heldout_loss is not None and mean.heldout_loss.value == pytest.approx(4.0)
    pair, base = between_runs(run(3.95), mean, BASELINE), against_baseline(mean, BASELINE)
    assert pair is not None and pair.se == pytest.approx(0.02 * math.sqrt(1 + 1 / 2))
    assert base is not None and base.se == pytest.approx(0.02 * math.sqrt(1 / 2 + 1 / 3))


def test_a_run_in_a_coarser_number_format_says_so() -> None:
    coarse = run(3.95).model_copy(update={"device": "cpu", "dtype": "bfloat16"})
    assert verdict(coarse, BASELINE) == "perhaps better (+2.5 SD), in bfloat16"
    for changes in ({"device": "cuda", "dtype": "bfloat16"}, {"device": "cpu", "dtype": "float32"}):
        assert verdict(run(3.95).model_copy(update=changes), BASELINE) == "perhaps better (+2.5 SD)"


def test_runs_of_different_baselines_are_not_compared() -> None:
    assert verdict(run(3.5, key="other"), BASELINE) == "not comparable"
    assert between_runs(run(3.95), run(4.0, key="other"), BASELINE) is None
