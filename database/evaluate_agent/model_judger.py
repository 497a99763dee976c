"""The Model Judger over a language model: what it is asked, and what of its answer is kept.

Program and motivation are written by other models and are hostile until proven otherwise: they stand between fences and
are cut to a length. So is the answer: three integers from 1 to 10 and a bounded text, or it is asked again; a weighted
value of its own is not asked for and would not be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field

from common.knobs import Llm
from common.llm import LLM, open_llm
from common.prompts import clip, fenced, load
from common.records import Baseline, Measurement
from database.evaluate_agent.score import Evidence, basis
from database.evaluate_agent.verdict import LONGEST_REASON, Verdict
from database.models import Element

__all__ = ["ROLE", "ModelJudger", "Subject", "open_judger"]

ROLE = "model_judger"
_FOLDER = Path(__file__).resolve().parent
_LONGEST_MOTIVATION = 6_000
_SHORTEST_PROGRAM = 2_000


# The reason comes first: a model writes fields in their order, and scores are to follow from it.
class _Answer(BaseModel):
    judgement_reason: str = Field(min_length=1, max_length=LONGEST_REASON, description="three to five sentences")
    performance_score: int = Field(ge=1, le=10, description="against the baseline")
    innovation_score: int = Field(ge=1, le=10, description="of the mechanism that the program computes")
    complexity_score: int = Field(ge=1, le=10, description="in the length of the sequence")


@dataclass(frozen=True)
class Subject:
    """A stored element and what it is held against."""

    element: Element
    evidence: Evidence
    baseline: Baseline


@dataclass(frozen=True)
class ModelJudger:
    """Args:
    model: name of the model, which goes into every verdict.
    context_chars: longest question; the program is cut to keep it.
    """

    llm: LLM
    model: str
    context_chars: int = 120_000

    def judge(self, subject: Subject) -> Verdict:
        """Asks once; the backend waits and repeats as it is set to.

        Raises:
            NoUsableAnswerError: no answer of the asked form came.
            LLMError: the endpoint failed, or the judger was closed.
        """
        answer = self.llm.ask(ROLE, self._question(subject), _Answer, load(_FOLDER, "model_judger_system").render())
        return Verdict(
            model=self.model,
            basis=basis(subject.evidence, subject.baseline, self.model),
            performance_score=answer.performance_score,
            innovation_score=answer.innovation_score,
            complexity_score=answer.complexity_score,
            reason=answer.judgement_reason.strip(),
        )

    def close(self) -> None:
        """Ends the questions under way."""
        self.llm.close()

    def _question(self, subject: Subject) -> str:
        element, template = subject.element, load(_FOLDER, ROLE)
        known = {
            "name": fenced(clip(element.name, 200)),
            "motivation": fenced(clip(element.motivation, _LONGEST_MOTIVATION)),
            "results": _results(subject),
            "complexity": _complexity(subject),
            "novelty": _novelty(subject.evidence),
        }
        room = max(_SHORTEST_PROGRAM, self.context_chars - len(template.render(program="", **known)))
        return template.render(program=fenced(clip(element.program, room), "python"), **known)


def open_judger(settings: Llm, log: Path | None, *secrets: str) -> ModelJudger:
    """The judger over the endpoint that `settings` names; its calls go to the JSONL file `log`.

    Raises:
        SettingsError: the endpoint's settings are impossible.
    """
    # Whoever chooses the judge chooses the endpoint, whatever the loop's roles ask.
    llm = open_llm(settings.model_copy(update={"backend": "openai"}), log, secrets)
    return ModelJudger(llm, settings.model, settings.context_chars)


def _results(subject: Subject) -> str:
    evidence, baseline = subject.evidence, subject.baseline
    loss = _measured("Loss (lower is better)", evidence.loss, baseline.loss, baseline.loss_sd)
    mean = _measured("Benchmark mean", evidence.benchmark, baseline.benchmark, baseline.benchmark_sd)
    return f"{loss}\n{mean}"


def _measured(what: str, value: Measurement | None, base: float | None, sd: float | None) -> str:
    if value is None or base is None:
        return f"- {what}: not measured"
    spread = "its spread between training seeds is not known" if sd is None else f"SD {sd:.3g}"
    change = f"{100 * (value.value - base) / base:+.2f} %" if base else f"{value.value:+.5g}"
    return f"- {what}: {value.value:.5g}, baseline {base:.5g} ({spread}): {change}"


def _complexity(subject: Subject) -> str:
    evidence, base = subject.evidence, subject.baseline.flops_per_token
    if evidence.work_exponent is None:
        return "Its work was not counted: read it off the program."
    said = f"Counted work grows as length to the power {evidence.work_exponent:.2f}."
    if evidence.flops_per_token is None or not base:
        return said
    return f"{said} At the training length it takes {evidence.flops_per_token / base:.2f} times the baseline's FLOPs."


def _novelty(evidence: Evidence) -> str:
    found = evidence.novelty
    if found is None or (found.motivation is None and found.program is None):
        return "Nothing earlier is stored."
    said = []
    if found.motivation is not None:
        said.append(f"Motivation: {found.motivation:.2f} (0 a copy, 1 unrelated; 1 - cosine).")
    if found.program is not None:
        said.append(f"Program: {found.program:.2f} (0 a copy, 1 nothing in common; 1 - shared shingles).")
    return " ".join(said)
