"""Numbers that no measurement gives, refused where a record comes in. What is stored already is read as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator

from common.records import Baseline, BenchmarkScore, Measurement, RunRecord

__all__ = ["NewBaseline", "NewRun", "impossible_baseline", "impossible_run"]

_COUNTED = ("parameters", "mixer_parameters", "ffn_width", "tokens")
_MEASURED = ("training_flops_per_token", "flops_per_token", "tokens_per_second")


def impossible_run(run: RunRecord) -> list[str]:
    """What cannot be in a run record: a line for each number, with its place in the record."""
    found = [*_measurement("heldout_loss", run.heldout_loss, 0), *_measurement("learning_curve", run.learning_curve, 0)]
    found += _measurement("benchmark_mean", run.benchmark_mean, 0, 1)
    for task, score in run.benchmarks.items():
        found += _measurement(f"benchmarks.{task}", score, 0, 1)
    for task, perplexity in run.perplexities.items():
        found += _measurement(f"perplexities.{task}", perplexity, 0)
    for step, loss in run.validation_loss.items():
        found += _number(f"validation_loss.{step}", loss, 0)
    for phase, seconds in run.seconds.items():
        found += _number(f"seconds.{phase}", seconds, 0)
    for part, count in run.parameters_by_part.items():
        found += _number(f"parameters_by_part.{part}", count, 0)
    for name in (*_COUNTED, *_MEASURED):
        found += _number(name, getattr(run, name), 0)
    if run.efficiency is not None:
        found += _measurement("efficiency.decode", run.efficiency.decode, 0)
        for length, speed in run.efficiency.prefill.items():
            found += _measurement(f"efficiency.prefill.{length}", speed, 0)
        for name in ("state_bytes", "peak_memory_mb"):
            found += _number(f"efficiency.{name}", getattr(run.efficiency, name), 0)
    return found


def impossible_baseline(baseline: Baseline) -> list[str]:
    """As `impossible_run`. A loss or a clip width of 0 would be divided by."""
    found = [] if baseline.seeds else ["seeds: expected at least one, got none"]
    for name in ("loss", "loss_clip", "benchmark_clip"):
        value = getattr(baseline, name)
        found += [] if value > 0 else [f"{name}: expected more than 0, got {value:g}"]
    found += _number("benchmark", baseline.benchmark, 0, 1)
    for name in ("loss_sd", "benchmark_sd", "parameters", "mixer_parameters", "flops_per_token"):
        found += _number(name, getattr(baseline, name), 0)
    return [*found, *_number("sd_dof", baseline.sd_dof, 1)]


def _measurement(place: str, measured: Measurement | None, low: float, high: float | None = None) -> Iterator[str]:
    if measured is None:
        return
    yield from _number(f"{place}.value", measured.value, low, high)
    yield from _number(f"{place}.n", measured.n, 1)
    yield from _number(f"{place}.se", measured.se, 0)
    if isinstance(measured, BenchmarkScore):
        yield from _number(f"{place}.chance", measured.chance, 0, 1)
        yield from _measurement(f"{place}.bits_per_byte", measured.bits_per_byte, 0)


def _number(place: str, value: float | None, low: float, high: float | None = None) -> list[str]:
    if value is None or (low <= value and (high is None or value <= high)):
        return []
    return [f"{place}: expected {f'at least {low:g}' if high is None else f'{low:g} to {high:g}'}, got {value:g}"]


def _possible_run(run: RunRecord) -> RunRecord:
    _refuse(impossible_run(run))
    return run


def _possible_baseline(baseline: Baseline) -> Baseline:
    _refuse(impossible_baseline(baseline))
    return baseline


def _refuse(found: list[str]) -> None:
    if found:
        raise ValueError("; ".join(found[:10]))


NewRun = Annotated[RunRecord, AfterValidator(_possible_run)]
NewBaseline = Annotated[Baseline, AfterValidator(_possible_baseline)]
