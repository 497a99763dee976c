"""Evolve: plan a design, make sure that it is new, and check it by running it, with repairs, before anything is
trained."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from common.records import CheckReport
from pipeline.agents.roles import DesignContext, Proposal, Relative
from pipeline.designer import genome_of
from pipeline.evolve.offline import GENOME_TRUST
from pipeline.failure import ExperimentFailed
from pipeline.lab import Lab
from pipeline.sample import relative
from training.programs import Program

__all__ = ["Evolved", "claim_structure", "evolve", "named", "program_of", "repeats"]


@dataclass(frozen=True)
class Evolved:
    """The accepted proposal, its report, and the wall seconds spent checking."""

    proposal: Proposal
    report: CheckReport
    check_seconds: float


def evolve(lab: Lab, who: str, context: DesignContext, attempts: list[dict[str, Any]]) -> Evolved:
    """Designs until one is new and passes every check.

    Args:
        who: label of the experiment on the console.
        attempts: what is turned down is added here.

    Raises:
        ExperimentFailed: nothing new, or nothing sound, within the bounds of the settings.
        JobError: the verifier failed twice through no fault of the design.
    """
    proposal: Proposal | None = None
    check_seconds, reason, detail = 0.0, "repeated", ""
    last = lab.settings.evolve.check_attempts
    for number in range(1, last + 1):
        lab.checkpoint()
        if proposal is None:
            proposal = _new_design(lab, replace(context, key=f"{context.key}/{number}"), attempts)
        proposal = named(lab, context.key, proposal)
        began = time.monotonic()
        report = lab.check(program_of(proposal))
        seconds = time.monotonic() - began
        check_seconds += seconds
        if report.accepted:
            if not repeats(lab, who, context, proposal, report, attempts):
                return Evolved(proposal, report, check_seconds)
            detail, proposal = attempts[-1]["detail"], None
            continue
        reason, detail = "refused", report.why_refused()
        lab.console.line(who, "check", f"refused, {detail}"[:300])
        refused = {"kind": "refused", "detail": detail, "proposal": asdict(proposal), "report": report.model_dump()}
        attempts.append({**refused, "seconds": round(seconds, 3)})
        if number < last:
            proposal = _repair(lab, proposal, report, context, number)
    raise ExperimentFailed("evolve", reason, f"no new design passed the checks in {last} rounds: {detail}")


def repeats(
    lab: Lab, who: str, context: DesignContext, proposal: Proposal, report: CheckReport, attempts: list[dict[str, Any]]
) -> bool:
    """Whether an accepted proposal computes what a known design computes; if so, that is told and added to
    `attempts`."""
    twin = lab.twin(context.key.split("/")[0], report)
    if twin is None:
        return False
    detail = f"it computes what {twin} computes, in other words"
    lab.console.line(who, "check", f"not new, {detail}")
    attempts.append({"kind": "repeated", "detail": detail, "proposal": asdict(proposal)})
    return True


def _repair(lab: Lab, proposal: Proposal, report: CheckReport, context: DesignContext, round: int) -> Proposal | None:
    """The code checker's answer to a refusal, None when it gives up or repeats a design."""
    repaired = lab.roles.code_checker.repair(proposal, report, replace(context, taken=lab.ideas.taken()), round)
    return repaired if repaired is not None and claim_structure(lab, context.key, repaired) else None


def _new_design(lab: Lab, context: DesignContext, attempts: list[dict[str, Any]]) -> Proposal:
    """Planner, novelty check, deduplication: until a design is new to the database and to the other lanes."""
    last = lab.settings.evolve.novelty_attempts
    proposal, mine = _plan(lab, partial(_propose, lab, context), context.key)
    for attempt in range(1, last + 1):
        lab.checkpoint()
        similar = partial(lab.database.search_similar, proposal.motivation, lab.settings.evolve.neighbours)
        neighbours = [relative(element) for element in lab.ask(similar)]
        verdict = lab.roles.motivation_checker.judge(proposal, neighbours)
        if mine and not verdict.is_repeated:
            return proposal
        reason = (
            verdict.judgement_reason if verdict.is_repeated else "another design of this run has the same structure"
        )
        attempts.append({"kind": "repeated", "detail": reason, "proposal": asdict(proposal)})
        if attempt == last:
            break
        repeated = [other for other in neighbours if other.index in verdict.repeated_index]
        again = partial(_deduplicate, lab, replace(context, key=f"{context.key}/{attempt}"), proposal, repeated)
        proposal, mine = _plan(lab, again, context.key)
    raise ExperimentFailed("evolve", "repeated", f"{last} designs, none of them new")


def _propose(lab: Lab, context: DesignContext) -> Proposal:
    return lab.roles.planner.propose(replace(context, taken=lab.ideas.taken()))


def _deduplicate(lab: Lab, context: DesignContext, rejected: Proposal, repeated: list[Relative]) -> Proposal:
    return lab.roles.planner.deduplicate(replace(context, taken=lab.ideas.taken()), rejected, repeated)


def _plan(lab: Lab, plan: Callable[[], Proposal], key: str) -> tuple[Proposal, bool]:
    """A proposal, and whether its structure could be reserved.

    The designer takes milliseconds and looks at what is taken, so its lanes plan one after the other; an LLM's do
    not wait.
    """
    with lab.planning if lab.settings.llm.backend == "offline" else contextlib.nullcontext():
        proposal = plan()
        return proposal, claim_structure(lab, key, proposal)


def claim_structure(lab: Lab, key: str, proposal: Proposal) -> bool:
    """Reserves the structure of a proposal for its experiment, whose number `key` begins with."""
    return lab.ideas.claim(key.split("/")[0], proposal.program)


def named(lab: Lab, key: str, proposal: Proposal) -> Proposal:
    """The proposal under a name that is its experiment's own from now on: of its runs, its rows and its element."""
    return replace(proposal, name=lab.ideas.claim_name(key.split("/")[0], proposal.name))


def program_of(proposal: Proposal) -> Program:
    """The proposal as training takes it. Trust is decided here, by rendering, never by what the proposal says of
    itself."""
    trusted = proposal.trust == GENOME_TRUST and genome_of(proposal.program) is not None
    return Program(proposal.name, proposal.program, trust=GENOME_TRUST if trusted else None)
