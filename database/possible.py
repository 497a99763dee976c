"""What no record holds: numbers that no measurement gives, names of 100,000 characters. Refused where a record comes
in; what is stored already is read as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated

from pydantic import AfterValidator

from common.records import Baseline, BenchmarkScore, Measurement, RunRecord, Usage

__all__ = [
    "LONGEST_DESIGN",
    "NewBaseline",
    "NewRun",
    "NewUsage",
    "at_most",
    "impossible_baseline",
    "impossible_run",
    "impossible_usage",
]

LONGEST_NAME = 500
"""Characters of the name of a profile, a model, a task, a key."""
LONGEST_DESIGN = 5000
"""Characters of the name of an element: it has to fit into the URLs of its routes."""
LARGEST = 2**63 - 1
"""Highest integer: what a store and most other programs can hold."""
HIGHEST_LOSS = 1e6
"""Nats a token; a uniform guess over a vocabulary of 100,000 has 11.5."""
_NEEDED = ("run_id", "profile", "baseline_key")
_NAMES = ("program_sha256", "fingerprint", "init", "device", "dtype", "corpus_sha256", "git_commit")
_NAMED = ("reported", "benchmarks", "perplexities", "parameters_by_part", "seconds", "versions", "hardware")
_STEPPED = ("train_loss", "validation_loss")
_COUNTED = ("parameters", "mixer_parameters", "ffn_width", "tokens")
_MEASURED = ("training_flops_per_token", "flops_per_token", "tokens_per_second")


def impossible_run(run: RunRecord) -> list[str]:
    """What cannot be in a run record: a line for each number, with its place in the record."""
    found = [*_measurement("heldout_loss", run.heldout_loss, 0, HIGHEST_LOSS)]
    found += _measurement("learning_curve", run.learning_curve, 0)
    found += _seed("seed", run.seed)
    if run.status == "finished" and run.reason is not None:
        found.append(f"reason: expected none of a finished run, got {run.reason}")
    for name in (*_NEEDED, *_NAMES):
        found += _name(name, getattr(run, name), needed=name in _NEEDED)
    found += _name("name", run.name, longest=LONGEST_DESIGN)
    for place in _NAMED:
        found += _names(place, getattr(run, place))
    found += _names("checks", (check.name for check in run.checks))
    for place in _STEPPED:
        found += _steps(place, getattr(run, place))
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
        found += _steps("efficiency.prefill", run.efficiency.prefill, "a length")
        for length, speed in run.efficiency.prefill.items():
            found += _measurement(f"efficiency.prefill.{length}", speed, 0)
        for name in ("state_bytes", "peak_memory_mb"):
            found += _number(f"efficiency.{name}", getattr(run.efficiency, name), 0)
    if run.trainer == "command":
        # There its last value is what is scored.
        for step, loss in run.train_loss.items():
            found += _number(f"train_loss.{step}", loss, -HIGHEST_LOSS, HIGHEST_LOSS)
    if run.forecast is not None:
        for name in ("step", "peers"):
            found += _number(f"forecast.{name}", getattr(run.forecast, name), 0)
    return found


def impossible_baseline(baseline: Baseline) -> list[str]:
    """As `impossible_run`. A loss or a clip width of 0 would be divided by."""
    found = [] if baseline.seeds else ["seeds: expected at least one, got none"]
    found += _once("seeds", baseline.seeds) + _once("tasks", baseline.tasks) + _names("tasks", baseline.tasks)
    for seed in baseline.seeds:
        found += _seed("seeds", seed)
    for name in ("key", "profile", "program"):
        found += _name(name, getattr(baseline, name), needed=True)
    for name in ("loss", "loss_clip", "benchmark_clip"):
        value = getattr(baseline, name)
        found += [] if value > 0 else [f"{name}: expected more than 0, got {value:g}"]
    found += [] if baseline.loss <= HIGHEST_LOSS else _number("loss", baseline.loss, 0, HIGHEST_LOSS)
    found += _number("benchmark", baseline.benchmark, 0, 1)
    for name in ("loss_sd", "benchmark_sd", "parameters", "mixer_parameters", "flops_per_token"):
        found += _number(name, getattr(baseline, name), 0)
    return [*found, *_number("sd_dof", baseline.sd_dof, 1)]


def impossible_usage(usage: Usage) -> list[str]:
    """As `impossible_run`. An attempt that failed is a call, and tokens come of calls."""
    found = _name("role", usage.role, needed=True) + _name("model", usage.model, needed=True)
    if usage.failed > usage.calls:
        found.append(f"failed: expected at most the {usage.calls} calls, got {usage.failed}")
    for name in ("input_tokens", "output_tokens", "cost"):
        if not usage.calls and getattr(usage, name):
            found.append(f"{name}: expected none of 0 calls, got {getattr(usage, name):g}")
    return found


def at_most(longest: int) -> Callable[[str], str]:
    """A validator of texts of up to so many characters."""

    def check(text: str) -> str:
        if len(text) > longest:
            raise ValueError(f"expected at most {longest} characters, got {len(text)}")
        return text

    return check


def _name(place: str, name: str | None, *, needed: bool = False, longest: int = LONGEST_NAME) -> list[str]:
    if name is None or needed <= len(name) <= longest:
        return []
    return [f"{place}: expected {'1 to' if needed else 'at most'} {longest} characters, got {len(name)}"]


def _names(place: str, names: Iterable[str]) -> list[str]:
    return [line for name in names for line in _name(f"{place}.{name[:20]}", name)]


def _steps(place: str, steps: Iterable[str], what: str = "a step") -> list[str]:
    wrong = [step for step in steps if not (step.isascii() and step.isdigit() and len(step) < 20)]
    return [f"{place}: expected {what} in decimal digits, got {step[:20]!r}" for step in wrong]


def _seed(place: str, seed: int) -> list[str]:
    return [] if 0 <= seed <= LARGEST else [f"{place}: expected 0 to {LARGEST}, got {_shown(seed)}"]


def _once(place: str, values: Sequence[object]) -> list[str]:
    return [] if len(set(values)) == len(values) else [f"{place}: expected each once, got {str(values)[:100]}"]


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
    if high is None and isinstance(value, int):
        high = LARGEST
    if value is None or (low <= value and (high is None or value <= high)):
        return []
    expected = f"at least {low:g}" if high is None else f"{_shown(low)} to {_shown(high)}"
    return [f"{place}: expected {expected}, got {_shown(value)}"]


def _shown(value: float) -> str:
    """An integer may be too large for a float."""
    return str(value)[:40] if isinstance(value, int) else f"{value:g}"


def _possible_run(run: RunRecord) -> RunRecord:
    _refuse(impossible_run(run))
    return run


def _possible_baseline(baseline: Baseline) -> Baseline:
    _refuse(impossible_baseline(baseline))
    return baseline


def _possible_usage(usage: Usage) -> Usage:
    _refuse(impossible_usage(usage))
    return usage


def _refuse(found: list[str]) -> None:
    if found:
        raise ValueError("; ".join(found[:10]))


NewRun = Annotated[RunRecord, AfterValidator(_possible_run)]
NewBaseline = Annotated[Baseline, AfterValidator(_possible_baseline)]
NewUsage = Annotated[Usage, AfterValidator(_possible_usage)]
