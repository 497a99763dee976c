"""Speed of training on the CPU, as ratios from one run.

    python benchmarks/training.py                           all parts at profile cpu, about 15 minutes
    python benchmarks/training.py --parts worker --repeats 1 --steps 40         a look at whether it works
    python benchmarks/training.py --parts scoring --programs training/architectures/{delta_net,gla,mamba2}.py
    python benchmarks/training.py --parts scoring --profile cpu-smoke --repeats 1              its small version
    python benchmarks/training.py --table                   where the time of a step goes (torch's profiler)
    python benchmarks/training.py --json FILE               the figures as JSON beside the table

worker: tokens a second of our worker in its sandbox, reports and all, against a bare PyTorch loop (bare_loop.py).
pair: two workers at once against two bare loops at once, each of those pinned to a core of its own.
stages: what of a whole run is not training: start, data (the stream of a fresh seed, made while the scorer starts),
audit and scoring; not the check, and not the corpus, which is made once a machine.
scoring: what held-out loss, benchmarks and the audit of a whole run cost, wall and CPU seconds (of the scorer and of
the workers it asks; of training, the worker's), and as shares of the training. The aim is the audit's, by the wall
clock. Its runs are those of stages.

Ours and bare take turns in one run, so that a busy machine slows both; figures are medians over the repeats. Clocks are
the host's, and run from the end of the first step to the end of the last. Beside the wall clock's ratio stands that of
tokens a CPU second, which other processes of the machine move less.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import JobError
from common.files import write_json
from common.process import REPOSITORY, exit_with_parent, spawn
from common.settings import load as load_settings
from training.architectures import SEEDS
from training.data.packing import row_type
from training.launcher import Launcher
from training.profiles import Profile, load_profile
from training.programs import Program, load
from training.sandbox import Limits, choose
from training.scorer.client import Worker

__all__ = ["Compared", "Run", "main", "measure_pair", "measure_runs", "measure_worker"]

AIMS = {"worker": 0.97, "pair": 0.9, "stages": 0.15, "scoring": 0.1}
PARTS = tuple(AIMS)
SCORING = ("heldout", "benchmarks", "audit")
FRESH_SEED = 987_000
"""Training seeds from here on are this benchmark's own, so that their streams are made anew and removed."""
Block = Callable[[int], tuple[float, float]]
"""Trains so many steps; (wall seconds, CPU seconds) from the end of the first to the end of the last."""


@dataclass(frozen=True)
class Compared:
    """Tokens a second of each repeat, ours and bare, in the order in which they were taken; and a CPU second."""

    ours: list[float]
    bare: list[float]
    ours_cpu: list[float]
    bare_cpu: list[float]

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.ours) / statistics.median(self.bare)

    @property
    def cpu_ratio(self) -> float:
        return statistics.median(self.ours_cpu) / statistics.median(self.bare_cpu)

    @property
    def ratios(self) -> list[float]:
        """Of each repeat, ascending."""
        return sorted(ours / bare for ours, bare in zip(self.ours, self.bare, strict=True))


def measure_worker(launcher: Launcher, program: Program, steps: int, repeats: int) -> Compared:
    """One worker against one bare loop."""
    return _compared(launcher, program, steps, repeats, _cores(1))


def measure_pair(launcher: Launcher, program: Program, steps: int, repeats: int) -> Compared:
    """Two at once; tokens a second are those of both together."""
    return _compared(launcher, program, steps, repeats, _cores(2))


COMPARISONS = {"worker": measure_worker, "pair": measure_pair}


@dataclass(frozen=True)
class Run:
    """Seconds of one whole run.

    Attributes:
        stages: wall seconds: {train, start, data, score, other, total}; `score` holds the audit.
        wall, cpu: of train, heldout, benchmarks and audit.
    """

    stages: dict[str, float]
    wall: dict[str, float]
    cpu: dict[str, float]


def measure_runs(launcher: Launcher, program: Program, runs: int) -> list[Run]:
    """Whole runs of one program, each on a stream of its own."""
    corpus, found = launcher.prepare(), []
    for number in range(runs):
        seed = FRESH_SEED + number
        begun = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                record = launcher.train(program, seed=seed, out=Path(folder), run_id=f"speed-{seed}")
            total, seconds = time.perf_counter() - begun, record.seconds
        finally:
            corpus.stream(launcher.profile, seed).unlink(missing_ok=True)
        if record.status != "finished":
            raise JobError(f"the run ended {record.status}, {record.reason}: {record.detail}")
        parts = {name: seconds[name] for name in ("train", "start", "data", "score")}
        stages = {**parts, "other": total - sum(parts.values()), "total": total}
        measured = ("train", *SCORING)
        found.append(
            Run(stages, {name: seconds[name] for name in measured}, {name: seconds[f"{name}_cpu"] for name in measured})
        )
    return found


def overhead(runs: Sequence[Run]) -> float:
    """Median share of a run that is not training."""
    return statistics.median(1 - run.stages["train"] / run.stages["total"] for run in runs)


def shares(seconds: Sequence[dict[str, float]], *parts: str) -> float:
    """Median of what `parts` took together, as a share of the training of the same run."""
    return statistics.median(sum(run[part] for part in parts) / run["train"] for run in seconds)


def audit_share(runs: Sequence[Run]) -> float:
    """Median share of the training's wall time that the audit takes."""
    return shares([run.wall for run in runs], "audit")


def _compared(launcher: Launcher, program: Program, steps: int, repeats: int, cores: Sequence[int]) -> Compared:
    profile = _shortened(launcher.profile, steps)
    stream = launcher.prepare().stream(profile, FRESH_SEED)
    job = _job(launcher, profile, program, stream)
    tokens = len(cores) * (steps - 1) * profile.train.tokens_per_step
    found = Compared([], [], [], [])
    try:
        with contextlib.ExitStack() as stack:
            bare = [stack.enter_context(_bare({**job, "core": core})) for core in cores]
            ours = [stack.enter_context(_ours(launcher, program, job, stream)) for _ in cores]
            for repeat in range(repeats):
                # Whoever goes first changes, so that neither always meets the machine as the other left it.
                turns = [(ours, found.ours, found.ours_cpu), (bare, found.bare, found.bare_cpu)]
                for blocks, rates, cpu_rates in turns[:: -1 if repeat % 2 else 1]:
                    wall, cpu = _together(blocks, steps)
                    rates.append(tokens / wall)
                    cpu_rates.append(tokens / (cpu * len(cores)))
    finally:
        stream.unlink(missing_ok=True)
    return found


def _together(blocks: Sequence[Block], steps: int) -> tuple[float, float]:
    """Mean (wall, CPU) seconds of blocks that run at the same time."""
    with ThreadPoolExecutor(len(blocks)) as lanes:
        seconds = list(lanes.map(lambda block: block(steps), blocks))
    return statistics.fmean(wall for wall, _ in seconds), statistics.fmean(cpu for _, cpu in seconds)


def _shortened(profile: Profile, steps: int) -> Profile:
    train = {"steps": steps, "warmup": min(profile.train.warmup, steps // 2), "decay": 0}
    return profile.model_copy(update={"train": profile.train.model_copy(update=train)})


def _job(launcher: Launcher, profile: Profile, program: Program, stream: Path) -> dict[str, Any]:
    """What both loops are told: the model, its tokens and the optimisation."""
    model = profile.model
    return {
        "program": program.text,
        "model": model.model_dump(mode="json"),
        "mixers": [model.mixer_arguments(layer) for layer in range(model.layers)],
        "budget": launcher.job(program, 0, None)["budget"],
        "stream": str(stream),
        "type": row_type(model.vocab).name,
        "train": profile.train.model_dump(mode="json"),
    }


@contextlib.contextmanager
def _bare(job: dict[str, Any]) -> Iterator[Block]:
    process = _bare_process(job)
    assert process.stdin is not None and process.stdout is not None
    told, heard = process.stdin, process.stdout
    try:
        _answer(process, heard.readline())

        def block(steps: int) -> tuple[float, float]:
            told.write(f"{steps}\n".encode())
            told.flush()
            answer = _answer(process, heard.readline())
            return float(answer["seconds"]), float(answer["cpu_seconds"])

        yield block
    finally:
        process.kill()
        process.wait()


def _bare_process(job: dict[str, Any]) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "bare_loop.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    process = spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert process.stdin is not None
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()
    return process


def _answer(process: subprocess.Popen[bytes], line: bytes) -> dict[str, Any]:
    if not line:
        raise JobError(f"the bare loop ended with status {process.wait()}", "its error stands above")
    answer: dict[str, Any] = json.loads(line)
    return answer


@contextlib.contextmanager
def _ours(launcher: Launcher, program: Program, job: dict[str, Any], stream: Path) -> Iterator[Block]:
    """A worker as the scorer starts it; each block trains the same model on from where it is."""
    settings, hour = launcher.settings.sandbox, 3600.0
    sandbox = choose(settings.backend, launcher.device, settings.image)
    limits = Limits(seconds=hour, cpu_seconds=hour, memory_mb=settings.memory_mb)
    interval = launcher.profile.checkpoint.model_dump(include={"steps", "seconds"})
    with Worker(sandbox, program, reads=[stream], limits=limits, timeout=hour) as worker:
        worker.call("train.prepare", {"seed": 0, "dtype": launcher.dtype})
        worker.load()
        worker.call("train.build", {**{key: job[key] for key in ("model", "mixers", "budget")}, "init": "program"})
        call = {**{key: job[key] for key in ("stream", "type", "train")}, "checkpoint": interval}

        def block(steps: int) -> tuple[float, float]:
            ends: dict[int, tuple[float, float]] = {}

            def heard(meta: dict[str, Any], arrays: list[Any]) -> None:
                if meta.get("step") in (1, steps):
                    ends[int(meta["step"])] = time.perf_counter(), worker.cpu_seconds()

            worker.call("train.run", call, on_event=heard)
            return ends[steps][0] - ends[1][0], ends[steps][1] - ends[1][1]

        yield block


def _cores(count: int) -> list[int]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise JobError(f"{count} loops at once need as many cores, this process may use {len(cores)}", "name --parts")
    return cores[:count]


def main(argv: Sequence[str] | None = None) -> int:
    exit_with_parent()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu")
    parser.add_argument(
        "--programs", type=Path, nargs="+", default=[SEEDS["delta_net"]], help="stages and scoring take all of them"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5, help="turns of ours and bare; whole runs, at most 3")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of a turn")
    parser.add_argument("--table", action="store_true", help="torch's profile of our loop, and nothing else")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures as JSON")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2 or arguments.repeats < 1:
        parser.error("--steps must be at least 2 and --repeats at least 1")
    launcher = Launcher(load_settings(None, {"training": {"device": "cpu"}}), load_profile(arguments.profile))
    launcher.prepare()
    programs = [load(path, name=path.stem) for path in arguments.programs]
    program = programs[0]
    if arguments.table:
        print(profiler_table(launcher, program, arguments.steps))
        return 0
    figures: dict[str, Any] = {"profile": launcher.profile.name, "program": program.name, "steps": arguments.steps}
    print(f"profile {launcher.profile.name}, {program.name}; medians of {arguments.repeats}\n", flush=True)
    compared = [(part, measure) for part, measure in COMPARISONS.items() if part in arguments.parts]
    if compared:
        print("| part | ours | bare | ratio | in CPU seconds | aim |\n|---|---|---|---|---|---|", flush=True)
    for part, measure in compared:
        found = measure(launcher, program, arguments.steps, arguments.repeats)
        ratios = {"ratio": found.ratio, "ratios": found.ratios, "cpu_ratio": found.cpu_ratio}
        figures[part] = {**asdict(found), **ratios, "aim": AIMS[part]}
        print(_row(part, found), flush=True)
    if {"stages", "scoring"} & set(arguments.parts):
        whole = {one.name: measure_runs(launcher, one, min(3, arguments.repeats)) for one in programs}
        for part, table, figure in (("stages", _stages_table, overhead), ("scoring", _scoring_table, audit_share)):
            if part in arguments.parts:
                print(f"\n{table(whole)}", flush=True)
                figures[part] = {
                    name: {"runs": [asdict(run) for run in runs], "share": figure(runs), "aim": AIMS[part]}
                    for name, runs in whole.items()
                }
    if arguments.json:
        write_json(arguments.json, figures)
    return 0


def profiler_table(launcher: Launcher, program: Program, steps: int) -> str:
    """torch's table of where the time of our loop goes, in a process without a sandbox."""
    profile = _shortened(launcher.profile, steps)
    stream = launcher.prepare().stream(profile, FRESH_SEED)
    job = {**_job(launcher, profile, program, stream), "core": _cores(1)[0], "table": True}
    try:
        said, _ = _bare_process(job).communicate()
    finally:
        stream.unlink(missing_ok=True)
    return said.decode()


def _row(part: str, found: Compared) -> str:
    name = {"worker": "tokens/s, one worker", "pair": "tokens/s, two at once"}[part]
    ours, bare, ratios = statistics.median(found.ours), statistics.median(found.bare), found.ratios
    spread = f"{found.ratio:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    return f"| {name} | {ours:,.0f} | {bare:,.0f} | {spread} | {found.cpu_ratio:.3f} | at least {AIMS[part]} |"


def _stages_table(whole: Mapping[str, Sequence[Run]]) -> str:
    rows = [f"| not training, of a run | seconds | share | aim: under {AIMS['stages']} |", "|---|---|---|---|"]
    for name, runs in whole.items():
        parts = (f"{part} {statistics.median(run.stages[part] for run in runs):.1f}" for part in runs[0].stages)
        rows.append(f"| {name} | {', '.join(parts)} | {overhead(runs):.3f} | n = {len(runs)} |")
    return "\n".join(rows)


def _scoring_table(whole: Mapping[str, Sequence[Run]]) -> str:
    names = ("train", *SCORING)
    head = " | ".join(f"{name}, s (CPU s)" for name in names)
    rows = [
        f"| program | {head} | all three, of training (CPU) | audit, of training (CPU), aim: under {AIMS['scoring']} |",
        "|---" * (len(names) + 3) + "|",
    ]
    for program, runs in whole.items():
        wall, cpu = [run.wall for run in runs], [run.cpu for run in runs]
        cells = [
            f"{statistics.median(run[name] for run in wall):.1f} ({statistics.median(run[name] for run in cpu):.1f})"
            for name in names
        ]
        for parts in (SCORING, ("audit",)):
            cells.append(f"{shares(wall, *parts):.3f} ({shares(cpu, *parts):.3f})")
        rows.append(f"| {program}, n = {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
