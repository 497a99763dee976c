"""The baseline of a profile: DeltaNet over calibration seeds, measured on the same items as every candidate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence

from common.errors import JobError
from common.records import Baseline, BenchmarkScore, RunRecord
from common.result_table import is_accuracy
from training.profiles import Profile
from training.results import benchmark_mean, reported_mean

__all__ = ["PROGRAM", "build_baseline", "candidate_threshold", "counted_tasks", "recount", "tasks_with_signal"]

PROGRAM = "delta_net"
"""Name of the program that every candidate is compared with."""
LEAST_CLIP = 0.1
CANDIDATE_MARGIN = 0.1
"""A candidate's loss lies within so much of the baseline's."""
SPREADS = 8
"""Seed standard deviations that a clip width spans: below that, a fitness term would follow seed noise."""


def counted_tasks(records: Sequence[RunRecord]) -> list[str]:
    """`tasks_with_signal`, or all tasks where there are none: a mean of coin flips under a wide clip is honest, no mean
    is not comparable."""
    if any(record.trainer == "command" for record in records):
        # The user's script reports no n and no chance: every accuracy that all runs have counts.
        common = [name for name in records[0].reported if is_accuracy(name)]
        return [name for name in common if all(record.reported.get(name) is not None for record in records)]
    return tasks_with_signal(records) or list(dict.fromkeys(name for record in records for name in record.benchmarks))


def tasks_with_signal(records: Sequence[RunRecord]) -> list[str]:
    """Those on which some seed architecture is more than 2 standard errors above chance; one far below it has learnt
    nothing that the task asks for.

    An architecture's score is its mean over seeds, and its standard error that of one run: all runs answer the same
    items, so more seeds do not shrink it. A task without a known chance level always counts.

    Args:
        records: the finished runs of the seed architectures.
    """
    names = list(dict.fromkeys(name for record in records for name in record.benchmarks))
    programs = {record.name for record in records}
    return [
        name
        for name in names
        if any(
            _above_chance([r.benchmarks[name] for r in records if r.name == program and name in r.benchmarks])
            for program in programs
        )
    ]


def _above_chance(scores: Sequence[BenchmarkScore]) -> bool:
    chances = [score.chance for score in scores if score.chance is not None]
    if not scores or len(chances) < len(scores):
        return bool(scores)
    error = statistics.fmean(score.se or 0.0 for score in scores)
    return statistics.fmean(score.value for score in scores) - chances[0] > 2 * error


def recount(record: RunRecord, tasks: Collection[str]) -> RunRecord:
    """`record` with its benchmark mean over `tasks` alone, and every other task marked as not counted."""
    if record.trainer == "command":
        return record.model_copy(update={"benchmark_mean": reported_mean(record.reported, tasks)})
    benchmarks = {
        name: score.model_copy(update={"counted": name in tasks}) for name, score in record.benchmarks.items()
    }
    return record.model_copy(update={"benchmarks": benchmarks, "benchmark_mean": benchmark_mean(benchmarks)})


def build_baseline(records: Sequence[RunRecord], key: str, profile: Profile) -> Baseline:
    """The baseline from the finished runs of the seed architectures.

    Args:
        records: runs of DeltaNet over calibration seeds, and of the other seed architectures: all of them decide which
            tasks count and how far seeds spread, those named "delta_net" give the means.
        key: `Launcher.baseline_key()`; runs under another key are refused.

    Raises:
        JobError: there is no finished run of DeltaNet, or a run has another key.
    """
    finished = [record for record in records if record.status == "finished" and record.loss is not None]
    if any(record.baseline_key != key for record in finished):
        raise JobError("a calibration run was made under another baseline key", "train the baselines again")
    tasks = counted_tasks(finished)
    if not any(record.name == PROGRAM for record in finished):
        raise JobError(
            f"expected at least one finished run named {PROGRAM}, got "
            f"{[(record.name, record.status, record.reason) for record in records]}",
            "look at the detail in the result.json of these runs",
        )
    groups: dict[str, list[RunRecord]] = {}
    for record in finished:
        groups.setdefault(record.name, []).append(recount(record, tasks))
    losses = {name: [r.loss.value for r in runs if r.loss] for name, runs in groups.items()}
    scores = {name: [r.benchmark_mean.value for r in runs if r.benchmark_mean] for name, runs in groups.items()}
    own = groups[PROGRAM]
    loss, loss_sd = statistics.fmean(losses[PROGRAM]), pooled_sd(losses.values())
    score = statistics.fmean(scores[PROGRAM]) if scores[PROGRAM] else None
    score_sd = pooled_sd(scores.values())
    measured = profile.search.measured_clip
    return Baseline(
        key=key,
        profile=profile.name,
        program=PROGRAM,
        seeds=sorted({record.seed for record in own}),
        loss=loss,
        loss_sd=loss_sd,
        benchmark=score,
        benchmark_sd=score_sd,
        tasks=tasks,
        sd_dof=sum(len(values) - 1 for values in losses.values()) or None,
        loss_clip=_clip(loss, loss_sd) if measured else LEAST_CLIP,
        benchmark_clip=_clip(score, score_sd) if measured else LEAST_CLIP,
        parameters=own[0].parameters,
        mixer_parameters=(own[0].mixer_parameters or 0) // profile.model.layers or None,
        flops_per_token=own[0].flops_per_token,
    )


def pooled_sd(groups: Iterable[Sequence[float]]) -> float | None:
    """The SD between training seeds, from every architecture that was trained over seeds; None without a repeat.

    Seed noise is of the training, hardly of the program, so the variances within architectures are pooled: two seeds of
    two programs leave 2 degrees of freedom where one program leaves 1, which narrows the 95 % band from 15.6 to 5.3 SD.
    """
    repeated = [values for values in groups if len(values) > 1]
    dof = sum(len(values) - 1 for values in repeated)
    return math.sqrt(sum(statistics.variance(values) * (len(values) - 1) for values in repeated) / dof) if dof else None


def candidate_threshold(baseline: Baseline) -> float:
    """Held-out loss above which a run is no candidate, whatever else it can do."""
    return baseline.loss * (1 + CANDIDATE_MARGIN)


def _clip(mean: float | None, sd: float | None) -> float:
    return max(LEAST_CLIP, SPREADS * sd / mean) if mean and sd is not None else LEAST_CLIP
