"""What is stored of an element that comes in, and what is refused at the door."""

from __future__ import annotations

from common.files import sha256_text
from common.records import RunRecord
from database import tree
from database.derived import is_complete
from database.errors import NotFoundError, RefusedError
from database.evaluate_agent.score import evidence_of
from database.models import Element, NewElement, ScoredElement
from database.store import NewEntry, Session

__all__ = ["entry_of", "refuse_unfit", "refuse_unknown_parent", "with_score"]


def entry_of(element: NewElement, run: RunRecord | None, key: str | None) -> NewEntry:
    """All that is stored of an element that is new.

    Raises:
        RefusedError: see `refuse_unfit`.
    """
    wanted = element.stored()
    refuse_unfit(element, run)
    return NewEntry(
        element=wanted,
        evidence=evidence_of(wanted.result.train, wanted.result.test, run),
        complete=is_complete(wanted.result),
        run=run,
        key=key,
    )


def with_score(element: Element, score: float | None) -> ScoredElement:
    return ScoredElement(**{name: getattr(element, name) for name in Element.model_fields}, score=score)


def refuse_unknown_parent(session: Session, parent: int | None) -> None:
    if parent is None:
        return
    try:
        tree.facts_of(session, parent)
    except NotFoundError as error:
        raise RefusedError(f"expected the index of a stored element as parent, got {parent}") from error


def refuse_unfit(element: NewElement, run: RunRecord | None) -> None:
    """Raises RefusedError for what is no element with its finished run, whatever the store holds."""
    if not element.result.train and not element.result.test:
        raise RefusedError("expected result to hold the train and test CSV, got an empty result")
    if run is None:
        return
    if run.status != "finished":
        raise RefusedError(
            f"expected a finished run, got one that {run.status}: only finished experiments become elements"
        )
    if run.program_sha256 != sha256_text(element.program):
        raise RefusedError("the run's program_sha256 is not that of the element's program: another text was trained")
