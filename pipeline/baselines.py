"""The seeds of the search, trained over calibration seeds as the profile's baselines.

A calibration run is kept in the cache folder under its baseline key (profile, corpus, trainer, versions, device
...): the same key is never trained twice on one machine, another key never compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from common.errors import JobError, StoreError
from common.files import read_json, write_json
from common.records import CheckReport, RunRecord
from pipeline.lab import Cancelled
from training.architectures import SEEDS
from training.environment import VERIFIER_SOURCES, source_hash
from training.launcher import Event, Launcher
from training.programs import Program, load
from training.results import finished_run

__all__ = ["Progress", "calibrate", "calibration_folders", "in_lanes", "seed_programs"]

_REPORTS = TypeAdapter(list[CheckReport])


@dataclass(frozen=True)
class Job:
    """One calibration run: `program` with training seed `seed`, kept in `folder`."""

    program: Program
    seed: int
    folder: Path


def calibration_folder(baselines: Path, key: str, name: str, seed: int) -> Path:
    """Where the run of seed architecture `name` with training seed `seed` is kept."""
    return baselines / key[:16] / f"{name}-seed{seed}"


def calibration_folders(launcher: Launcher, runs: Mapping[str, Sequence[RunRecord]]) -> dict[str, Path]:
    """Where the calibration runs of this baseline key are kept, by NAME-seedN."""
    home, key = launcher.cache / "baselines", launcher.baseline_key()
    found = [calibration_folder(home, key, name, run.seed) for name, group in runs.items() for run in group]
    return {folder.name: folder for folder in found}


def seed_programs() -> list[Program]:
    return [load(path, name=name) for name, path in SEEDS.items()]


def calibrate(
    launcher: Launcher, folder: Path, seeds: Sequence[int], parallel: int, show: Progress
) -> dict[str, list[RunRecord]]:
    """Trains the seed architectures over the calibration seeds, `parallel` at a time; finished runs are read, not
    repeated.

    Returns:
        Program name -> its runs, by training seed.

    Raises:
        JobError: a seed architecture did not pass or finish, which is a fault of this installation.
        Cancelled: Ctrl-C came.
    """
    key = launcher.baseline_key()
    home = folder / key[:16]
    with _alone(home, show):
        return _calibrate(launcher, folder, key, seeds, parallel, show)


@contextlib.contextmanager
def _alone(home: Path, show: Progress) -> Iterator[None]:
    """Holds the calibration of one key, so that pipelines that start together train it once: the others wait."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        handle = (home / "lock").open("a")
    except OSError as error:
        raise StoreError(
            f"cannot write {home}: {error.strerror}", "free disk space, or set training.cache_dir"
        ) from error
    with handle:
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    show.progress("baselines", Event("note", "wait", text="another pipeline trains them; waiting"))
                    told = True
                if show.cancelled.wait(0.2):
                    raise Cancelled from None
        yield


def _calibrate(
    launcher: Launcher, folder: Path, key: str, seeds: Sequence[int], parallel: int, show: Progress
) -> dict[str, list[RunRecord]]:
    home = folder / key[:16]
    programs = seed_programs()
    reports = _reports(launcher, programs, home, show)
    jobs = [
        Job(program, seed, calibration_folder(folder, key, program.name, seed))
        for seed in seeds
        for program in programs
    ]
    runs: dict[tuple[str, int], RunRecord] = {}

    def work(job: Job) -> None:
        run = finished_run(job.folder, program_sha256=job.program.sha256, baseline_key=key, seed=job.seed)
        if run is None:
            report = reports[job.program.name]
            who = f"{job.program.name} s{job.seed}"
            run = launcher.train(
                job.program,
                seed=job.seed,
                out=job.folder,
                run_id=f"{key[:16]}:{job.folder.name}",
                checks=report,
                on_event=lambda event: show.progress(who, event),
                cancel=show.cancelled,
                keep=True,
            )
            show.finished(who, run)
        # The verifier may know more of the program than when it was trained.
        print_now = reports[job.program.name].facts.get("fingerprint")
        runs[job.program.name, job.seed] = run.model_copy(update={"fingerprint": print_now})

    in_lanes(jobs, work, parallel, show.cancelled)
    if show.cancelled.is_set():
        raise Cancelled
    failed = [run for run in runs.values() if run.status != "finished"]
    if failed:
        raise JobError(
            f"the baseline {failed[0].name} (seed {failed[0].seed}) ended {failed[0].status}, {failed[0].reason}: "
            f"{failed[0].detail}",
            f"look into {home}",
        )
    return {program.name: [runs[program.name, seed] for seed in seeds] for program in programs}


@dataclass(frozen=True)
class Progress:
    """How calibration reports: live events, finished runs, and the order to stop."""

    progress: Callable[..., None]
    finished: Callable[[str, RunRecord], None]
    cancelled: threading.Event


def _reports(launcher: Launcher, programs: Sequence[Program], home: Path, show: Progress) -> dict[str, CheckReport]:
    path = home / f"checks-{source_hash(VERIFIER_SOURCES)[:12]}.json"
    if path.exists():
        try:
            kept = {report.program: report for report in _REPORTS.validate_python(read_json(path))}
        except (StoreError, ValidationError):
            kept = {}
        if all(program.name in kept for program in programs):
            return kept
        show.progress("baselines", Event("note", "check", text=f"{path} holds no reports of them: checked again"))
    try:
        reports = launcher.check(programs, cancel=show.cancelled)
    except JobError:
        if show.cancelled.is_set():
            raise Cancelled from None
        raise
    for program, report in zip(programs, reports, strict=True):
        if not report.accepted:
            refused = report.why_refused()
            raise JobError(
                f"the shipped program {program.name} does not pass the checks here: {refused}",
                "report this with the versions",
            )
    write_json(path, [report.model_dump() for report in reports])
    return {report.program: report for report in reports}


def in_lanes(jobs: Sequence[Job], work: Callable[[Job], None], lanes: int, cancelled: threading.Event) -> None:
    """Works through `jobs` in order with `lanes` threads; the first error stops the rest and is raised."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    errors: list[BaseException] = []

    def lane() -> None:
        while not errors and not cancelled.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                work(job)
            except BaseException as error:  # noqa: BLE001 - the boundary of a thread: recorded here, raised below
                errors.append(error)

    threads = [threading.Thread(target=lane, name=f"lane {number}") for number in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
