"""Does a profile tell mixers apart? `python benchmarks/ranking.py --profile cpu --seeds 5 --out runs/ranking`.

Trains each shipped architecture named over the seeds, two runs at a time, and prints in Markdown: mean held-out loss,
its standard error over seeds, and the difference to the first architecture, paired by seed (one seed is one
initialisation and one order of the data), with its standard error and that difference in standard errors. Small
version: `--profile cpu-smoke --seeds 2` (two minutes). Runs that are in --out already are not trained again, so an
interrupted ranking goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from common.errors import JobError
from common.files import write_json
from common.process import REPOSITORY
from common.records import RunRecord
from common.settings import load as load_settings
from training.launcher import Launcher
from training.profiles import load_profile
from training.programs import load

__all__ = ["main", "table"]

FOLDER = REPOSITORY / "training" / "architectures"
USUAL = ("linear_attention", "delta_net", "gated_delta_net")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rank shipped architectures at a profile over several seeds.")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--architectures", nargs="+", default=list(USUAL), help="the first is compared with the others")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this minus 1; at least 2")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/ranking"))
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2: one seed has no standard error")
    unknown = [name for name in arguments.architectures if not (FOLDER / f"{name}.py").is_file()]
    if unknown:
        parser.error(f"unknown architectures {', '.join(unknown)}; there are those in {FOLDER}")
    launcher = Launcher(load_settings(), load_profile(arguments.profile))
    launcher.prepare()
    jobs = [(name, seed) for seed in range(arguments.seeds) for name in arguments.architectures]
    with ThreadPoolExecutor(arguments.parallel) as lanes:
        found = list(lanes.map(lambda job: _run(launcher, job[0], job[1], arguments.out), jobs))
    losses = {
        name: [_loss(record) for (other, _), record in zip(jobs, found, strict=True) if other == name]
        for name in arguments.architectures
    }
    write_json(arguments.out / "ranking.json", {"profile": arguments.profile, "heldout_losses": losses})
    print(f"profile {arguments.profile}, {arguments.seeds} seeds\n\n{table(losses)}", flush=True)
    return 0


def table(losses: Mapping[str, Sequence[float]]) -> str:
    """Markdown of {architecture: held-out loss of each seed}; differences are to the first, paired by seed."""
    first = next(iter(losses))
    lines = [f"| architecture | held-out loss | SE | minus {first} | SE | in SE |", "|---|---|---|---|---|---|"]
    for name, values in losses.items():
        row = f"| {name} | {statistics.fmean(values):.4f} | {_se(values):.4f} |"
        if name == first:
            lines.append(f"{row} | | |")
            continue
        differences = [one - other for one, other in zip(values, losses[first], strict=True)]
        mean, error = statistics.fmean(differences), _se(differences)
        times = f"{mean / error:+.1f}" if error > 0 else ""
        lines.append(f"{row} {mean:+.4f} | {error:.4f} | {times} |")
    return "\n".join(lines)


def _se(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _run(launcher: Launcher, name: str, seed: int, out: Path) -> RunRecord:
    folder = out / f"{name}-{seed}"
    program = load(FOLDER / f"{name}.py", name=name)
    file = folder / "result.json"
    if file.is_file():
        record = RunRecord.model_validate_json(file.read_text(encoding="utf-8"))
        same = (record.program_sha256, record.baseline_key) == (program.sha256, launcher.baseline_key())
        if same and record.status == "finished":
            return record
    folder.mkdir(parents=True, exist_ok=True)
    record = launcher.train(program, seed=seed, out=folder, run_id=f"ranking-{name}-{seed}", foreign="discard")
    said = f"{record.heldout_loss.value:.4f}" if record.heldout_loss is not None else record.detail
    print(f"{name} seed {seed}: {record.status}, {said}", file=sys.stderr, flush=True)
    return record


def _loss(record: RunRecord) -> float:
    if record.heldout_loss is None:
        raise JobError(f"{record.name} seed {record.seed} has no held-out loss: {record.detail}")
    return record.heldout_loss.value


if __name__ == "__main__":
    sys.exit(main())
