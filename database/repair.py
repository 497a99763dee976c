"""Removing elements, and mending a store: what can be derived is derived again, what is incomplete is removed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from common.result_table import parse_table
from database import tree
from database.candidate_manager import Candidates
from database.keys import note_removal
from database.scores import Scores
from database.store import Session, Store, Where

__all__ = ["clean_invalid", "remove", "repair"]

_PAGE = 100


def remove(session: Session, indices: Sequence[int]) -> int:
    """Removes elements with all that belongs to them; their children go to the nearest ancestor that stays. Their
    idempotency keys are remembered.

    Returns:
        How many children moved.
    """
    moved = tree.detach(session, indices)
    note_removal(session, indices)
    session.delete(indices)
    return moved


def clean_invalid(session: Session) -> dict[str, Any]:
    """Removes the elements whose train or test row is missing or has an empty cell; their children go to the nearest
    ancestor that stays."""
    before = session.count()
    gone = [facts.index for facts in session.facts(Where(incomplete=True))]
    moved = remove(session, gone)
    data = {
        "count_before": before,
        "cleaned_count": len(gone),
        "reparented_children": moved,
        "count_after": before - len(gone),
    }
    return data if gone else data | {"message": "every element is complete"}


def repair(store: Store, scores: Scores, candidates: Candidates) -> dict[str, Any]:
    """Checks the storage and derives again what can be derived: parents that do not exist, completeness, candidates at
    once; every score is out of date then.

    Raises:
        UncountedError: elements are being counted; nothing of the last write was done.
    """
    # What cannot be said yet is refused before it costs anything.
    store.read(lambda session: session.count())
    problems = store.read(lambda session: session.check())
    after, completed = 0, 0
    while True:
        # A page a transaction: others write in between.
        after, corrected = store.write(partial(_correct_completeness, after))
        completed += corrected
        if not after:
            break

    def work(session: Session) -> dict[str, Any]:
        # First: refused after a change, without transactions, it would be a write that was cut off.
        elements = session.count()
        orphans = session.orphans()
        session.set_parent(orphans, None)
        scores.outdate(session)
        members = [facts.index for facts in candidates.ranked(session)]
        session.put_candidates(members[: candidates.capacity])
        candidates.refresh_all(session)
        return {
            "elements": elements,
            "storage_problems": problems,
            "orphans_made_roots": len(orphans),
            "completeness_corrected": completed,
            "candidates": len(members),
        }

    return store.write(work)


def _correct_completeness(after: int, session: Session) -> tuple[int, int]:
    """Derives it again for a page of elements: the index to go on after, 0 at the end; and how many were wrong."""
    page = session.facts(Where(after=after), limit=_PAGE)
    elements = session.elements([facts.index for facts in page])
    corrected = 0
    for facts, element in zip(page, elements, strict=True):
        complete = parse_table(element.result.train).complete and parse_table(element.result.test).complete
        if complete != facts.complete:
            session.set_complete(facts.index, complete)
            corrected += 1
    return (page[-1].index if len(page) == _PAGE else 0), corrected
