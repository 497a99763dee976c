"""The one module that says whether a candidate is better: a difference, its uncertainty, and the words for it.

What was trained over m seeds (a candidate over one, a root over the calibration seeds) is compared with the mean of n
calibration seeds of the baseline. The spread of one run is the seed SD, pooled over the seed architectures (the same
training noise, different programs), so the difference has standard error SD * sqrt(1/m + 1/n), and since that SD is
itself an estimate, the 95 % band is Student's t with the SD's degrees of freedom times it: wide for few seeds.
Inside 2 SD is a tie; beyond 2 SD but inside the band is "perhaps"; only beyond the band is better or worse. A single
seed is never called a win: "beats" needs paired seeds and a correction for how many candidates were tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.records import Baseline, RunRecord
from common.t_quantile import t95
from pipeline.measured import seeds_of

__all__ = ["Difference", "against_baseline", "between_runs", "verdict"]


TIE_SDS = 2.0
"""Seed SDs within which two designs are called equal."""


@dataclass(frozen=True)
class Difference:
    """A held-out loss or benchmark difference, oriented so that positive is better.

    Attributes:
        value: the difference in the quantity's own unit.
        se: its standard error, None when it cannot be estimated.
        sds: value in seed standard deviations of the baseline, None without them.
        band: half-width of the 95 % band around no difference, in the quantity's unit; None without a seed SD.
    """

    value: float
    se: float | None
    sds: float | None
    band: float | None = None

    @property
    def word(self) -> str:
        """ "tie", "perhaps better", "perhaps worse", "better" or "worse"."""
        if self.sds is not None and abs(self.sds) <= TIE_SDS:
            return "tie"
        direction = "better" if self.value > 0 else "worse"
        return direction if self.band is not None and abs(self.value) > self.band else f"perhaps {direction}"

    def __str__(self) -> str:
        error = f" +- {self.se:.4f}" if self.se is not None else ""
        return f"{self.value:+.4f}{error}"


def against_baseline(run: RunRecord, baseline: Baseline, quantity: str = "loss") -> Difference | None:
    """Candidate against the mean of the baseline's seeds.

    Args:
        quantity: "loss" (nats a token, held out) or "benchmark" (mean accuracy of the counted tasks).
    """
    measured = run.loss if quantity == "loss" else run.benchmark_mean
    mean, sd = (baseline.loss, baseline.loss_sd) if quantity == "loss" else (baseline.benchmark, baseline.benchmark_sd)
    if measured is None or mean is None or run.baseline_key != baseline.key:
        return None
    value = mean - measured.value if quantity == "loss" else measured.value - mean
    if not sd or not baseline.sd_dof:
        return Difference(value, measured.se, None)
    return _with_spread(value, sd, (len(seeds_of(run)), len(baseline.seeds)), baseline.sd_dof)


def between_runs(run: RunRecord, other: RunRecord, baseline: Baseline, quantity: str = "loss") -> Difference | None:
    """One run, or the mean of a root's calibration runs, against another of the same profile."""
    first, second = (run.loss, other.loss) if quantity == "loss" else (run.benchmark_mean, other.benchmark_mean)
    if first is None or second is None or run.baseline_key != other.baseline_key:
        return None
    sd = baseline.loss_sd if quantity == "loss" else baseline.benchmark_sd
    value = second.value - first.value if quantity == "loss" else first.value - second.value
    if not sd or not baseline.sd_dof:
        return Difference(value, None, None)
    return _with_spread(value, sd, (len(seeds_of(run)), len(seeds_of(other))), baseline.sd_dof)


def _with_spread(value: float, sd: float, seeds: tuple[int, int], dof: int) -> Difference:
    """A difference of two means over so many seeds, whose seed SD is known with `dof` degrees of freedom."""
    factor = math.sqrt(1 / seeds[0] + 1 / seeds[1])
    return Difference(value, sd * factor, value / sd, t95(dof) * sd * factor)


def verdict(run: RunRecord, baseline: Baseline) -> str:
    """The table's last column: what a run says about held-out loss, and how sure that is."""
    difference = against_baseline(run, baseline)
    if difference is None:
        return "not comparable" if run.loss is not None else "no loss"
    size = f"{difference.sds:+.1f} SD" if difference.sds is not None else "no seed SD"
    # On CPU the baseline runs in float32, and a program runs in bfloat16 only where it cannot do otherwise.
    coarse = ", in bfloat16" if run.device == "cpu" and run.dtype == "bfloat16" else ""
    unaudited = ", unaudited" if run.trainer == "command" else ""
    return f"{difference.word} ({size}){coarse}{unaudited}"
