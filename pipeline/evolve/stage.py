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

__all__ = ["Evolved", "claim_structure", "evolve", "program_of"]


@dataclass(frozen=True)
class Evolved:
    """The accepted proposal, its report, the attempts that were turned down, and the wall seconds spent checking."""

    proposal: Proposal
    report: CheckReport
    attempts: list[dict[str, Any]]
    check_seconds: float


def evolve(lab: Lab, who: str, context: DesignContext) -> Evolved:
    """Designs until one is new and passes every check.

    Args:
        who: label of the experiment on the console.

    Raises:
        ExperimentFailed: nothing new, or nothing sound, within the bounds of the settings.
    """
    attempts: list[dict[str, Any]] = []
    proposal: Proposal | None = None
    check_seconds = 0.0
    for round in range(1, lab.settings.evolve.check_attempts + 1):
        lab.checkpoint()
        if proposal is None:
            proposal = _new_design(lab, replace(context, key=f"{context.key}/{round}"), attempts)
        began = time.monotonic()
        report = lab.check(program_of(proposal))
        check_seconds += time.monotonic() - began
        if report.accepted:
            return Evolved(proposal, report, attempts, check_seconds)
        detail = report.why_refused()
        lab.console.line(who, "check", f"refused, {detail}"[:300])
        attempts.append(
            {"kind": "refused", "detail": detail, "proposal": asdict(proposal), "report": report.model_dump()}
        )
        repaired = lab.roles.code_checker.repair(proposal, report, replace(context, taken=lab.ideas.taken()), round)
        proposal = repaired if repaired is not None and claim_structure(lab, context.key, repaired) else None
    raise ExperimentFailed(
        "evolve",
        "refused",
        f"no design passed the checks in {len(attempts)} rounds: {attempts[-1]['detail']}",
        attempts,
    )


def _new_design(lab: Lab, context: DesignContext, attempts: list[dict[str, Any]]) -> Proposal:
    """Planner, novelty check, deduplication: until a design is new to the database and to the other lanes."""
    proposal, mine = _plan(lab, partial(_propose, lab, context), context.key)
    for attempt in range(1, lab.settings.evolve.novelty_attempts + 1):
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
        repeated = [other for other in neighbours if other.index in verdict.repeated_index]
        again = partial(_deduplicate, lab, replace(context, key=f"{context.key}/{attempt}"), proposal, repeated)
        proposal, mine = _plan(lab, again, context.key)
    raise ExperimentFailed(
        "evolve", "repeated", f"{lab.settings.evolve.novelty_attempts} designs, none of them new", attempts
    )


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


def program_of(proposal: Proposal) -> Program:
    """The proposal as training takes it. Trust is decided here, by rendering, never by what the proposal says of
    itself."""
    trusted = proposal.trust == GENOME_TRUST and genome_of(proposal.program) is not None
    return Program(proposal.name, proposal.program, trust=GENOME_TRUST if trusted else None)
