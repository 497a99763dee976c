"""Building what the planner sees from the database's answer: the parent, the references, and what is known about
them."""

from __future__ import annotations

import json
import random
from functools import partial

from common.errors import StoreError
from database.models import Element, ScoredElement
from pipeline.agents.roles import DesignContext, Paper, Relative
from pipeline.lab import Lab
from pipeline.sample.policies import POLICIES, Selection

__all__ = ["build_context", "papers_of", "relative", "sample"]


def sample(lab: Lab, rng: random.Random) -> Selection[int]:
    """Chooses parent and reference indices from the candidate set by the configured policy."""
    ranked = [element.index for element in lab.ask(lab.database.candidates)]
    if not ranked:
        raise StoreError(
            f"the candidate set of {lab.database.url} is empty: there is no parent to evolve",
            "run the same command again, which makes the roots candidates, or POST /candidates/rebuild-from-scored",
        )
    return POLICIES[lab.settings.sample.policy](lab.settings.sample).choose(ranked, rng)


def build_context(lab: Lab, parent: int, references: list[int], key: str) -> DesignContext:
    """Fetches the elements and makes them the planner's context.

    A reference that has been deleted meanwhile is left out; a deleted parent is an error of the store.
    """
    found = [lab.ask(partial(lab.database.scored, index)) for index in (parent, *references)]
    head, *others = found
    if head is None:
        raise StoreError(
            f"element {parent}, chosen as parent, is no longer in the database", "run the same command again"
        )
    return DesignContext(
        parent=relative(head),
        references=tuple(relative(element) for element in others if element is not None),
        insights=papers_of(head.cognition),
        history=lab.history(),
        key=key,
        taken=lab.ideas.taken(),
    )


def relative(element: Element) -> Relative:
    """A stored element as a role sees it. `summary` is the experience when there is one."""
    return Relative(
        name=element.name,
        program=element.program,
        motivation=element.motivation,
        train_csv=element.result.train,
        test_csv=element.result.test,
        summary=element.summary,
        score=element.score if isinstance(element, ScoredElement) else None,
        index=element.index,
    )


def papers_of(cognition: str) -> tuple[Paper, ...]:
    """The papers in an element's `cognition`; elements of other systems hold free text, which is passed on as one."""
    try:
        answer = json.loads(cognition)
        return tuple(
            Paper(
                str(item["paper_key"]),
                str(item["DESIGN_INSIGHT"]),
                f"{item['ALGORITHMIC_INNOVATION']}\n{item['IMPLEMENTATION_GUIDANCE']}",
            )
            for item in answer["results"]
        )
    except (ValueError, KeyError, TypeError):
        return (Paper("", cognition, ""),) if cognition not in ("", "none") else ()
