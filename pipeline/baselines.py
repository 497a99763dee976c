"""The seeds of the search: checked, trained over calibration seeds as the profile's baselines, stored as elements 1
and 2.

A calibration run is kept in the cache folder under its baseline key (profile, corpus, trainer, versions, device
...): the same key is never trained twice on one machine, another key never compared. The user's own roots
(--seed-program) follow, checked and trained once.
"""

from __future__ import annotations

import contextlib
import fcntl
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from common.errors import JobError, ServiceError, StoreError, UsageError
from common.files import read_json, write_json
from common.llm import Call, metered, usage_of
from common.records import CheckReport, RunRecord
from database.models import NewElement, Result
from pipeline.agents.roles import Proposal
from pipeline.analyse.stage import analyse
from pipeline.designer import genome_of, mechanisms_of
from pipeline.lab import Cancelled, Lab
from pipeline.measured import Measured, Root, load_baseline, mean_run, save_baseline, seeds_of
from pipeline.workspace import now
from training.architectures import SEEDS
from training.baseline import recount
from training.environment import VERIFIER_SOURCES, source_hash
from training.launcher import Event, Launcher
from training.programs import Program, load
from training.results import element_result, finished_run

__all__ = ["calibrate", "calibration_folders", "in_lanes", "store_roots"]

_REPORTS = TypeAdapter(list[CheckReport])
MOTIVATIONS = {
    "delta_net": (
        "DeltaNet writes to its matrix memory by the delta rule: what the memory already answers to a key is "
        "subtracted from the value "
        "before it is added, so that a new association replaces the old one instead of piling up on it. It is the "
        "root of the "
        "search and the measure of every other design."
    ),
    "gated_delta_net": (
        "Gated DeltaNet adds to the delta rule a forget gate per head and token that depends on the data: the "
        "whole memory can fade at "
        "once, which the delta rule, erasing one key at a time, cannot do. An output gate lets each head be silent."
    ),
}
CHANGES = {"delta_net": "root", "gated_delta_net": "decay: none -> data-dependent per head; output gate"}


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


def store_roots(lab: Lab) -> None:
    """Stores the baseline and the roots (once; repeated starts find them stored), and makes them candidates.

    Roots of an earlier start that is not told of them again (--seed-program) stay roots.

    Raises:
        UsageError: a --seed-program is refused or does not finish training.
    """
    lab.ask(lambda: lab.database.put_baseline(lab.baseline))
    indices = []
    for program in seed_programs():
        run = recount(mean_run(lab.baseline_runs[program.name]), lab.baseline.tasks)
        origin = _Origin(MOTIVATIONS[program.name], CHANGES[program.name])
        indices.append(_store_root(lab, program, run, origin))
    own = [_store_own_root(lab, path) for path in lab.settings.run.seed_program]
    before = load_baseline(lab.workspace.root)
    roots = before.roots if before is not None else []
    known = [root.index for root in roots if _holds(lab, root.index, root.name)]
    indices = list(dict.fromkeys([*indices, *known, *own]))
    # Later the set has its own opinion of the shipped roots; what was just given is always tried.
    _make_candidates(lab, [index for index in own if index not in known] if _has_candidates(lab) else indices)
    roots = [_root(lab, index) for index in indices]
    save_baseline(lab.workspace.root, Measured(baseline=lab.baseline, runs=lab.baseline_runs, roots=roots))


def _has_candidates(lab: Lab) -> bool:
    """Whether the candidate set holds an element that was measured against this baseline."""
    return any(_comparable(lab, element.index) for element in lab.ask(lab.database.candidates))


def _make_candidates(lab: Lab, indices: Sequence[int]) -> None:
    """A full set may refuse one that is not above its lowest: told, and no reason to stop."""
    for index in indices:
        try:
            lab.ask(partial(lab.database.add_candidate, index))
        except ServiceError as error:
            if error.status != 400:
                raise
            lab.console.note(f"Root {index} is stored, but is no candidate: {error.message}")


def _root(lab: Lab, index: int) -> Root:
    scored = lab.ask(partial(lab.database.scored, index))
    runs = lab.ask(partial(lab.database.runs, index))
    if scored is None or not runs:
        raise StoreError(
            f"element {index}, a root of the search, is not in the database with its run", "use another store"
        )
    return Root(index=index, name=scored.name, score=scored.score, run=runs[-1])


@dataclass(frozen=True)
class _Origin:
    """Why a root is there: its motivation, and the words for the table."""

    motivation: str
    change: str


def _stored(lab: Lab, program: Program) -> int | None:
    """Index of the element that holds exactly this root, measured against this baseline; None when it is not
    stored."""
    for element in lab.ask(partial(lab.database.by_name, program.name)):
        if element.program == program.text and _comparable(lab, element.index):
            return element.index
    return None


def _holds(lab: Lab, index: int, name: str) -> bool:
    """Whether the database still holds this root under its index: another database would not."""
    element = lab.ask(partial(lab.database.element, index))
    return element is not None and element.name == name and _comparable(lab, index)


def _comparable(lab: Lab, index: int) -> bool:
    """Whether an element was measured against this baseline."""
    runs = lab.ask(partial(lab.database.runs, index))
    return bool(runs) and runs[-1].baseline_key == lab.baseline.key


def _store_root(lab: Lab, program: Program, run: RunRecord, origin: _Origin) -> int:
    """Stores a root unless it is there, and returns its index."""
    genome = genome_of(program.text)
    mechanisms = mechanisms_of(genome) if genome is not None else ()
    proposal = Proposal(program.name, origin.motivation, program.text, "root", origin.change, mechanisms=mechanisms)
    lab.ideas.claim_element(program.name, program.text)
    found = _stored(lab, program)
    if found is not None:
        return found
    calls: list[Call] = []
    with metered(calls.append):
        texts = analyse(lab, proposal, run, None)
    design = {"operator": "root", "change": origin.change, "genome": None, "mechanisms": list(mechanisms)}
    run = run.model_copy(update={"design": {**design, "seeds": seeds_of(run)}})
    element = NewElement(
        time=now(),
        name=program.name,
        result=Result(**element_result(run)),
        program=program.text,
        motivation=origin.motivation,
        log="",
        parent=None,
        **texts,
    )
    key = f"root:{program.sha256}:{lab.baseline.key}"
    return lab.ask(lambda: lab.database.add_experiment(key, element, run, usage_of(calls))).index


def _store_own_root(lab: Lab, path: Path) -> int:
    """Checks, trains and stores a program of the user's; its name carries its hash, so that an edited file is
    another root."""
    text = load(path)
    program = load(path, name=f"{_element_name(path)}_{text.sha256[:8]}")
    found = _stored(lab, program)
    if found is not None:
        lab.ideas.claim_element(program.name, program.text)
        return found
    report = lab.check(program)
    if not report.accepted:
        refused = report.why_refused()
        raise UsageError(f"--seed-program {path} is refused: {refused}", f"python training/check.py {path}")
    out = lab.workspace.roots / program.name
    run = finished_run(out, program_sha256=program.sha256, baseline_key=lab.baseline.key, seed=0) or lab.launcher.train(
        program,
        seed=0,
        out=out,
        run_id=f"{lab.workspace.run_id}:root:{program.name}",
        checks=report,
        counted_tasks=lab.baseline.tasks,
        on_event=lambda event: lab.console.progress(program.name, event),
        cancel=lab.cancelled,
    )
    lab.console.done(program.name)
    lab.checkpoint()
    if run.status != "finished":
        raise UsageError(f"--seed-program {path} ended {run.status}, {run.reason}: {run.detail}", f"see {out}")
    origin = _Origin(f"A root of the search given by the user: {path.name}.", "given by the user")
    return _store_root(lab, program, recount(run, lab.baseline.tasks), origin)


def _element_name(path: Path) -> str:
    name = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in path.stem.lower())
    return name.strip("_")[:50] or "root"
