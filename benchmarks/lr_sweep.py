"""Learning rate of a CPU profile: `python benchmarks/lr_sweep.py --profile cpu --rates 2e-3 4e-3 8e-3 --seeds 2`.

Trains a seed architecture (DeltaNet unless --program) at each rate over the seeds and prints a table in Markdown:
held-out loss, its standard deviation between seeds, and the last training loss; then what each benchmark of the
profile scores at each rate, beside chance, which says whether its difficulty suits the profile. Small version:
`--profile cpu-smoke` (about 10 s a run). A long sweep: `--jobs 2 --keep DIR` trains two at a time and keeps the runs,
so that the same command goes on where it was ended. An untuned rate rewards programs that start fast, so a profile's
rate is the baseline's best.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import statistics
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from common.errors import JobError
from common.records import RunRecord
from common.settings import load as load_settings
from training.architectures import SEEDS
from training.launcher import Launcher
from training.profiles import Profile, load_profile
from training.programs import load
from training.results import finished_run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sweep the learning rate of a profile.")
    parser.add_argument("--profile", default="cpu-smoke")
    parser.add_argument("--program", type=Path, default=SEEDS["delta_net"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
    parser.add_argument("--seeds", type=int, default=2, help="seeds a rate, 0 to this minus 1")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--keep", type=Path, help="folder of the runs, where an ended sweep goes on")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1 or arguments.seeds < 1:
        parser.error("--jobs and --seeds must be at least 1")
    profile = load_profile(arguments.profile)
    print(f"profile {profile.name}, program {arguments.program.stem}\n", flush=True)
    print("| lr | held-out loss | SD | last train loss | seeds |\n|---|---|---|---|---|", flush=True)
    cancel = threading.Event()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        root = arguments.keep or Path(folder)
        try:
            found = {
                rate: [
                    pool.submit(
                        _run, _with_rate(profile, rate), arguments.program, seed, root / f"{rate:g}-{seed}", cancel
                    )
                    for seed in range(arguments.seeds)
                ]
                for rate in arguments.rates
            }
            runs = {
                rate: [one.result() for one in several] for rate, several in found.items() if _print_row(rate, several)
            }
        except KeyboardInterrupt:
            print("interrupted: what runs is ended", file=sys.stderr, flush=True)
            return 130
        finally:  # after Ctrl-C or a fault some are left
            pool.shutdown(wait=False, cancel_futures=True)
            cancel.set()
    _print_benchmarks(runs)
    return 0


def _with_rate(profile: Profile, rate: float) -> Profile:
    return profile.model_copy(update={"train": profile.train.model_copy(update={"lr": rate})})


def _run(profile: Profile, program: Path, seed: int, out: Path, cancel: threading.Event) -> RunRecord:
    launcher, loaded = Launcher(load_settings(), profile), load(program, name=program.stem)
    launcher.ready(cancel=cancel)
    known = finished_run(out, program_sha256=loaded.sha256, baseline_key=launcher.baseline_key(), seed=seed)
    return known or launcher.train(loaded, seed=seed, out=out, run_id=f"sweep-{seed}", foreign="discard", cancel=cancel)


def _print_row(rate: float, several: Sequence[Future[RunRecord]]) -> bool:
    """Waits for the runs of a rate and prints their line; whether all finished."""
    runs = [one.result() for one in several]
    print(_row(rate, runs), flush=True)
    return all(run.status == "finished" for run in runs)


def _print_benchmarks(runs: Mapping[float, Sequence[RunRecord]]) -> None:
    if not runs:
        return
    print("\n" + _line("benchmark", "chance", *(f"{rate:g}" for rate in runs)))
    print("|---" * (len(runs) + 2) + "|")
    for name, score in next(iter(runs.values()))[0].benchmarks.items():
        chance = "" if score.chance is None else f"{score.chance:.2f}"
        means = (statistics.fmean(run.benchmarks[name].value for run in several) for several in runs.values())
        print(_line(name, chance, *(f"{mean:.3f}" for mean in means)))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _row(rate: float, runs: Sequence[RunRecord]) -> str:
    ended = [run for run in runs if run.status != "finished"]
    if ended:
        return f"| {rate:g} | {ended[0].status}, {ended[0].reason} | | | {len(runs)} |"
    losses = [run.heldout_loss.value for run in runs if run.heldout_loss is not None]
    if not losses:
        raise JobError("a finished run has no held-out loss")
    last = statistics.fmean(list(run.train_loss.values())[-1] for run in runs)
    spread = f"{statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"| {rate:g} | {statistics.fmean(losses):.3f} | {spread} | {last:.3f} | {len(losses)} |"


if __name__ == "__main__":
    sys.exit(main())
