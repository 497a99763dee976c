"""Analyse: explain the result against its relatives, ask the literature about it, and condense both into experience."""

from __future__ import annotations

import json
from dataclasses import asdict

from common.records import RunRecord
from database.models import Element
from pipeline.agents.roles import Analysis, AnalysisSubject, Kin, Proposal
from pipeline.lab import Lab
from pipeline.sample import relative

__all__ = ["analyse", "published_text"]

TITLES = {
    "design_evaluation": "Design evaluation",
    "experimental_results_analysis": "Results",
    "expectation_vs_reality_comparison": "Expectation and reality",
    "theoretical_explanation_with_evidence": "Explanation and evidence",
    "synthesis_and_insights": "Synthesis",
}


def analyse(lab: Lab, proposal: Proposal, run: RunRecord, parent: int | None) -> dict[str, str]:
    """Writes the five fields, asks the cognition base with the results, and summarises.

    Args:
        parent: index of the parent element, None for a root.

    Returns:
        `analysis` (the five fields, concatenated), `cognition` (the cognition base's whole answer as JSON text),
        `summary`.
    """
    subject = AnalysisSubject(proposal, run, lab.baseline, *_relatives(lab, parent))
    fields = lab.roles.analyzer.analyse(subject)
    settings = lab.settings.analyse
    query = fields.experimental_results_analysis
    found = lab.ask(lambda: lab.cognition.search(query, settings.cognition_k, settings.cognition_threshold))
    answer = {"query": query, "total_results": len(found), "results": [insight.model_dump() for insight in found]}
    analysis, cognition = published_text(fields), json.dumps(answer, ensure_ascii=False)
    lab.checkpoint()
    return {
        "analysis": analysis,
        "cognition": cognition,
        "summary": lab.roles.summarizer.summarise(proposal.motivation, analysis, cognition),
    }


def published_text(fields: Analysis) -> str:
    """The five fields as one text, each under its title: the form in which `analysis` is stored."""
    return "\n\n".join(f"## {TITLES[name]}\n{text}" for name, text in asdict(fields).items())


def _relatives(lab: Lab, parent: int | None) -> tuple[Kin | None, Kin | None, tuple[Kin, ...]]:
    if parent is None:
        return None, None, ()
    context = lab.ask(lambda: lab.database.context(parent))
    direct = lab.ask(lambda: lab.database.element(parent))
    if direct is None:
        return None, None, ()
    siblings = tuple(_kin(lab, element) for element in (context.strongest_siblings if context else ()))
    grandparent = context.grandparent if context else None
    return _kin(lab, direct), _kin(lab, grandparent) if grandparent else None, siblings


def _kin(lab: Lab, element: Element) -> Kin:
    runs = lab.ask(lambda: lab.database.runs(element.index))
    return Kin(relative(element), runs[-1] if runs else None)
