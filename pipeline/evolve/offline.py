"""Evolve without an LLM: the designer plans, and structure decides what is new."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.errors import UsageError
from common.records import CheckReport
from pipeline.agents.roles import DesignContext, NoveltyVerdict, Proposal, Relative
from pipeline.designer import Design, Designer, Genome, Source, fingerprint, genome_of
from pipeline.failure import ExperimentFailed

__all__ = ["GENOME_TRUST", "OfflineCodeChecker", "OfflineMotivationChecker", "OfflinePlanner", "proposal_of"]

GENOME_TRUST = "genome"
"""Trust mark of programs that re-render from their genome: the only ones of a run that a plain process may execute."""


def proposal_of(design: Design) -> Proposal:
    """A design as the loop carries it."""
    return Proposal(
        name=design.name,
        motivation=design.motivation,
        program=design.program,
        operator=design.operator,
        change=design.change,
        genome=json.loads(design.genome.to_json()),
        mechanisms=tuple(design.mechanisms),
        slot=design.slot,
        trust=GENOME_TRUST,
    )


def _source(relative: Relative) -> Source:
    return Source(relative.name, relative.program, relative.motivation, relative.score)


@dataclass(frozen=True)
class OfflinePlanner:
    designer: Designer

    def propose(self, context: DesignContext) -> Proposal:
        try:
            design = self.designer.propose(
                parent=_source(context.parent),
                references=[_source(reference) for reference in context.references],
                insights="\n\n".join(f"{paper.insight}\n{paper.guidance}" for paper in context.insights),
                history=context.history,
                avoid=context.taken,
                key=context.key,
            )
        except UsageError as error:
            raise ExperimentFailed("evolve", "exhausted", error.message) from error
        return proposal_of(design)

    def deduplicate(self, context: DesignContext, rejected: Proposal, repeated: Sequence[Relative]) -> Proposal:
        taken = context.taken | {fingerprint(rejected.program)}
        return self.propose(replace(context, taken=taken, key=f"{context.key}/other-than/{rejected.name}"))


@dataclass(frozen=True)
class OfflineMotivationChecker:
    """Repeated is what has the same structure as a neighbour, whatever it is called and however it is argued for.

    Motivations of the designer share their form, so their embeddings rank neighbours but cannot decide alone;
    programs can.
    """

    def judge(self, proposal: Proposal, neighbours: Sequence[Relative]) -> NoveltyVerdict:
        mark = fingerprint(proposal.program)
        same = tuple(other.index for other in neighbours if _fingerprint_or_none(other.program) == mark)
        if same:
            return NoveltyVerdict(True, same, f"the program has the structure of element {', '.join(map(str, same))}")
        text = " ".join(proposal.motivation.split())
        echo = tuple(other.index for other in neighbours if " ".join(other.motivation.split()) == text)
        if echo:
            return NoveltyVerdict(
                True, echo, f"the motivation is that of element {', '.join(map(str, echo))}, word for word"
            )
        return NoveltyVerdict(False, (), f"no structure in common with the {len(neighbours)} nearest motivations")


def _fingerprint_or_none(program: str) -> str | None:
    try:
        return fingerprint(program)
    except UsageError:
        return None


@dataclass(frozen=True)
class OfflineCodeChecker:
    designer: Designer

    def repair(self, proposal: Proposal, report: CheckReport, context: DesignContext, round: int) -> Proposal | None:
        refused = report.why_refused()
        return repaired(self.designer, proposal, refused, context, f"{context.key}/check/{round}")


def repaired(designer: Designer, proposal: Proposal, failure: str, context: DesignContext, key: str) -> Proposal | None:
    """The designer's answer to a failure; None for a program that is not its own, or when nothing is left to change."""
    if proposal.genome is None:
        return None
    design = Design(
        name=proposal.name,
        genome=Genome.from_json(json.dumps(proposal.genome)),
        program=proposal.program,
        motivation=proposal.motivation,
        operator=proposal.operator,
        change=proposal.change,
        mechanisms=proposal.mechanisms,
        fingerprint=fingerprint(proposal.program),
        parent_fingerprint=fingerprint(context.parent.program),
        slot=proposal.slot,
        base=genome_of(context.parent.program),
    )
    answer = designer.repair(design, failure, avoid=context.taken | {design.fingerprint}, key=key)
    return None if answer is None else proposal_of(answer)
