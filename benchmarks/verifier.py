"""How many planted faults the verifier refuses, how many good designs it accepts, and what it costs.

    python benchmarks/verifier.py [--set one|two|good|sweep|all] [--parallel 2] [--keep DIR] [--json FILE] [--plot PNG]

Small version: `python benchmarks/verifier.py --set one --sample 4` (about 15 s). Every program runs as in
`training/check.py`: in its own sandbox, two at a time.

one    faults planted into the seeds and into designs of our own designer; grows with the checks
two    the same by somebody who had not read the checks, reported apart, and honest programs that look suspicious
good   seeds, every mechanism, crossovers and oddities of real programs: each refusal is a false alarm
sweep  leaks of 1e-1 to 1e-6 at four positions in three kinds: the detection curve

Exit status: 0 all faults refused and no false alarm, 1 otherwise, 2 a program got no verdict.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import mutants_blind  # noqa: E402
from benchmarks import verifier_report as report  # noqa: E402
from benchmarks.good_designs import GoodDesign, good_designs  # noqa: E402
from benchmarks.mutant import Mutant  # noqa: E402
from benchmarks.mutants import mutants, sweep  # noqa: E402
from benchmarks.verifier_report import SetResult, Verdict, check_all  # noqa: E402

__all__ = ["SETS", "good_programs", "main", "planted_faults", "run_good", "run_mutants", "run_sweep"]


Named = TypeVar("Named", Mutant, GoodDesign)


def planted_faults(name: str) -> list[Mutant]:
    """The mutants of set "one" or "two"."""
    if name == "one":
        return mutants()
    return mutants_blind.mutants()


def good_programs(name: str) -> list[GoodDesign]:
    """The good designs of set "good", or the honest programs of set "two"."""
    if name == "good":
        return good_designs()
    return [GoodDesign(item.name, item.text, item.fault) for item in mutants_blind.honest()]


def run_mutants(name: str, chosen: Sequence[Mutant], parallel: int = 2, keep: Path | None = None) -> SetResult:
    """Checks mutants of set `name`."""
    return check_all(name, [(item.name, item.text, item.fault, item.expected) for item in chosen], parallel, keep=keep)


def run_good(name: str, chosen: Sequence[GoodDesign], parallel: int = 2, keep: Path | None = None) -> SetResult:
    """Checks good designs of set `name`."""
    rows = [(item.name, item.text, item.about, frozenset[str]()) for item in chosen]
    return check_all(name, rows, parallel, planted=False, keep=keep)


def run_sweep(parallel: int = 2, keep: Path | None = None) -> tuple[SetResult, list[report.Point]]:
    """Checks the sweep; also its points with whether each was refused."""
    points = sweep()
    rows = [(point.mutant.name, point.mutant.text, point.mutant.fault, point.mutant.expected) for point in points]
    result = check_all("sweep", rows, parallel, keep=keep)
    return result, [
        report.Point(point.kind, point.position, point.strength, verdict.accepted is False)
        for point, verdict in zip(points, result.verdicts, strict=True)
    ]


SETS = ("one", "two", "good", "sweep")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sets, prints their figures, and returns the exit status."""
    arguments = _arguments(argv)
    how = (arguments.parallel, arguments.keep)
    results: list[SetResult] = []
    points: list[report.Point] = []
    for name in SETS if arguments.set == "all" else (arguments.set,):
        if name == "sweep":
            result, points = run_sweep(*how)
            results.append(_told(result))
            print(report.curve(points), flush=True)
        if name in ("one", "two"):
            results.append(_told(run_mutants(name, _picked(planted_faults(name), arguments), *how)))
        if name in ("two", "good"):
            label = "good" if name == "good" else "two, honest"
            results.append(_told(run_good(label, _picked(good_programs(name), arguments), *how)))
    if arguments.plot and points:
        report.plot(points, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(results, points), indent=1) + "\n", encoding="utf-8")
    return _status(results)


def _told(result: SetResult) -> SetResult:
    print(report.text(result), flush=True)
    return result


def _status(results: Sequence[SetResult]) -> int:
    verdicts: list[Verdict] = [verdict for result in results for verdict in result.verdicts]
    if any(verdict.accepted is None for verdict in verdicts):
        return 2
    return 1 if any(result.wrong() for result in results) else 0


def _picked(programs: Sequence[Named], arguments: argparse.Namespace) -> list[Named]:
    """Those named with --only, or a seeded sample, or all."""
    if arguments.only:
        return [item for item in programs if item.name in arguments.only]
    if arguments.sample is not None:
        return random.Random(arguments.seed).sample(list(programs), min(arguments.sample, len(programs)))
    return list(programs)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=(*SETS, "all"), default="all", help="which programs (default: all)")
    parser.add_argument("--parallel", type=int, default=2, help="programs at a time (default: 2)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep verdicts here; a run that was ended goes on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every verdict to FILE")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the detection curve of the sweep")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these programs of one, two and good")
    parser.add_argument("--sample", type=int, metavar="N", help="only a sample of N programs of one, two and good")
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default: 0)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
