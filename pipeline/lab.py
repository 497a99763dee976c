"""What every stage of the loop works with: settings, services, launcher, roles, and what this pipeline knows so far."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from cognition_base.client import CognitionClient
from common.errors import JobError, UsageError, message_of
from common.records import Baseline, CheckReport, RunRecord
from common.settings import Settings
from database.client import DatabaseClient
from pipeline.agents.roles import Proposal, Roles
from pipeline.console import Console
from pipeline.designer import Outcome, fingerprint, genome_of
from pipeline.services import resilient
from pipeline.workspace import Workspace
from training.launcher import Launcher
from training.profiles import Profile
from training.programs import Program

__all__ = ["Cancelled", "Ideas", "Lab", "marks_of"]

T = TypeVar("T")


class Cancelled(Exception):  # noqa: N818 - an order, not an error
    """Ctrl-C came: stop here; the journal holds what is done."""


class Ideas:
    """Designs that this pipeline has stored or has under way, so that no two lanes train the same one.

    Fingerprints are structural (`pipeline.designer.fingerprint`); names are those of elements.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fingerprints: dict[str, str] = {}
        self._functions: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def taken(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._fingerprints)

    def claim(self, owner: str, program: str) -> bool:
        """Reserves a design for `owner` (an experiment's number). False when another holds it."""
        marks = marks_of(program)
        with self._lock:
            if any(self._fingerprints.get(mark, owner) != owner for mark in marks):
                return False
            self._fingerprints.update(dict.fromkeys(marks, owner))
            return True

    def claim_function(self, owner: str, fingerprint: str) -> str | None:
        """Reserves what a design computes (the verifier's fingerprint); the owner, where that is another's."""
        with self._lock:
            holder = self._functions.setdefault(fingerprint, owner)
            return None if holder == owner else holder

    def claim_name(self, owner: str, name: str) -> str:
        """Reserves `name`, or the first of name_2, name_3 ... that is free."""
        with self._lock:
            free, n = name, 1
            while self._names.setdefault(free, owner) != owner:
                n += 1
                free = f"{name}_{n}"
            return free

    def claim_element(self, name: str, program: str) -> None:
        """Reserves the name and structure of a stored element, whoever stored it."""
        with self._lock:
            self._names.setdefault(name, f"element {name}")
            for mark in marks_of(program):
                self._fingerprints.setdefault(mark, f"element {name}")


def marks_of(program: str) -> list[str]:
    """What tells a program apart: its structure, and its genome where the designer knows one.

    The genome matters for the shipped seeds: rendered from it, they are other text that computes the same.
    """
    try:
        mark = fingerprint(program)
    except UsageError:
        return []  # not Python: the checks will say so
    genome = genome_of(program)
    return [mark] if genome is None else [mark, genome.to_json()]


@dataclass
class Lab:
    settings: Settings
    profile: Profile
    workspace: Workspace
    database: DatabaseClient
    cognition: CognitionClient
    launcher: Launcher
    roles: Roles
    console: Console
    baseline: Baseline
    cancelled: threading.Event
    baseline_runs: dict[str, list[RunRecord]] = field(default_factory=dict)
    ideas: Ideas = field(default_factory=Ideas)
    planning: threading.Lock = field(default_factory=threading.Lock)
    _outcomes: dict[int, Outcome] = field(default_factory=dict)
    _runs: dict[int, RunRecord] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, call: Callable[[], T]) -> T:
        """Calls a service, waiting for it to come back when it was killed."""
        return resilient(call, self.cancelled)

    def twin(self, owner: str, report: CheckReport) -> str | None:
        """The element or experiment that computes the same as the checked program, None when it is the first.

        Args:
            owner: number of the experiment, which holds the function from then on.
        """
        fingerprint = report.facts.get("fingerprint")
        if not isinstance(fingerprint, str):
            return None
        holder = self.ideas.claim_function(owner, fingerprint)
        if holder is not None:
            return f"experiment {int(holder)}"
        stored = self.ask(lambda: self.database.with_fingerprint(fingerprint))
        return f"element {stored[0]}" if stored else None

    def check(self, program: Program) -> CheckReport:
        """What the verifier says of one program.

        Raises:
            Cancelled: Ctrl-C came meanwhile.
        """
        return self.job(lambda: self.launcher.check([program], cancel=self.cancelled, baseline=self.baseline)[0])

    def job(self, work: Callable[[], T]) -> T:
        """Runs a check or training job, once more if its scorer process dies: that is no fault of the program.

        Raises:
            Cancelled: Ctrl-C came meanwhile.
            JobError: it failed twice.
        """
        try:
            return self._once(work)
        except JobError as error:
            self.console.note(f"A job failed through no fault of its program and is tried again: {message_of(error)}")
        return self._once(work)

    def _once(self, work: Callable[[], T]) -> T:
        try:
            return work()
        finally:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Raises Cancelled once Ctrl-C came."""
        if self.cancelled.is_set():
            raise Cancelled

    def remember(self, number: int, proposal: Proposal, run: RunRecord, gain: float | None) -> None:
        """Adds a stored experiment to what the designer and the monitor learn from; without a gain only to the
        latter."""
        with self._lock:
            self._runs[number] = run
            if gain is not None:
                self._outcomes[number] = _outcome(proposal, gain)

    def remember_failure(self, number: int, proposal: Proposal) -> None:
        """Adds a design that was refused or did not finish to what the designer learns from."""
        with self._lock:
            self._outcomes[number] = _outcome(proposal, None)

    def history(self) -> tuple[Outcome, ...]:
        with self._lock:
            return tuple(self._outcomes[number] for number in sorted(self._outcomes))

    def finished_runs(self) -> list[RunRecord]:
        """Baselines and stored experiments: the peers of the next run."""
        with self._lock:
            runs = [self._runs[number] for number in sorted(self._runs)]
        return [run for group in self.baseline_runs.values() for run in group] + runs


def _outcome(proposal: Proposal, gain: float | None) -> Outcome:
    return Outcome(proposal.operator, proposal.slot, proposal.mechanisms, gain)
