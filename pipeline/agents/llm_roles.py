"""The roles of the loop over a language model: one class a role, one prompt file each.

Programs come back whole, in a structured answer: weak models call no tools, and an answer that arrived is no proof that
the program changed. What a model hands in is compared by hash with what it was shown, and one that is unchanged, or no
Python, is sent back once. A model that gives no usable answer ends the experiment, or leaves the role to its offline
counterpart; an endpoint that fails raises LLMError, which stops the loop.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field

from common.files import sha256_text
from common.llm import LLM, NoUsableAnswerError, open_llm
from common.records import CheckReport, RunRecord
from common.settings import Settings
from pipeline.agents import llm_texts as texts
from pipeline.agents.roles import (
    Analysis,
    AnalysisSubject,
    Analyzer,
    DesignContext,
    NoveltyVerdict,
    Proposal,
    Relative,
    Roles,
    Summarizer,
)
from pipeline.analyse.offline import OfflineAnalyzer, OfflineSummarizer
from pipeline.failure import ExperimentFailed
from pipeline.prompts import fenced, render

__all__ = [
    "LLMAnalyzer",
    "LLMCodeChecker",
    "LLMDebugger",
    "LLMMotivationChecker",
    "LLMPlanner",
    "LLMSummarizer",
    "forced_name",
    "llm_roles",
    "roles_over",
]

LONGEST_NAME = 60
LONGEST_PROGRAM = 60_000
PREFIX = "delta_net_"


# The order of the fields is the order in which a model writes them: reasons before programs and verdicts.


class DesignAnswer(BaseModel):
    name: str = Field(min_length=1, max_length=100, description="delta_net_ and two to five words, a-z, 0-9 and _ only")
    motivation: str = Field(
        min_length=1, max_length=6_000, description="what changes, its equation, why, what to expect"
    )
    change: str = Field(min_length=1, max_length=500, description="one sentence: what differs from the parent")
    program: str = Field(min_length=1, max_length=LONGEST_PROGRAM, description="the complete new Python file")


class RepairAnswer(BaseModel):
    changes_made: str = Field(max_length=2_000, description="the cause and what was changed")
    fixed: bool = Field(description="false to give the design up")
    program: str = Field(max_length=LONGEST_PROGRAM, description="the complete corrected Python file")


class NoveltyAnswer(BaseModel):
    judgement_reason: str = Field(min_length=1, max_length=2_000, description="two or three sentences")
    is_repeated: bool = Field(description="whether the design repeats an earlier one")
    repeated_index: list[int] = Field(max_length=20, description="indices of the designs it repeats, from the list")


class AnalysisAnswer(BaseModel):
    design_evaluation: str = Field(min_length=1, max_length=4_000)
    experimental_results_analysis: str = Field(min_length=1, max_length=4_000)
    expectation_vs_reality_comparison: str = Field(min_length=1, max_length=4_000)
    theoretical_explanation_with_evidence: str = Field(min_length=1, max_length=4_000)
    synthesis_and_insights: str = Field(min_length=1, max_length=4_000)


class ExperienceAnswer(BaseModel):
    experience: str = Field(min_length=1, max_length=4_000, description="80 to 180 words")


def llm_roles(settings: Settings, logs: Path) -> Roles:
    """The roles over the endpoint that `settings.llm` names; every call is recorded in `logs`/llm.jsonl.

    Raises:
        SettingsError: the endpoint's settings are impossible.
    """
    return roles_over(open_llm(settings.llm, logs / "llm.jsonl"), settings.llm.context_chars)


def roles_over(llm: LLM, context_chars: int = 120_000) -> Roles:
    """The roles over any model.

    Args:
        context_chars: longest prompt of the planner; programs of references are left out to keep it.
    """
    return Roles(
        planner=LLMPlanner(llm, context_chars),
        motivation_checker=LLMMotivationChecker(llm),
        code_checker=LLMCodeChecker(llm),
        debugger=LLMDebugger(llm),
        analyzer=LLMAnalyzer(llm, OfflineAnalyzer()),
        summarizer=LLMSummarizer(llm, OfflineSummarizer()),
        close=llm.close,
    )


@dataclass(frozen=True)
class LLMPlanner:
    llm: LLM
    context_chars: int = 120_000

    def propose(self, context: DesignContext) -> Proposal:
        """A new design.

        Raises:
            ExperimentFailed: the model gave no usable answer, or the parent's program twice.
            LLMError: the endpoint failed.
        """
        parent = context.parent
        known = {
            "parent_name": parent.name,
            "parent_score": texts.score(parent),
            "parent_motivation": texts.text(parent.motivation),
            "parent_program": texts.program(parent.program),
            "parent_train": texts.table(parent.train_csv),
            "parent_test": texts.table(parent.test_csv),
            "parent_summary": texts.text(parent.summary),
            "insights": texts.insights(context.insights),
        }
        room = self.context_chars - len(render("planner", references="", **known)) - len(render("system_design"))
        question = render("planner", references=texts.references(context.references, room), **known)
        return self._design("planner", question, context)

    def deduplicate(self, context: DesignContext, rejected: Proposal, repeated: Sequence[Relative]) -> Proposal:
        """A design orthogonal to `repeated`, from the parent's original program. Raises like `propose`."""
        question = render(
            "deduplication",
            parent_name=context.parent.name,
            parent_program=texts.program(context.parent.program),
            parent_summary=texts.text(context.parent.summary),
            rejected_name=rejected.name,
            rejected_motivation=texts.text(rejected.motivation),
            repeated=texts.neighbours(repeated),
            insights=texts.insights(context.insights),
        )
        return self._design("deduplication", question, context)

    def _design(self, role: str, question: str, context: DesignContext) -> Proposal:
        try:
            answer = _with_program(self.llm, role, question, DesignAnswer, context.parent.program)
        except NoUsableAnswerError as error:
            raise ExperimentFailed("evolve", "unusable", error.message) from error
        if answer is None:
            raise ExperimentFailed("evolve", "unchanged", f"{role}: the parent's program came back twice")
        taken = {context.parent.name, *(reference.name for reference in context.references)}
        return Proposal(
            name=forced_name(answer.name, answer.program, taken),
            motivation=answer.motivation.strip(),
            program=answer.program,
            operator="llm" if role == "planner" else f"llm {role}",
            change=" ".join(answer.change.split()),
        )


@dataclass(frozen=True)
class LLMMotivationChecker:
    llm: LLM

    def judge(self, proposal: Proposal, neighbours: Sequence[Relative]) -> NoveltyVerdict:
        """Whether `proposal` repeats one of `neighbours`; without neighbours nothing is asked.

        Raises:
            LLMError: the endpoint failed.
        """
        if not neighbours:
            return NoveltyVerdict(False, (), "there is no earlier design to repeat")
        question = render(
            "motivation_checker",
            name=proposal.name,
            motivation=texts.text(proposal.motivation),
            change=texts.clip(proposal.change, 500),
            neighbours=texts.neighbours(neighbours),
        )
        try:
            answer = self.llm.ask("motivation_checker", question, NoveltyAnswer, render("system_judge"))
        except NoUsableAnswerError as error:
            return NoveltyVerdict(False, (), f"not judged: {error.message}")
        known = [neighbour.index for neighbour in neighbours]
        named = tuple(index for index in known if index in answer.repeated_index)
        # A model that finds a repetition but names none that was shown means those that were shown.
        repeated = named or tuple(known) if answer.is_repeated else ()
        return NoveltyVerdict(answer.is_repeated, repeated, answer.judgement_reason.strip())


@dataclass(frozen=True)
class LLMCodeChecker:
    llm: LLM

    def repair(self, proposal: Proposal, report: CheckReport, context: DesignContext, round: int) -> Proposal | None:
        """A repaired program, or None when the model gives up or changes nothing. Raises LLMError."""
        warned = [check for check in report.checks if not check.passed and check.severity == "warn"]
        question = render(
            "code_checker",
            name=proposal.name,
            motivation=texts.text(proposal.motivation),
            failures=texts.failures(report.refusals()),
            warnings="; ".join(f"{check.name}: {texts.clip(check.detail, 500)}" for check in warned) or "none",
            facts=texts.clip(", ".join(f"{key} {value}" for key, value in report.facts.items()), 1_000) or "none",
            round=str(round),
            program=texts.program(proposal.program),
        )
        return _repaired(self.llm, "code_checker", question, proposal)


@dataclass(frozen=True)
class LLMDebugger:
    llm: LLM

    def repair(
        self, proposal: Proposal, run: RunRecord, error_tail: str, context: DesignContext, attempt: int
    ) -> Proposal | None:
        """A repaired program, or None when the model gives up or changes nothing. Raises LLMError."""
        question = render(
            "debugger",
            name=proposal.name,
            motivation=texts.text(proposal.motivation),
            status=f"{run.status} ({run.reason or 'no reason given'})",
            detail=texts.clip(run.detail, 1_000) or "no detail",
            losses=texts.losses([(proposal.name, run)]),
            error_tail=fenced(texts.tail(error_tail) or "(empty)"),
            attempt=str(attempt),
            program=texts.program(proposal.program),
        )
        return _repaired(self.llm, "debugger", question, proposal)


@dataclass(frozen=True)
class LLMAnalyzer:
    """Falls back to `offline` when the model gives no usable answer, and says so: a trained run is not thrown away."""

    llm: LLM
    offline: Analyzer

    def analyse(self, subject: AnalysisSubject) -> Analysis:
        """Raises LLMError when the endpoint fails."""
        proposal = subject.proposal
        family = [texts.kin("Parent", subject.parent), texts.kin("Grandparent", subject.grandparent)]
        family += [texts.kin("Sibling", sibling) for sibling in subject.siblings]
        question = render(
            "analyzer",
            name=proposal.name,
            motivation=texts.text(proposal.motivation),
            change=texts.clip(proposal.change, 500) or "nothing stated",
            program=texts.program(proposal.program),
            results=texts.measurements(subject),
            losses=texts.loss_curves(subject),
            relatives="\n\n".join(family),
        )
        try:
            answer = self.llm.ask("analyzer", question, AnalysisAnswer, render("system_judge"))
        except NoUsableAnswerError as error:
            computed = self.offline.analyse(subject)
            note = f"(Computed from the numbers: the language model failed. {error.message[:300]})"
            return replace(computed, design_evaluation=f"{note} {computed.design_evaluation}")
        return Analysis(**{key: value.strip() for key, value in answer.model_dump().items()})


@dataclass(frozen=True)
class LLMSummarizer:
    """Falls back to `offline` when the model gives no usable answer."""

    llm: LLM
    offline: Summarizer

    def summarise(self, motivation: str, analysis: str, cognition: str) -> str:
        """Raises LLMError when the endpoint fails."""
        question = render(
            "summarizer",
            motivation=texts.text(motivation),
            analysis=texts.text(analysis, 20_000),
            cognition=texts.text(cognition, 12_000),
        )
        try:
            answer = self.llm.ask("summarizer", question, ExperienceAnswer, render("system_judge"))
        except NoUsableAnswerError:
            return self.offline.summarise(motivation, analysis, cognition)
        return answer.experience.strip()


def forced_name(name: str, program: str, taken: Sequence[str] | set[str] | frozenset[str] = ()) -> str:
    """`name` in the form delta_net_[a-z0-9_]+, at most 60 characters; told apart by the program where it is taken."""
    words = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    words = re.sub(r"^delta_?net_?", "", words)
    digest = sha256_text(program)[:8]
    result = PREFIX + (words[: LONGEST_NAME - len(PREFIX)].strip("_") or digest)
    if result not in taken:
        return result
    return f"{result[: LONGEST_NAME - len(digest) - 1].rstrip('_')}_{digest}"


WithProgram = TypeVar("WithProgram", DesignAnswer, RepairAnswer)


def _with_program(llm: LLM, role: str, question: str, output: type[WithProgram], shown: str) -> WithProgram | None:
    """An answer whose program differs from `shown` (or that gives up); None when it came back unchanged twice."""
    system = render("system_design")
    answer = _cleaned(llm.ask(role, question, output, system))
    complaint = _complaint(answer, shown)
    if complaint:
        again = render("again", question=question, complaint=complaint)
        answer = _cleaned(llm.ask(role, again, output, system))
    return None if not _gives_up(answer) and _same(answer.program, shown) else answer


def _repaired(llm: LLM, role: str, question: str, proposal: Proposal) -> Proposal | None:
    try:
        answer = _with_program(llm, role, question, RepairAnswer, proposal.program)
    except NoUsableAnswerError:
        return None
    if answer is None or _gives_up(answer):
        return None
    # What a model rewrote no longer renders from its genome, and nothing vouches for it.
    return replace(proposal, program=answer.program, genome=None, trust=None)


def _gives_up(answer: DesignAnswer | RepairAnswer) -> bool:
    return isinstance(answer, RepairAnswer) and not answer.fixed


def _complaint(answer: DesignAnswer | RepairAnswer, shown: str) -> str:
    """Why the program cannot be used as it is; empty when it can, or when the model gave up."""
    if _gives_up(answer):
        return ""
    if _same(answer.program, shown):
        return "The program handed in is the one that was shown, without any change."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(answer.program)
    except SyntaxError as error:
        return f"The program handed in is not valid Python: line {error.lineno}: {error.msg}."
    except (ValueError, RecursionError, MemoryError) as error:
        return f"The program handed in is not valid Python: {type(error).__name__}."
    if not any(isinstance(node, ast.ClassDef) and node.name == "DeltaNet" for node in tree.body):
        return "The program handed in defines no class DeltaNet; an excerpt is not enough."
    return ""


def _cleaned(answer: WithProgram) -> WithProgram:
    """The answer with its program freed of a Markdown fence around it, and ended by a line break."""
    content = answer.program.replace("\r\n", "\n").strip("\n")
    match = re.fullmatch(r"\s*(`{3,})[a-zA-Z]*\n(.*)\n\1\s*", content, re.DOTALL)
    content = (match[2] if match else content).strip("\n")
    return answer.model_copy(update={"program": f"{content}\n" if content else ""})


def _same(program: str, other: str) -> bool:
    return _digest(program) == _digest(other)


def _digest(program: str) -> str:
    """Hash of a program without trailing blanks, which models add and drop at will."""
    return sha256_text("\n".join(line.rstrip() for line in program.strip().splitlines()))
