"""A Lab whose loop runs in milliseconds: the real database, designer and journal over a trainer that only says
numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from common.files import sha256_text
from common.records import BenchmarkScore, CheckOutcome, CheckReport, Measurement, RunRecord
from common.settings import load as load_settings
from database.client import DatabaseClient
from pipeline.baselines import seed_programs
from pipeline.console import Console
from pipeline.experiment import journal
from pipeline.lab import Lab
from pipeline.loop import Loop
from pipeline.roles import build_roles
from pipeline.roots import store_roots
from pipeline.workspace import Workspace
from tests.database.db_service import EmbeddingDouble, Service
from tests.pipeline.running import TINY
from training.baseline import build_baseline
from training.profiles import load_profile
from training.programs import Program


def record(name: str, text: str, seed: int, key: str, loss: float, bench: float = 0.4) -> RunRecord:
    """A finished run."""
    return RunRecord(
        run_id=f"{name}-{seed}",
        name=name,
        profile="tiny",
        seed=seed,
        status="finished",
        program_sha256=sha256_text(text),
        baseline_key=key,
        heldout_loss=Measurement(value=loss, n=1000, se=0.01),
        benchmarks={"recall": BenchmarkScore(value=bench, n=100, se=0.02, chance=0.1)},
        benchmark_mean=Measurement(value=bench, n=100, se=0.02),
        train_loss={"1": loss + 2, "20": loss},
        parameters=1000,
        mixer_parameters=100,
        ffn_width=64,
        flops_per_token=1000.0,
        work_exponent=1.0,
        seconds={"start": 1.0, "train": 5.0, "score": 2.0},
    )


class Trainer:
    """Answers checks and runs at once. `check` and `train` may be set to what goes wrong: a report, a record, or an
    error that they raise."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.check_answer: Callable[[Program], CheckReport] = accept
        self.train_answer: Callable[[Program], dict[str, Any]] = lambda program: {}
        self.trained: list[Program] = []

    def check(self, programs: list[Program], **_: Any) -> list[CheckReport]:
        return [self.check_answer(program) for program in programs]

    def train(self, program: Program, *, seed: int, **_: Any) -> RunRecord:
        self.trained.append(program)
        changes = self.train_answer(program)
        loss = 4.0 - 0.001 * len(self.trained)
        return record(program.name, program.text, seed, self.key, loss).model_copy(update=changes)


def accept(program: Program) -> CheckReport:
    return CheckReport(program=program.name, accepted=True, checks=[CheckOutcome(name="shapes", passed=True)])


def refuse(program: Program) -> CheckReport:
    failed = CheckOutcome(name="causality", passed=False, detail="output 3 depends on input 7")
    return CheckReport(program=program.name, accepted=False, checks=[failed])


@contextmanager
def opened(folder: Path, url: str, key: str = "key-1", **flags: dict[str, Any]) -> Iterator[tuple[Lab, Trainer]]:
    """A Lab over the database at `url` with data-dir `folder`: one lane, two calibration seeds, roots stored."""
    run = {"data_dir": folder, "profile": str(TINY), "parallel": 1, "experiments": 1} | flags.pop("run", {})
    settings = load_settings(None, {"run": run, "services": {"database_url": url}, **flags})
    profile, workspace, trainer = load_profile(str(TINY)), Workspace(folder, settings), Trainer(key)
    losses = {"delta_net": (4.0, 4.1), "gated_delta_net": (3.9, 4.1)}
    runs = {
        program.name: [
            record(program.name, program.text, seed, key, loss, 0.3 + 0.1 * seed)
            for seed, loss in enumerate(losses[program.name])
        ]
        for program in seed_programs()
    }
    lab = Lab(
        settings,
        profile,
        workspace,
        DatabaseClient(url),
        cast(Any, SimpleNamespace(search=lambda *_: [])),
        cast(Any, trainer),
        build_roles(settings, workspace.logs),
        Console(),
        build_baseline([one for group in runs.values() for one in group], key, profile),
        threading.Event(),
        runs,
    )
    try:
        store_roots(lab)
        yield lab, trainer
    finally:
        workspace.close()


def loop(lab: Lab) -> Loop:
    """A loop that goes on from the journal."""
    return Loop(lab, journal(lab.workspace.experiments, lab.workspace.run_id))


@contextmanager
def database(folder: Path) -> Iterator[Service]:
    """A database server over an embedding double."""
    embedding = EmbeddingDouble()
    env = {"ASI_DATABASE__COLD_START": "4", "ASI_DATABASE__UPDATE_BATCH": "2", "ASI_DATABASE__CANDIDATE_CAPACITY": "4"}
    service = Service(f"sqlite:///{folder}/shared.sqlite", embedding.url, folder / "log", env=env)
    try:
        yield service
    finally:
        service.stop()
        embedding.close()
