"""The roles of the loop as Protocols, and the plain data that passes between them.

Each role has an offline implementation, which needs no model, and one over an LLM. The loop knows only what stands
here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from common.records import Baseline, CheckReport, RunRecord

__all__ = [
    "Analysis",
    "AnalysisSubject",
    "Analyzer",
    "CodeChecker",
    "Debugger",
    "DesignContext",
    "Kin",
    "MotivationChecker",
    "NoveltyVerdict",
    "Paper",
    "Planner",
    "Proposal",
    "Relative",
    "Roles",
    "Summarizer",
]


@dataclass(frozen=True)
class Relative:
    """A stored architecture as a role sees it. CSVs have a header row and one data row."""

    name: str
    program: str
    motivation: str
    train_csv: str
    test_csv: str
    summary: str
    score: float | None
    index: int


@dataclass(frozen=True)
class Paper:
    """One answer of the cognition base."""

    paper_key: str
    insight: str
    guidance: str


@dataclass(frozen=True)
class DesignContext:
    """What the planner sees.

    Args:
        history: outcomes of earlier designs (`pipeline.designer.Outcome`), oldest first.
        key: names the attempt: the same key and context give the same offline design.
        taken: structural fingerprints of every design that is stored or under way.
    """

    parent: Relative
    references: tuple[Relative, ...]
    insights: tuple[Paper, ...]
    history: tuple[Any, ...]
    key: str
    taken: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Proposal:
    """A program that may be checked and trained, and why it might be better than its parent.

    Args:
        operator: how it came about: the designer's operator, or "llm".
        change: what differs from the parent, in one sentence.
        genome: the designer's description, from which the program re-renders; None for any other program.
        slot: the slots of the grammar that differ from the parent, joined by "+"; "" for any other program.
        trust: why a plain process may run it; None where it may not.
    """

    name: str
    motivation: str
    program: str
    operator: str
    change: str
    genome: dict[str, Any] | None = None
    mechanisms: tuple[str, ...] = ()
    slot: str = ""
    trust: str | None = None


@dataclass(frozen=True)
class NoveltyVerdict:
    is_repeated: bool
    repeated_index: tuple[int, ...]
    judgement_reason: str


@dataclass(frozen=True)
class Kin:
    """A relative with its run record, None where only the published fields are known."""

    element: Relative
    run: RunRecord | None = None


@dataclass(frozen=True)
class AnalysisSubject:
    proposal: Proposal
    run: RunRecord
    baseline: Baseline
    parent: Kin | None = None
    grandparent: Kin | None = None
    siblings: tuple[Kin, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """The five published fields."""

    design_evaluation: str
    experimental_results_analysis: str
    expectation_vs_reality_comparison: str
    theoretical_explanation_with_evidence: str
    synthesis_and_insights: str


class Planner(Protocol):
    def propose(self, context: DesignContext) -> Proposal: ...

    def deduplicate(self, context: DesignContext, rejected: Proposal, repeated: Sequence[Relative]) -> Proposal: ...


class MotivationChecker(Protocol):
    def judge(self, proposal: Proposal, neighbours: Sequence[Relative]) -> NoveltyVerdict: ...


class CodeChecker(Protocol):
    def repair(self, proposal: Proposal, report: CheckReport, context: DesignContext, round: int) -> Proposal | None:
        """Answers a refusal of the verifier with a changed program; None gives the design up."""


class Debugger(Protocol):
    def repair(
        self, proposal: Proposal, run: RunRecord, error_tail: str, context: DesignContext, attempt: int
    ) -> Proposal | None:
        """Answers a failed run with a changed program; None gives the design up."""


class Analyzer(Protocol):
    def analyse(self, subject: AnalysisSubject) -> Analysis: ...


class Summarizer(Protocol):
    def summarise(self, motivation: str, analysis: str, cognition: str) -> str:
        """The experience: what a later designer should know of this experiment."""


def _nothing_to_close() -> None:
    return None


@dataclass
class Roles:
    """One of each role. `close` ends calls that are under way, so that Ctrl-C need not wait for a slow model."""

    planner: Planner
    motivation_checker: MotivationChecker
    code_checker: CodeChecker
    debugger: Debugger
    analyzer: Analyzer
    summarizer: Summarizer
    close: Callable[[], None] = _nothing_to_close
