"""What has to hold in a store, whatever happened to it. Read-only; one line for each thing that is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from common.errors import StoreError
from common.files import sha256_text
from database.evaluate_agent.score import SCORE_VERSION, parse_table
from database.store import Facts, Session, Store, Where

__all__ = ["broken"]

_PAGE = 200


def broken(store: Store, capacity: int) -> list[str]:
    """Every invariant that does not hold.

    Args:
        capacity: largest size of the candidate set.
    """
    found = store.read(_whole(capacity))
    after = 0
    while True:
        page, lines = store.read(_elements(after))
        found += lines
        if not page:
            break
        after = page
    sequence = 0
    while True:
        last, lines = store.read(_vectors(sequence))
        found += lines
        if not last:
            return found
        sequence = last


def _whole(capacity: int) -> Callable[[Session], list[str]]:
    def work(session: Session) -> list[str]:
        found = [f"storage: {line}" for line in session.check()]
        found += session.ledger.strays()
        facts = session.facts()
        last = facts[-1].index if facts else 0
        counter = int(session.state("last_index") or 0)
        if counter < last:
            found.append(f"counter: {counter} is below the highest index {last}, which would be given again")
        if session.count() != len(facts):
            found.append(f"count: {session.count()} elements are counted, {len(facts)} are stored")
        names = len({item.name for item in facts})
        if session.unique_names() != names:
            found.append(f"count: {session.unique_names()} names are counted, {names} are stored")
        candidates = session.candidates()
        if len(candidates) > capacity:
            found.append(f"candidates: {len(candidates)} are in the set, its capacity is {capacity}")
        return found + list(_tree(facts))

    return work


def _tree(facts: list[Facts]) -> Iterator[str]:
    parents = {item.index: item.parent for item in facts}
    for index, parent in parents.items():
        if parent is not None and parent not in parents:
            yield f"tree: the parent {parent} of element {index} does not exist"
    sound: set[int] = set()
    for start in parents:
        path: list[int] = []
        seen: set[int] = set()
        at: int | None = start
        while at is not None and at in parents and at not in sound and at not in seen:
            path.append(at)
            seen.add(at)
            at = parents[at]
        if at is not None and at in seen:
            yield f"tree: elements {', '.join(map(str, path[path.index(at) :][:20]))} are their own ancestors"
        sound.update(path)


def _elements(after: int) -> Callable[[Session], tuple[int, list[str]]]:
    def work(session: Session) -> tuple[int, list[str]]:
        facts = session.facts(Where(after=after), limit=_PAGE)
        lines = [line for item in facts for line in _element(session, item)]
        return (facts[-1].index if facts else 0), lines

    return work


def _element(session: Session, facts: Facts) -> Iterator[str]:
    index = facts.index
    try:
        found = session.elements([index])
        known = session.evidence(index)
        runs = session.runs(index)
    except (StoreError, ValueError, TypeError, KeyError) as error:
        yield f"element {index}: its document cannot be read: {str(error).splitlines()[0][:200]}"
        return
    if not found or known is None:
        yield f"element {index}: it has no document"
        return
    element, (evidence, evaluation) = found[0], known
    if (element.name, element.time, element.parent) != (facts.name, facts.time, facts.parent):
        yield f"element {index}: name, time or parent differ between its row and its document"
    complete = parse_table(element.result.train).complete and parse_table(element.result.test).complete
    if complete != facts.complete:
        yield f"element {index}: it is marked {'complete' if facts.complete else 'incomplete'}, which it is not"
    if evidence.baseline_key != facts.baseline_key:
        yield f"element {index}: its baseline key differs between its row and its evidence"
    if any(run.program_sha256 != sha256_text(element.program) for run in runs):
        yield f"element {index}: a run record is of another program"
    if index not in session.ledger.with_program(sha256_text(element.program)):
        yield f"element {index}: its program is not found by its hash"
    if evaluation is not None and evaluation.version > SCORE_VERSION:
        yield f"element {index}: its score is of version {evaluation.version}, this release knows {SCORE_VERSION}"
    if facts.score != (None if evaluation is None else evaluation.score):
        yield f"element {index}: its score differs between its row and its evaluation"


def _vectors(after: int) -> Callable[[Session], tuple[int, list[str]]]:
    def work(session: Session) -> tuple[int, list[str]]:
        try:
            rows = session.windows(after, _PAGE)
        except (ValueError, KeyError, TypeError) as error:
            return 0, [f"vectors: those after number {after} cannot be read: {error}"]
        lines = [
            f"vectors: those of element {row.index} are not finite"
            for row in rows
            if not len(row.windows) or not np.isfinite(row.windows).all()
        ]
        return (rows[-1].sequence if rows else 0), lines

    return work
