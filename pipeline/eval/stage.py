"""Evaluate: train and benchmark the accepted program; a run that fails goes to the debugger, three attempts at most."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.records import CheckReport, RunRecord
from pipeline.agents.roles import DesignContext, Proposal
from pipeline.evolve.stage import claim_structure, named, program_of, repeats
from pipeline.failure import ExperimentFailed
from pipeline.lab import Lab
from training.baseline import candidate_threshold, recount
from training.launcher import peer_of
from training.programs import Program
from training.results import element_result, finished_run

__all__ = ["Evaluated", "evaluate", "log_of"]

REPAIRABLE = frozenset({"crashed", "timeout", "memory", "diverged", "nan", "slow", "stalled"})
"""Endings that a changed program may cure. A leak or a forged number ends the experiment."""


@dataclass(frozen=True)
class Evaluated:
    """What was trained and how it went.

    Attributes:
        proposal: the one that finished: the repaired one, if it came to that.
        result: its train and test rows in the published form.
        log: the end of what the job printed.
    """

    proposal: Proposal
    run: RunRecord
    result: dict[str, str]
    log: str


def evaluate(
    lab: Lab,
    who: str,
    folder: Path,
    proposal: Proposal,
    report: CheckReport,
    context: DesignContext,
    attempts: list[dict[str, Any]],
) -> Evaluated:
    """Trains and scores `proposal` in `folder`/attempt-N, repairing it between attempts.

    Args:
        attempts: runs that fail are added here.

    Raises:
        ExperimentFailed: no attempt finished.
        JobError: a job failed twice through no fault of the program.
    """
    for attempt in range(1, lab.settings.evolve.debug_attempts + 1):
        lab.checkpoint()
        out = folder / f"attempt-{attempt}"
        program = program_of(proposal)
        run = finished_run(
            out, program_sha256=program.sha256, baseline_key=lab.baseline.key, seed=lab.settings.run.seed
        ) or lab.job(partial(_train, lab, who, program, report, out, context.key))
        lab.console.done(who)
        if run.status == "finished":
            finished = _with_design(recount(run, lab.baseline.tasks), proposal)
            return Evaluated(proposal, finished, element_result(finished), log_of(out))
        attempts.append(
            {"kind": run.reason, "detail": run.detail, "proposal": asdict(proposal), "run": run.model_dump()}
        )
        lab.console.line(who, "train", f"{run.status}, {run.reason}: {run.detail}"[:300])
        if run.reason not in REPAIRABLE or attempt == lab.settings.evolve.debug_attempts:
            break
        repaired = _repair(lab, who, proposal, run, out, context, attempts, attempt)
        if repaired is None:
            break
        proposal, report = repaired
    raise ExperimentFailed("evaluate", str(run.reason), run.detail)


def _train(lab: Lab, who: str, program: Program, report: CheckReport, out: Path, key: str) -> RunRecord:
    return lab.launcher.train(
        program,
        seed=lab.settings.run.seed,
        out=out,
        run_id=f"{key}/{out.name}",
        checks=report,
        peers=[peer_of(other) for other in lab.finished_runs()],
        counted_tasks=lab.baseline.tasks,
        on_event=lambda event: lab.console.progress(who, event),
        cancel=lab.cancelled,
        keep=True,
        threshold=candidate_threshold(lab.baseline),
        foreign="discard",  # of an attempt that was repaired in another way before a kill
    )


def _repair(
    lab: Lab,
    who: str,
    proposal: Proposal,
    run: RunRecord,
    out: Path,
    context: DesignContext,
    attempts: list[dict[str, Any]],
    attempt: int,
) -> tuple[Proposal, CheckReport] | None:
    """The debugger's answer, once it is new and has passed the checks: nothing unproven or known is trained.

    One that computes what a known design computes uses up an attempt, and the debugger is asked for another.
    """
    for number in range(attempt, lab.settings.evolve.debug_attempts):
        lab.checkpoint()
        asked = replace(context, taken=lab.ideas.taken())
        repaired = lab.roles.debugger.repair(proposal, run, log_of(out), asked, number)
        if repaired is None or not claim_structure(lab, context.key, repaired):
            return None
        repaired = named(lab, context.key, repaired)
        report = lab.check(program_of(repaired))
        if not report.accepted:
            return None
        if not repeats(lab, who, context, repaired, report, attempts):
            return repaired, report
    return None


def _with_design(run: RunRecord, proposal: Proposal) -> RunRecord:
    design = {
        "operator": proposal.operator,
        "change": proposal.change,
        "genome": proposal.genome,
        "mechanisms": list(proposal.mechanisms),
    }
    return run.model_copy(update={"design": design})


def log_of(out: Path) -> str:
    """The end of what the job in `out` printed, "" when it printed nothing."""
    log = out / "stderr.log"
    return log.read_text(encoding="utf-8", errors="replace")[-4000:] if log.exists() else ""
