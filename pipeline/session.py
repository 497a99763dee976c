"""One start of the pipeline: opens the data-dir, brings everything up, runs the loop, and shows what came out."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from cognition_base.client import CognitionClient
from common.errors import AsiError, JobError, UsageError
from common.process import on_interrupt
from common.records import Baseline, RunRecord
from common.settings import Settings
from common.text import counted
from pipeline.agents.roles import Roles
from pipeline.agreement import require_agreement
from pipeline.baselines import Progress, calibrate, calibration_folders
from pipeline.console import Console
from pipeline.experiment import Experiment, journal, restore_pool
from pipeline.lab import Cancelled, Lab
from pipeline.loop import Loop
from pipeline.measured import Measured, load_baseline, save_baseline
from pipeline.paired import keep_baseline_items
from pipeline.roles import build_roles
from pipeline.roots import store_roots
from pipeline.services import Services, note_other_constants, refuse_contradictions
from pipeline.summary import print_summary
from pipeline.workspace import Workspace
from training.baseline import build_baseline
from training.command import WARNING
from training.launcher import Launcher, find_device
from training.profiles import Profile, load_profile
from training.programs import load
from training.sandbox import choose

__all__ = ["run_session"]


def run_session(settings: Settings) -> int:
    """Runs until enough experiments are stored or Ctrl-C comes.

    Returns:
        Exit status: 0 done (or Ctrl-C in an endless run), 1 nothing succeeds, 130 Ctrl-C before enough were stored.

    Raises:
        AsiError: a fault that a person must mend; what is journalled stays.
    """
    refuse_contradictions(settings)
    profile = load_profile(settings.run.profile)
    workspace = Workspace(settings.run.data_dir, settings)
    console = Console()
    cancelled = threading.Event()
    for note in workspace.notes:
        console.note(note)
    try:
        with _interruptible(cancelled, console):
            status = _session(settings, profile, workspace, console, cancelled)
    except (Cancelled, AsiError):
        if not cancelled.is_set():
            raise
        # After Ctrl-C calls break off in many ways, which are no faults.
        console.close()
        again = shlex.join([sys.executable, *sys.argv])
        console.note(f"\nStopped; nothing that was finished is lost. To go on, the same command again:\n  {again}")
        return 130 if settings.run.experiments is not None else 0
    finally:
        console.close()
        workspace.close()
    return status


def _session(
    settings: Settings, profile: Profile, workspace: Workspace, console: Console, cancelled: threading.Event
) -> int:
    wanted = settings.run.experiments
    experiments = journal(workspace.experiments, workspace.run_id)
    stored = sum(experiment.state == "stored" for experiment in experiments)
    restored = restore_pool(workspace.pool, experiments)
    if restored:
        console.note(f"{counted(len(restored), 'program')} written again into {workspace.pool}: {', '.join(restored)}")
    if wanted is not None and stored >= wanted and load_baseline(workspace.root) is not None:
        _confirm_finished(settings, profile, workspace, experiments)
        console.note(f"{counted(stored, 'experiment')} stored in {workspace.root}, {wanted} asked for.")
        print_summary(console.rich, workspace.root)
        return 0
    _show_sandbox(settings, console)
    roles = build_roles(settings, workspace.logs)
    launcher = Launcher(settings, profile)
    services = Services(settings, profile, workspace.database, workspace.logs)
    try:
        _prepare(workspace, console, launcher, services, cancelled)
        database = services.database_client()
        require_agreement(workspace, experiments, database)
        baseline, runs = _baseline(settings, profile, workspace, console, launcher, cancelled)
        note_other_constants(database, profile, settings, console)
        cognition = CognitionClient(services.cognition_url, settings.services.timeout)
        _close_when(cancelled, roles)
        lab = Lab(
            settings, profile, workspace, database, cognition, launcher, roles, console, baseline, cancelled, runs
        )
        store_roots(lab)
        loop = Loop(lab, experiments)
        loop.run()
    finally:
        services.close()
    console.close()
    print_summary(console.rich, workspace.root)
    if loop.exhausted:
        console.note(
            f"Nothing succeeds any more: failed.json in the folders of {workspace.experiments} says why. Once that is "
            "mended, the same command goes on; or try another --seed, --seed-program or --llm.backend in a new "
            "--data-dir."
        )
        return 1
    return 0


def _confirm_finished(
    settings: Settings, profile: Profile, workspace: Workspace, experiments: Sequence[Experiment]
) -> None:
    """Asks the database for what the journal says is stored, so that "finished" is true."""
    services = Services(settings, profile, workspace.database, workspace.logs)
    try:
        services.start_database()
        require_agreement(workspace, experiments, services.database_client())
    finally:
        services.close()


def _prepare(
    workspace: Workspace, console: Console, launcher: Launcher, services: Services, cancelled: threading.Event
) -> None:
    """Corpus and services side by side: one waits for the disk and a core, the other for imports."""

    def start_services() -> None:
        began = time.monotonic()
        services.start()
        seconds = time.monotonic() - began
        workspace.record_time("services", seconds)
        console.line(
            "services", "ready", f"database {services.database_url}, cognition base {services.cognition_url}", seconds
        )

    with ThreadPoolExecutor(1, thread_name_prefix="services") as beside:
        starting = beside.submit(start_services)
        began = time.monotonic()
        try:
            corpus = launcher.ready(lambda event: console.progress("corpus", event), cancelled)
            seconds = time.monotonic() - began
        except JobError:
            if cancelled.is_set():
                raise Cancelled from None
            raise
        finally:
            console.done("corpus")
    starting.result()
    if corpus is not None:
        workspace.record_time("corpus", seconds)
        sources = ", ".join(corpus.sources)
        size = f"{corpus.train_tokens:,} tokens to train on, {corpus.heldout_tokens:,} held out, from {sources}"
        console.line("corpus", "ready", size, seconds)
    if cancelled.is_set():
        raise Cancelled


def measured_before(workspace: Workspace, key: str) -> Measured | None:
    """What was measured at an earlier start; None at the first, or when nothing was compared with it yet.

    Raises:
        UsageError: the experiments were compared with a baseline of another key.
    """
    before = load_baseline(workspace.root)
    if before is None:
        journalled = (one.read("evaluate") for one in journal(workspace.experiments, workspace.run_id))
        compared = {found["run"]["baseline_key"] for found in journalled if found}
    else:
        compared = {before.baseline.key} if any(workspace.experiments.iterdir()) else set()
    if compared - {key}:
        raise UsageError(
            f"the experiments in {workspace.root} were compared with another baseline: since then the trainer, the "
            "profile, the corpus, a package or the device has changed, and scores across baselines mean nothing",
            "start a new --data-dir, or go back to what the experiments were made with (settings.toml, result.json)",
        )
    return before if before is not None and before.baseline.key == key else None


def _baseline(
    settings: Settings,
    profile: Profile,
    workspace: Workspace,
    console: Console,
    launcher: Launcher,
    cancelled: threading.Event,
) -> tuple[Baseline, dict[str, list[RunRecord]]]:
    began = time.monotonic()
    before = measured_before(workspace, launcher.baseline_key())

    def finished(who: str, run: RunRecord) -> None:
        console.done(who)
        loss = f"{run.loss_name} {run.loss.value:.4f}" if run.loss else f"{run.status}, {run.reason}"
        console.line(who, "baseline", loss, run.seconds.get("total"))

    show = Progress(console.progress, finished, cancelled)
    seeds = range(profile.search.calibration_seeds)
    runs = calibrate(launcher, launcher.cache / "baselines", seeds, settings.run.parallel, show)
    baseline = build_baseline([run for group in runs.values() for run in group], launcher.baseline_key(), profile)
    roots = before.roots if before is not None else []
    save_baseline(workspace.root, Measured(baseline=baseline, runs=runs, roots=roots))
    keep_baseline_items(workspace.root, calibration_folders(launcher, runs))
    seconds = time.monotonic() - began
    workspace.record_time("baselines", seconds)
    console.line(
        "baselines",
        "ready",
        f"loss {baseline.loss:.4f}, seeds {baseline.seeds}, tasks {', '.join(baseline.tasks)}",
        seconds,
    )
    return baseline, runs


def _show_sandbox(settings: Settings, console: Console) -> None:
    """Says where candidate code will run, and refuses what could never run there.

    Raises:
        SandboxError: the backend asked for does not work here.
        UsageError: programs of a language model, or of the user's, would have no sandbox.
    """
    own = [path for path in settings.run.seed_program if load(path).trust is None]
    sandbox = choose(settings.sandbox.backend, find_device(settings.training.device), settings.sandbox.image)
    console.line("sandbox", "ready", f"{sandbox.backend}{f'; {sandbox.note}' if sandbox.note else ''}")
    if settings.training.command is not None:
        console.line("sandbox", "WARNING", f"for the checks only: {WARNING}")
    if sandbox.backend != "process":
        return
    needs = "programs of a language model run" if settings.llm.backend != "offline" else ""
    needs = needs or (f"{own[0]}, given by --seed-program, runs" if own else "")
    if needs:
        raise UsageError(
            f"{needs} only in bubblewrap or docker, and the sandbox here is a plain process. {sandbox.note}".strip(),
            "install bubblewrap and allow user namespaces (apt-get install bubblewrap), or leave out "
            "--llm.backend and --seed-program",
        )


def _close_when(cancelled: threading.Event, roles: Roles) -> None:
    """Ends the roles' calls once Ctrl-C came, so that no lane waits for a slow model."""

    def wait() -> None:
        cancelled.wait()
        roles.close()

    threading.Thread(target=wait, name="close roles", daemon=True).start()


@contextlib.contextmanager
def _interruptible(cancelled: threading.Event, console: Console) -> Iterator[None]:
    """Turns the first Ctrl-C or SIGTERM into an order to stop; the second ends this process at once, and its
    children end with it."""

    text = "\nStopping: running jobs are ended, the journal is kept. (Again to stop at once.)"
    # Beside the wait for the second: a terminal that is held (Ctrl-S) lets nobody print.
    telling = threading.Thread(target=console.note, args=(text,), name="tell of the stop", daemon=True)

    def stop(number: int) -> None:
        if cancelled.is_set():
            try:
                console.show_cursor()
            finally:
                os._exit(128 + number)
        cancelled.set()
        telling.start()

    try:
        with on_interrupt(stop):
            yield
    finally:
        if telling.ident is not None:
            telling.join(5)  # so that what is printed next stands below it
