"""A whole store as JSON Lines: what makes another, empty one answer as this one does. `database.bulk` reads them.

A line is {"answer": {"route", "key", "body"}}, {"baseline": ...}, {"element": ..., "score": ..., "runs": [...],
"key": ..., "novelty": ..., "verdict": ...}, {"usage": ..., "number": ...} or, at last, {"candidates": [indices],
"merged_through": ..., "last_index": ...}. Not in it: events, vectors and the keys of imports.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from common.records import Baseline
from database.keys import IMPORTS, OF_IMPORTS
from database.memory import Memory
from database.scores import BASELINES
from database.store import Session, Where

__all__ = ["export_lines"]

_PAGE = 50


def export_lines(memory: Memory) -> Iterator[str]:
    """Everything, a page a transaction: what is removed meanwhile is left out, what is added is in it."""
    # Before what they are about: what was answered already is in the file then.
    yield from _answers(memory)

    def baselines(session: Session) -> list[Baseline]:
        found = [session.baseline(key) for key in session.state(BASELINES) or []]
        return [baseline for baseline in found if baseline is not None]

    for baseline in memory.store.read(baselines):
        yield _line({"baseline": baseline.model_dump(mode="json")})
    judged = memory.store.read(memory.scores.judge) is not None
    for page in (partial(_elements, judged=judged), _usage):
        after: int | None = 0
        while after is not None:
            after, lines = memory.store.read(page(after))
            yield from lines

    def last(session: Session) -> dict[str, Any]:
        members = [facts.index for facts in memory.candidates.ranked(session)]
        return {
            "candidates": members,
            "merged_through": memory.candidates.merged_through(session),
            "last_index": int(session.state("last_index") or 0),
        }

    yield _line(memory.store.read(last))


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


def _elements(after: int, judged: bool) -> Callable[[Session], tuple[int | None, list[str]]]:
    """
    Args:
        judged: whether verdicts of a model count in this store.
    """

    def measured(session: Session, index: int) -> dict[str, Any]:
        known = session.evidence(index)
        if known is None:
            return {}
        novelty, said = known[0].novelty, known[0].verdict if judged else None
        # The neighbour that it was measured against may be gone, and is in no other line then.
        found = {} if novelty is None else {"novelty": novelty.model_dump(mode="json")}
        return found | ({} if said is None else {"verdict": said.model_dump(mode="json")})

    def work(session: Session) -> tuple[int | None, list[str]]:
        facts = session.facts(Where(after=after), limit=_PAGE)
        scores = {item.index: item.score for item in facts}
        keys = {index: key for index, key in session.keys(list(scores)).items() if not key.startswith(OF_IMPORTS)}
        lines = [
            _line(
                {
                    "element": element.model_dump(),
                    "score": scores[element.index],
                    "runs": [run.model_dump(mode="json") for run in session.runs(element.index)],
                }
                | ({"key": keys[element.index]} if element.index in keys else {})
                | measured(session, element.index)
            )
            for element in session.elements(list(scores))
        ]
        return (facts[-1].index if len(facts) == _PAGE else None), lines

    return work


def _usage(after: int) -> Callable[[Session], tuple[int | None, list[str]]]:
    def work(session: Session) -> tuple[int | None, list[str]]:
        found = session.ledger.usage(after, _PAGE)
        lines = [_line({"usage": record.model_dump(mode="json"), "number": number}) for number, record in found]
        return (found[-1][0] if len(found) == _PAGE else None), lines

    return work


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
