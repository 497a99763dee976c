"""Removing elements, and mending a store: what can be derived is derived again, what is incomplete is removed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from database import tree
from database.candidate_manager import MERGED, Candidates
from database.derived import Fault, Mend, faults, is_complete, part_faults, read_evidence, rederived
from database.keys import note_removal
from database.models import Element
from database.scores import BASELINES, Scores
from database.store import Facts, Session, Store, Where

__all__ = ["clean_invalid", "embed_again", "remove", "repair"]

_PAGE = 100
_SHOWN = 20


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
    marked = [facts.index for facts in session.facts(Where(incomplete=True))]
    whole: set[int] = set()
    for start in range(0, len(marked), _PAGE):
        # An earlier release took more cells than columns for incomplete.
        page = session.elements(marked[start : start + _PAGE])
        whole |= {element.index for element in page if is_complete(element.result)}
    for index in sorted(whole):
        session.set_complete(index, True)
    gone = [index for index in marked if index not in whole]
    moved = remove(session, gone)
    data = {
        "count_before": before,
        "cleaned_count": len(gone),
        "reparented_children": moved,
        "count_after": before - len(gone),
    }
    return data if gone else data | {"message": "every element is complete"}


def repair(store: Store, scores: Scores, candidates: Candidates) -> dict[str, Any]:
    """Checks the storage and derives again what can be derived: parents that do not exist, what is kept beside the
    documents, counts and the candidate set; vectors and sketches that are missing or wrong wait to be embedded, and
    every score is out of date then.

    What only a backup brings back stays as it is; `not_mended` names the first of these elements.

    Raises:
        UncountedError: elements are being counted; nothing of the last write was done.
    """
    # What cannot be said yet is refused before it costs anything.
    store.read(lambda session: session.count())
    problems = store.read(lambda session: session.check())
    mended: dict[Mend, int] = defaultdict(int)
    left: list[str] = []
    for found in _by_page(store, faults, partial(_mend, scores)):
        for mend in {fault.mend for fault in found}:
            mended[mend] += len({fault.index for fault in found if fault.mend == mend})
        left += [f"element {fault.index}: {fault.what}" for fault in found if fault.mend == "backup"]

    def work(session: Session) -> dict[str, Any]:
        # First: refused after a change, without transactions, it would be a write that was cut off.
        elements = session.count()
        orphans = session.orphans()
        session.set_parent(orphans, None)
        session.recount()
        _mend_state(session)
        scores.outdate(session)
        members = [facts.index for facts in candidates.ranked(session)]
        session.put_candidates(members[: candidates.capacity])
        candidates.refresh_all(session)
        return {
            "elements": elements,
            "storage_problems": problems,
            "orphans_made_roots": len(orphans),
            "completeness_corrected": mended["completeness"],
            "rows_corrected": mended["row"],
            "evidence_corrected": mended["evidence"],
            "to_be_embedded": mended["vectors"],
            "not_mended": left[:_SHOWN],
            "candidates": len(members),
        }

    return store.write(work)


def embed_again(store: Store) -> int:
    """Has elements embedded again whose vectors or sketch are missing or wrong; returns how many."""

    def mend(found: Sequence[Fault], session: Session) -> None:
        session.unsettle(sorted({fault.index for fault in found if fault.mend == "vectors"}))

    pages = _by_page(store, part_faults, mend)
    return len({fault.index for found in pages for fault in found if fault.mend == "vectors"})


def _by_page(
    store: Store,
    find: Callable[[Session, Sequence[Facts]], list[Fault]],
    mend: Callable[[Sequence[Fault], Session], None],
) -> Iterator[list[Fault]]:
    """The faults of each page that has any, after `mend` was called with them. Others write in between; a page in which
    nothing is wrong is only read."""
    after = 0
    while True:

        def look(session: Session, after: int = after) -> tuple[int, list[Fault]]:
            page = session.facts(Where(after=after), limit=_PAGE)
            return (page[-1].index if page else 0), find(session, page)

        def work(session: Session) -> list[Fault]:
            found = look(session)[1]
            mend(found, session)
            return found

        last, found = store.read(look)
        if found:
            yield store.write(work)
        if not last:
            return
        after = last


def _mend(scores: Scores, found: Sequence[Fault], session: Session) -> None:
    """Puts right what is wrong with elements of a page."""
    by_index: dict[int, set[Mend]] = defaultdict(set)
    for fault in found:
        by_index[fault.index].add(fault.mend)
    session.unsettle([index for index, mends in by_index.items() if "vectors" in mends])
    for index, mends in by_index.items():
        # What cannot be read is nothing to derive from.
        if "backup" not in mends and mends != {"vectors"}:
            _derive(session, scores, session.elements([index])[0], mends)


def _derive(session: Session, scores: Scores, element: Element, mends: set[Mend]) -> None:
    index = element.index
    if "completeness" in mends:
        session.set_complete(index, is_complete(element.result))
    if mends & {"row", "evidence"}:
        session.derive(element)
    if mends & {"evidence", "score"}:
        known = read_evidence(session, index)
        evidence = rederived(element, session.runs(index), None if known is None else known[0])
        session.set_evaluation(index, evidence, scores.evaluate(session, evidence))
        if evidence.novelty is None:
            # It is computed when the element is embedded.
            session.unsettle([index])


def _mend_state(session: Session) -> None:
    """Puts right the numbers that others follow: the last index given, what was merged, the order of baselines."""
    newest = next(iter(session.ranked("newest", limit=1)), 0)
    session.ledger.reserve(newest + 1)
    merged = int(session.state(MERGED) or 0)
    if not 0 <= merged <= int(session.state("last_index") or 0):
        session.put_state(MERGED, newest)
    order, keys = session.state(BASELINES) or [], session.ledger.baseline_keys()
    if sorted(order) != sorted(keys):
        kept = [key for key in dict.fromkeys(order) if key in keys]
        session.put_state(BASELINES, [*kept, *(key for key in keys if key not in kept)])
    highest = max([0, *(session.baseline_revision(key) for key in keys)])
    if int(session.state("revision") or 0) < highest:
        session.put_state("revision", highest)
