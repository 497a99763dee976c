"""A whole store as JSON Lines: what makes another, empty one answer as this one does. `database.bulk` reads them.

A line is {"answer": {"route", "key", "body"}}, {"baseline": ...}, {"element": ..., "score": ..., "runs": [...],
"key": ..., "novelty": ..., "verdict": ...}, {"usage": ..., "number": ...} or, at last, {"candidates": [indices],
"merged_through": ..., "last_index": ...}. Not in it: events, vectors and the keys of imports.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from common.records import Baseline
from database.forest import read_forest
from database.keys import IMPORTS, OF_IMPORTS
from database.memory import Memory
from database.scores import BASELINES
from database.store import CLEARED, Session

__all__ = ["export_lines"]

_PAGE = 50


def export_lines(memory: Memory) -> Iterator[str]:
    """Everything, a page a transaction, so that nothing is held while a slow client reads. The elements and their tree
    are those of one moment, what they say is of the moment of their page: what is removed before is left out, and what
    lay below it follows its nearest ancestor in the file; what is added later is not in it."""
    store = memory.store
    # Before what they are about: what was answered already is in the file then.
    yield from _answers(memory)

    def baselines(session: Session) -> list[Baseline]:
        found = [session.baseline(key) for key in session.state(BASELINES) or []]
        return [baseline for baseline in found if baseline is not None]

    for baseline in store.read(baselines):
        yield _line({"baseline": baseline.model_dump(mode="json")})
    judged = store.read(memory.scores.judge) is not None
    forest = read_forest(store)
    # What was removed, and the nearest element above it that is in the file.
    gone: dict[int, int | None] = {}
    for start in range(0, len(forest.order), _PAGE):
        some = forest.order[start : start + _PAGE]
        found = {line["element"]["index"]: line for line in store.read(_elements(some, forest.cleared, judged))}
        for index in some:
            # Parents are first: whether this one is in the file is known.
            parent = forest.parents[index]
            above = None if parent is None else gone.get(parent, parent)
            if index not in found:
                gone[index] = above
                continue
            line = found[index]
            yield _line(line | {"element": line["element"] | {"parent": above}})
    after: int | None = 0
    while after is not None:
        after, lines = store.read(_usage(after))
        yield from lines

    def last(session: Session) -> dict[str, Any]:
        members = [facts.index for facts in memory.candidates.ranked(session)]
        counters = {
            "merged_through": memory.candidates.merged_through(session),
            "last_index": int(session.state("last_index") or 0),
        }
        if session.state(CLEARED) != forest.cleared:
            # Of other elements, which have the indices anew.
            return {"candidates": [], "merged_through": 0, "last_index": max(forest.parents, default=0)}
        return {"candidates": [index for index in members if index in forest.parents and index not in gone]} | counters

    yield _line(store.read(last))


def _answers(memory: Memory) -> Iterator[str]:
    """Their names are read at once, which are short."""
    names = [
        (route, key)
        for route, key in memory.store.read(lambda session: session.answer_names())
        if route not in IMPORTS and not key.startswith(OF_IMPORTS)
    ]
    for start in range(0, len(names), _PAGE):
        some = names[start : start + _PAGE]

        def bodies(session: Session, some: list[tuple[str, str]] = some) -> list[dict[str, Any] | None]:
            return [session.answer(route, key) for route, key in some]

        for (route, key), body in zip(some, memory.store.read(bodies), strict=True):
            if body is not None:
                yield _line({"answer": {"route": route, "key": key, "body": body}})


def _elements(some: list[int], cleared: int | None, judged: bool) -> Callable[[Session], list[dict[str, Any]]]:
    """The lines of those that are there.

    Args:
        cleared: see `Forest`.
        judged: whether verdicts of a model count in this store.
    """

    def measured(session: Session, index: int) -> dict[str, Any]:
        evidence, evaluation = session.evidence(index) or (None, None)
        said: dict[str, Any] = {"score": None if evaluation is None else evaluation.score}
        said["runs"] = [run.model_dump(mode="json") for run in session.runs(index)]
        # The neighbour that it was measured against may be gone, and is in no other line then.
        if evidence is not None and evidence.novelty is not None:
            said["novelty"] = evidence.novelty.model_dump(mode="json")
        if evidence is not None and evidence.verdict is not None and judged:
            said["verdict"] = evidence.verdict.model_dump(mode="json")
        return said

    def work(session: Session) -> list[dict[str, Any]]:
        keys = {index: key for index, key in session.keys(some).items() if not key.startswith(OF_IMPORTS)}
        lines = [
            {"element": element.model_dump()}
            | measured(session, element.index)
            | ({"key": keys[element.index]} if element.index in keys else {})
            for element in session.elements(some)
        ]
        # Asked at last: a read need not be of one state. After a removal of everything they are other elements.
        return lines if session.state(CLEARED) == cleared else []

    return work


def _usage(after: int) -> Callable[[Session], tuple[int | None, list[str]]]:
    def work(session: Session) -> tuple[int | None, list[str]]:
        found = session.ledger.usage(after, _PAGE)
        lines = [_line({"usage": record.model_dump(mode="json"), "number": number}) for number, record in found]
        return (found[-1][0] if len(found) == _PAGE else None), lines

    return work


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
