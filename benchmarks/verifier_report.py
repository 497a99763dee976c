"""What benchmarks/verifier.py runs and prints: verdicts of a set of programs, figures, the detection curve."""

from __future__ import annotations

import functools
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import AsiError
from common.files import read_json, sha256_text, write_json
from common.process import REPOSITORY
from common.records import CheckReport
from training.environment import source_hash
from training.jobs import run_job
from training.programs import Program, to_job

__all__ = ["Point", "SetResult", "Verdict", "as_json", "check_all", "curve", "plot", "text"]

_CPU = re.compile(r"([\d.]+) CPU seconds")
_MEMORY = re.compile(r"([\d,]+) MB of memory")
_JOB = 20
"""Programs given to one scorer process; a fault of ours, or an end, then costs the verdicts of one job only."""


@dataclass(frozen=True)
class Verdict:
    """What the verifier said of one program.

    Attributes:
        about: the fault, or what a good design is.
        expected: checks that may refuse it; empty for a good design.
        accepted: None: no verdict, through a fault of ours.
        refused_by, warned_by: the checks that refuse it or warn; `detail`: the first refusal in words.
        cpu_seconds, memory_mb: of its sandbox, where the report tells it (programs that ran to the end).
    """

    name: str
    about: str
    expected: frozenset[str]
    accepted: bool | None
    refused_by: tuple[str, ...]
    warned_by: tuple[str, ...]
    detail: str
    cpu_seconds: float | None
    memory_mb: float | None

    @property
    def intended(self) -> bool:
        """Whether one of the expected checks refuses it."""
        return "any" in self.expected or bool(self.expected & set(self.refused_by))


@dataclass(frozen=True)
class SetResult:
    """The verdicts of one set and the wall seconds of all of them together.

    `planted`: each program has a fault; else none has one.
    """

    name: str
    planted: bool
    verdicts: tuple[Verdict, ...]
    seconds: float

    def wrong(self) -> list[Verdict]:
        """Misses (planted faults that are accepted), or false alarms among good designs."""
        return [verdict for verdict in self.verdicts if verdict.accepted is self.planted]


@dataclass(frozen=True)
class Point:
    """One leak of the sweep and whether it was refused."""

    kind: str
    position: str
    strength: float
    found: bool


Row = tuple[str, str, str, frozenset[str]]


def check_all(
    name: str, rows: Sequence[Row], parallel: int, *, planted: bool = True, keep: Path | None = None
) -> SetResult:
    """Verifies programs (name, text, about, expected), each in its own sandbox, `parallel` at a time.

    Args:
        keep: folder where the reports of every job are kept, and taken from where programs and checks are the same, so
            that a run that was ended goes on.
    """
    reports: list[CheckReport] = []
    spent = 0.0
    for first in range(0, len(rows), _JOB):
        found, seconds = _kept_job(rows[first : first + _JOB], parallel, keep)
        reports += found
        spent += seconds
        print(f"{name}: {len(reports)} of {len(rows)} programs after {spent:.0f} s", file=sys.stderr, flush=True)
    verdicts = [_verdict(row, report) for row, report in zip(rows, reports, strict=True)]
    return SetResult(name, planted, tuple(verdicts), spent)


def _kept_job(rows: Sequence[Row], parallel: int, keep: Path | None) -> tuple[list[CheckReport], float]:
    """Reports of one job and the wall seconds it took, then or now. One without a verdict is not kept."""
    if keep is None:
        started = time.monotonic()
        return _job(rows, parallel), time.monotonic() - started
    texts = "\0".join(text for row in rows for text in row[:2])
    path = keep / f"{sha256_text(_checks_hash() + texts)[:24]}.json"
    if path.exists():
        kept = read_json(path)
        return [CheckReport(**report) for report in kept["reports"]], kept["seconds"]
    reports, seconds = _kept_job(rows, parallel, None)
    if all(report.accepted is not None for report in reports):
        keep.mkdir(parents=True, exist_ok=True)
        write_json(path, {"seconds": seconds, "reports": [report.model_dump(mode="json") for report in reports]})
    return reports, seconds


@functools.cache
def _checks_hash() -> str:
    """Of all code of ours that a verdict can depend on."""
    files = (REPOSITORY / "training").rglob("*.py")
    return source_hash(sorted(str(path.relative_to(REPOSITORY)) for path in files))


def _job(rows: Sequence[Row], parallel: int) -> list[CheckReport]:
    found: dict[int, CheckReport] = {}

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "report":
            found[event["index"]] = CheckReport(**event["report"])

    programs = to_job(Program(row[0], row[1]) for row in rows)
    job = {"programs": programs, "backend": "auto", "device": "cpu", "parallel": parallel}
    missing = "the scorer did not report it"
    try:
        run_job("check", job, on_event)
    except AsiError as fault:
        missing = str(fault)
    none = [CheckReport(program=row[0], accepted=None, checks=[], error=missing) for row in rows]
    return [found.get(index, none[index]) for index in range(len(rows))]


def _verdict(row: Row, report: CheckReport) -> Verdict:
    name, _, about, expected = row
    refusals = report.refusals()
    detail = refusals[0].detail if refusals else (report.error or "")
    by = tuple(dict.fromkeys(check.name for check in refusals))
    warned = tuple(dict.fromkeys(c.name for c in report.checks if not c.passed and c.severity == "warn"))
    cpu, memory = _told(_CPU, report), _told(_MEMORY, report)
    return Verdict(name, about, expected, report.accepted, by, warned, detail[:300], cpu, memory)


def _told(number: re.Pattern[str], report: CheckReport) -> float | None:
    told = [found[1] for check in report.checks if check.name == "sandbox" and (found := number.search(check.detail))]
    return float(told[-1].replace(",", "")) if told else None


def text(result: SetResult) -> str:
    """The figures of a set, and each wrong verdict by name."""
    count, wrong = len(result.verdicts), result.wrong()
    lost = [verdict for verdict in result.verdicts if verdict.accepted is None]
    good = not result.planted
    if good:
        lines = [f"set {result.name}: {len(wrong)} false alarms of {count} good designs"]
    else:
        lines = [f"set {result.name}: {count - len(wrong) - len(lost)}/{count} planted faults refused"]
    for verdict in wrong:
        what = (
            f"{', '.join(verdict.refused_by)}: {verdict.detail}"
            if good
            else f"expected {_names(verdict)}{_warned(verdict)}"
        )
        lines.append(f"  {'false alarm' if good else 'missed'} {verdict.name} ({verdict.about}): {what}")
    lines += [f"  no verdict {verdict.name}: {verdict.detail}" for verdict in lost]
    if not good:
        by = Counter(verdict.refused_by[0] for verdict in result.verdicts if verdict.refused_by)
        lines.append("  refused by: " + ", ".join(f"{name} {times}" for name, times in by.most_common()))
        other = [verdict for verdict in result.verdicts if verdict.refused_by and not verdict.intended]
        lines += [
            f"  refused by another check: {verdict.name}, expected {_names(verdict)}, "
            f"got {', '.join(verdict.refused_by)} ({verdict.detail[:120]})"
            for verdict in other
        ]
    return "\n".join([*lines, f"  {_times(result)}"])


def _names(verdict: Verdict) -> str:
    return " or ".join(sorted(verdict.expected))


def _warned(verdict: Verdict) -> str:
    return f"; warned of by {', '.join(verdict.warned_by)}" if verdict.warned_by else ""


def _times(result: SetResult) -> str:
    spent = [verdict.cpu_seconds for verdict in result.verdicts if verdict.cpu_seconds is not None]
    cpu = f"; CPU {statistics.median(spent):.1f} s median, {max(spent):.1f} s most (n {len(spent)})" if spent else ""
    each = result.seconds / max(1, len(result.verdicts))
    held = [verdict.memory_mb for verdict in result.verdicts if verdict.memory_mb is not None]
    memory = f"; memory {statistics.median(held):,.0f} MB median, {max(held):,.0f} MB most" if held else ""
    return f"time per program: {each:.1f} s of wall time, amortised{cpu}{memory}"


def curve(points: Sequence[Point]) -> str:
    """The detection table: leaks refused of those planted, one row a kind and position, one column a strength."""
    strengths = sorted({point.strength for point in points}, reverse=True)
    places = list(dict.fromkeys((point.kind, point.position) for point in points))
    refused = {(point.kind, point.position, point.strength): point.found for point in points}
    lines = [f"{'leak':<14}{'position':<12}" + "".join(f"{strength:>8.0e}" for strength in strengths)]
    for kind, position in places:
        cells = ["found" if refused[kind, position, strength] else "-" for strength in strengths]
        lines.append(f"{kind:<14}{position:<12}" + "".join(f"{cell:>8}" for cell in cells))
    shares = [statistics.mean(point.found for point in points if point.strength == strength) for strength in strengths]
    return "\n".join([*lines, f"{'all':<26}" + "".join(f"{share:>8.0%}" for share in shares)])


def plot(points: Sequence[Point], path: Path) -> None:
    """Draws the share of leaks that are refused against their strength, one line a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    strengths = sorted({point.strength for point in points})
    for number, kind in enumerate(dict.fromkeys(point.kind for point in points)):
        of_kind = [point for point in points if point.kind == kind]
        shares = [statistics.mean(p.found for p in of_kind if p.strength == strength) for strength in strengths]
        axes.plot(
            strengths, [100 * share for share in shares], "osv"[number % 3] + ("-", "--", ":")[number % 3], label=kind
        )
    axes.set(xscale="log", xlabel="leak relative to the output", ylabel="refused, %", ylim=(-5, 105))
    axes.set_title(f"{len(points)} leaks by strength")
    axes.legend(title="leak")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def as_json(results: Sequence[SetResult], points: Sequence[Point]) -> dict[str, Any]:
    """Every verdict and point as plain JSON."""
    return {
        "sets": {
            result.name: {
                "programs": len(result.verdicts),
                "wrong": [verdict.name for verdict in result.wrong()],
                "seconds": round(result.seconds, 1),
                "verdicts": [
                    {**asdict(verdict), "expected": sorted(verdict.expected), "intended": verdict.intended}
                    for verdict in result.verdicts
                ],
            }
            for result in results
        },
        "sweep": [asdict(point) for point in points],
    }
