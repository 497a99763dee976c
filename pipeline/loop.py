"""The closed loop: sample, evolve, evaluate, analyse, update; in several lanes, each step journalled before the
next."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from common.errors import JobError, message_of
from common.files import write_atomic
from common.llm import metered
from common.records import CheckReport, RunRecord
from common.text import counted
from database.models import NewElement, Result
from pipeline.agents.roles import Relative
from pipeline.agreement import require_unstored
from pipeline.analyse.stage import analyse
from pipeline.eval.stage import evaluate
from pipeline.evolve.stage import claim_structure, evolve
from pipeline.experiment import Experiment, proposal_from
from pipeline.failure import ExperimentFailed
from pipeline.keeping import keep_best
from pipeline.lab import Cancelled, Lab
from pipeline.sample import build_context, sample
from pipeline.verdict import verdict
from pipeline.workspace import now

__all__ = ["Loop", "run_experiment"]

PATIENCE = 10
"""Experiments whose failures end an endless loop: three times as many since its start without a single success."""

Attempts = list[dict[str, Any]]
"""What a stage tried and turned down, each as a plain object."""


def run_experiment(lab: Lab, experiment: Experiment) -> None:
    """One turn of the loop. Stages whose result is journalled are not done again.

    Raises:
        Cancelled: Ctrl-C came; the journal holds the stages that are done.
        AsiError: a fault that is not the design's: a service is gone, the disk is full.
    """
    number = f"{experiment.number:04d}"
    who = f"experiment {experiment.number}"

    # Sample
    def sample_stage(_: Attempts) -> dict[str, Any]:
        selection = sample(lab, random.Random(f"{lab.settings.run.seed}/{number}/sample"))
        return {"parent": selection.parent, "references": list(selection.references)}

    sampled = _stage(experiment, "sample", sample_stage)
    context = build_context(lab, sampled["parent"], sampled["references"], number)
    lab.console.line(
        who,
        "sample",
        f"parent {context.parent.name}, {counted(len(context.references), 'reference')}",
        sampled["seconds"],
    )

    # Evolve
    def evolve_stage(attempts: Attempts) -> dict[str, Any]:
        evolved = evolve(lab, who, context, attempts)
        return {
            "proposal": asdict(evolved.proposal),
            "report": evolved.report.model_dump(),
            "attempts": attempts,
            "check_seconds": evolved.check_seconds,
        }

    evolved = _stage(experiment, "evolve", evolve_stage)
    proposal, report = proposal_from(evolved["proposal"]), CheckReport.model_validate(evolved["report"])
    lab.console.line(
        who, "evolve", f"{proposal.name}: {proposal.change}; {len(report.checks)} checks passed", evolved["seconds"]
    )

    # Evaluate
    def evaluate_stage(attempts: Attempts) -> dict[str, Any]:
        done = evaluate(lab, who, experiment.folder, proposal, report, context, attempts)
        return {**asdict(done), "run": done.run.model_dump(), "attempts": attempts}

    evaluated = _stage(experiment, "evaluate", evaluate_stage)
    proposal, run = proposal_from(evaluated["proposal"]), RunRecord.model_validate(evaluated["run"])
    lab.console.line(who, "evaluate", _measured(run), evaluated["seconds"])

    # Analyse
    analysed = _stage(experiment, "analyse", lambda _: analyse(lab, proposal, run, sampled["parent"]))
    lab.console.line(who, "analyse", verdict(run, lab.baseline), analysed["seconds"])

    # Update
    def update_stage(_: Attempts) -> dict[str, Any]:
        element = NewElement(
            time=now(),
            name=proposal.name,
            result=Result(**evaluated["result"]),
            program=proposal.program,
            motivation=proposal.motivation,
            analysis=analysed["analysis"],
            cognition=analysed["cognition"],
            log=evaluated["log"],
            parent=sampled["parent"],
            summary=analysed["summary"],
        )
        usage = experiment.usage()
        stored = lab.ask(lambda: lab.database.add_experiment(experiment.key, element, run, usage))
        gain = _gain(lab, stored.score, context.parent)
        write_atomic(lab.workspace.pool / f"{stored.name}.py", proposal.program)
        return {"index": stored.index, "name": stored.name, "score": stored.score, "gain": gain}

    updated = _stage(experiment, "update", update_stage)
    lab.remember(experiment.number, proposal, run, updated["gain"])
    keep_best(lab.workspace.experiments, lab.settings.training.keep_best)
    score = "no score" if updated["score"] is None else f"score {updated['score']:.3f}"
    lab.console.line(who, "update", f"stored as element {updated['index']}, {score}", updated["seconds"])


def _stage(experiment: Experiment, stage: str, work: Callable[[Attempts], dict[str, Any]]) -> dict[str, Any]:
    """The journalled result of `stage`; when there is none, does the work and journals it."""
    found = experiment.read(stage)
    if found is not None:
        return found
    attempts: Attempts = []
    began = time.monotonic()
    try:
        result = work(attempts)
    except JobError as error:
        raise ExperimentFailed(stage, "fault", error.message).after(attempts, time.monotonic() - began) from error
    except ExperimentFailed as failure:
        failure.after(attempts, time.monotonic() - began)
        raise
    return experiment.write(stage, {**result, "seconds": round(time.monotonic() - began, 3)})


def _gain(lab: Lab, score: float | None, parent: Relative) -> float | None:
    """How much better than its parent; None where a score is missing or the parent was measured otherwise."""
    if score is None or parent.score is None:
        return None
    runs = lab.ask(lambda: lab.database.runs(parent.index))
    return score - parent.score if runs and runs[-1].baseline_key == lab.baseline.key else None


def _measured(run: RunRecord) -> str:
    loss = f"{run.loss_name} {run.loss.value:.4f}" if run.loss else "no loss"
    mean = f", benchmark mean {run.benchmark_mean.value:.3f}" if run.benchmark_mean else ""
    return f"{loss}{mean}" + (f", {run.parameters:,} parameters" if run.parameters else "")


class Loop:
    """Runs experiments in lanes until enough are stored, Ctrl-C comes, or nothing works any more."""

    def __init__(self, lab: Lab, experiments: Sequence[Experiment]) -> None:
        """`experiments`: the journal, from which the loop goes on."""
        self._lab = lab
        self._wanted = lab.settings.run.experiments
        self._changed = threading.Condition()
        self._errors: list[BaseException] = []
        self._active = 0
        self._fruitless = 0
        self._faults = 0
        self._stored = sum(experiment.state == "stored" for experiment in experiments)
        self._unfinished = [experiment for experiment in experiments if experiment.state not in ("stored", "failed")]
        self._failed = [experiment for experiment in experiments if experiment.state == "failed"]
        self._next = max((experiment.number for experiment in experiments), default=0) + 1
        self._seen = 0
        for experiment in experiments:
            self._recall(experiment)

    @property
    def exhausted(self) -> bool:
        """Too many experiments in a row have failed since the start."""
        done = self._wanted is not None and self._stored >= self._wanted
        return not done and self._fruitless >= 3 * (self._wanted or PATIENCE)

    def run(self) -> None:
        """Returns when the loop has ended; a fault in any lane ends all and is raised.

        Raises:
            Cancelled: Ctrl-C came.
            AsiError: see `run_experiment`. What else a lane raised is a fault of ours, and is raised as it was.
        """
        # Again, in case a kill came between the journal and the database, which keeps it once.
        for experiment in self._failed:
            self._account(experiment)
        lanes = [
            threading.Thread(target=self._lane, name=f"lane {number}")
            for number in range(self._lab.settings.run.parallel)
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        if self._errors:
            raise self._errors[0]
        if self._lab.cancelled.is_set():
            raise Cancelled

    def _lane(self) -> None:
        try:
            while (experiment := self._take()) is not None:
                stored = False
                try:
                    stored = self._turn(experiment)
                finally:
                    with self._changed:
                        self._active -= 1
                        self._stored += stored
                        self._fruitless = 0 if stored else self._fruitless + 1
                        self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - the boundary of a thread: recorded here, raised by `run`
            self._record(error)

    def _turn(self, experiment: Experiment) -> bool:
        """Whether the experiment was stored."""
        self._refresh_ideas()
        if experiment.read("sample") is None:
            require_unstored(experiment, self._lab.database)
        try:
            with metered(experiment.note_call):
                run_experiment(self._lab, experiment)
        except ExperimentFailed as failure:
            self._count_faults(failure)
            self._fail(experiment, failure)
            return False
        with self._changed:
            self._faults = 0
        return True

    def _count_faults(self, failure: ExperimentFailed) -> None:
        """One program may trip over a fault of ours; two experiments in a row say that nothing works here.

        Raises:
            JobError: the second one; its experiment is not journalled as failed and is taken up by the next start.
        """
        with self._changed:
            self._faults = self._faults + 1 if failure.reason == "fault" else 0
            again = self._faults > 1
        if again and isinstance(failure.__cause__, JobError):
            raise failure.__cause__

    def _record(self, error: BaseException) -> None:
        """Keeps what ends the loop. After Ctrl-C calls break off in many ways, which are no faults."""
        with self._changed:
            if not self._lab.cancelled.is_set():
                if not self._errors:
                    self._lab.console.note(
                        f"Stopping, experiments under way in other lanes are finished first: {message_of(error)}"
                    )
                self._errors.append(error)
            self._changed.notify_all()

    def _take(self) -> Experiment | None:
        """The next experiment for a lane: an unfinished one first; None when there is nothing left to do."""
        with self._changed:
            while True:
                if self._errors or self._lab.cancelled.is_set():
                    return None
                if self._wanted is not None and self._stored >= self._wanted:
                    return None
                if self.exhausted and self._active == 0:
                    return None
                if not self.exhausted and (self._wanted is None or self._stored + self._active < self._wanted):
                    self._active += 1
                    return self._unfinished.pop(0) if self._unfinished else self._new()
                self._changed.wait(0.5)

    def _new(self) -> Experiment:
        number, self._next = self._next, self._next + 1
        return self._lab.workspace.experiment(number)

    def _fail(self, experiment: Experiment, failure: ExperimentFailed) -> None:
        lab = self._lab
        lab.console.line(
            f"experiment {experiment.number}", "failed", f"{failure.stage}, {failure.reason}: {failure.detail}"[:400]
        )
        record = experiment.write("failed", failure.record())
        self._account(experiment)
        self._learn_from_failure(experiment, record)
        lab.cancelled.wait(lab.settings.evolve.failure_wait)

    def _account(self, experiment: Experiment) -> None:
        """Tells the database what a failed experiment's calls of language models took, which no element carries."""
        usage = experiment.usage()
        if usage:
            self._lab.ask(lambda: self._lab.database.add_usage(usage, f"{experiment.key}:failed"))

    def _recall(self, experiment: Experiment) -> None:
        """Claims what a journalled experiment designed, and learns from how it ended."""
        number = f"{experiment.number:04d}"
        update, evaluated = experiment.read("update"), experiment.read("evaluate")
        for stage in ("evolve", "evaluate", "failed"):
            found = experiment.read(stage) or {}
            proposals = [found["proposal"]] if "proposal" in found else []
            for value in proposals + [attempt["proposal"] for attempt in found.get("attempts", [])]:
                claim_structure(self._lab, number, proposal_from(value))
        evolved = experiment.read("evolve")
        marks = [evolved["report"].get("facts", {}).get("fingerprint")] if evolved else []
        marks += [evaluated["run"].get("fingerprint")] if evaluated else []  # of the repaired one, if it came to that
        for mark in marks:
            if isinstance(mark, str):
                self._lab.ideas.claim_function(number, mark)
        if failed := experiment.read("failed"):
            self._learn_from_failure(experiment, failed)
        elif proposed := evaluated or experiment.read("evolve"):
            self._lab.ideas.claim_name(number, proposed["proposal"]["name"])
        if update is not None and evaluated is not None:
            run = RunRecord.model_validate(evaluated["run"])
            self._lab.remember(experiment.number, proposal_from(evaluated["proposal"]), run, update["gain"])

    def _learn_from_failure(self, experiment: Experiment, failed: dict[str, Any]) -> None:
        """A design that was refused or did not finish counts against its kind; a repeated one, or a fault of ours,
        does not."""
        tried = [attempt for attempt in failed["attempts"] if attempt["kind"] != "repeated"]
        if tried and failed["reason"] != "fault":
            self._lab.remember_failure(experiment.number, proposal_from(tried[-1]["proposal"]))

    def _refresh_ideas(self) -> None:
        """Claims the structures and names of elements that others stored in a shared database since the last look."""
        with self._changed:
            after = self._seen
        while True:
            page = self._lab.ask(partial(self._lab.database.all_elements, after))
            for element in page.elements:
                self._lab.ideas.claim_element(element.name, element.program)
            after = max([after, *(element.index for element in page.elements)])
            if page.next is None:
                break
        with self._changed:
            self._seen = max(self._seen, after)
