"""Whole stores as JSON Lines: out, and in again.

A line is {"baseline": ...}, {"element": ..., "score": ..., "runs": [...]} or {"candidates": [indices]}; a bare element
is taken as well. Indices are names within the file: an empty store keeps them, any other gives new ones, and parents
and candidates follow.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from common.files import sha256_text
from common.records import Baseline, RunRecord
from database.errors import ConflictError, NotFoundError, RefusedError
from database.memory import Memory, refuse_unfit
from database.models import NewElement, PostedElement, StoredExperiment
from database.possible import NewBaseline, NewRun
from database.scores import BASELINES
from database.store import Session, Where

__all__ = ["Importer", "Refusal", "export_lines", "look_over"]

_RUNS: TypeAdapter[RunRecord] = TypeAdapter(NewRun)
_BASELINES: TypeAdapter[Baseline] = TypeAdapter(NewBaseline)
_PAGE = 50
_OPEN = 64
_HIGHEST_KEPT = 2**31
"""Highest index of a file that is kept: the counter has to go on from it."""
_KEYS = ("baseline", "candidates", "element", "program")
"""One of which every line has; the last is a bare element's."""
_REFUSING = (ValidationError, RefusedError, ConflictError, NotFoundError, RecursionError)


@dataclass(frozen=True)
class Refusal:
    """A line that was not stored. Lines are counted from 1."""

    line: int
    reason: str


def look_over(path: Path) -> tuple[bool, Refusal | None]:
    """What a restore of this file could come to, without a store: whether some line has the form of one that is
    exported, or of a bare element; and the first refusal where no element of the file can be stored.

    Raises:
        OSError: it cannot be read.
    """
    known, first = False, None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(value, dict) or value.keys().isdisjoint(_KEYS):
                continue
            known = True
            if "baseline" in value or "candidates" in value:
                continue
            try:
                refuse_unfit(*_read_element(value, backup=True))
            except _REFUSING as error:
                first = first or Refusal(number, _reason(error))
            else:
                return True, None
    return known, first


def export_lines(memory: Memory) -> Iterator[str]:
    """Everything, a page a transaction: what is removed meanwhile is left out, what is added is in it."""

    def baselines(session: Session) -> list[Baseline]:
        found = [session.baseline(key) for key in session.state(BASELINES) or []]
        return [baseline for baseline in found if baseline is not None]

    for baseline in memory.store.read(baselines):
        yield _line({"baseline": baseline.model_dump(mode="json")})
    after: int | None = 0
    while after is not None:
        after, lines = memory.store.read(_page(after))
        yield from lines
    members = memory.store.read(lambda session: [facts.index for facts in memory.candidates.ranked(session)])
    yield _line({"candidates": members})


def _page(after: int) -> Callable[[Session], tuple[int | None, list[str]]]:
    def work(session: Session) -> tuple[int | None, list[str]]:
        facts = session.facts(Where(after=after), limit=_PAGE)
        scores = {item.index: item.score for item in facts}
        lines = [
            _line(
                {
                    "element": element.model_dump(),
                    "score": scores[element.index],
                    "runs": [run.model_dump(mode="json") for run in session.runs(element.index)],
                }
            )
            for element in session.elements(list(scores))
        ]
        return (facts[-1].index if len(facts) == _PAGE else None), lines

    return work


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass
class Importer:
    """Takes lines one after the other; what cannot be stored is a refusal, and the rest goes on.

    Args:
        key: with it, the same lines sent again are stored once.
        backup: the lines come out of a store of ours: what was taken once is taken again, though it would be refused
            today.
    """

    memory: Memory
    key: str | None = None
    backup: bool = False
    refused: list[Refusal] = field(default_factory=list)
    stored: int = 0
    repeated: int = 0

    def __post_init__(self) -> None:
        self._keeps = not self.memory.store.read(lambda session: session.count(limit=1))
        self._known: dict[int, Future[StoredExperiment]] = {}
        self._open: deque[tuple[int, Future[StoredExperiment]]] = deque()

    def line(self, number: int, text: str | bytes) -> None:
        """Takes one line of JSON. Empty ones are passed over.

        Raises:
            StoreError: the store cannot be written; lines before this one may be stored.
        """
        if text.strip():
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                self.refuse(number, f"expected JSON, got {str(error)[:200] or 'something nested too deeply'}")
                return
            self.value(number, value)

    def value(self, number: int, value: Any) -> None:
        """Takes one line as an object."""
        try:
            if not isinstance(value, dict):
                raise RefusedError(f"expected an object, got {type(value).__name__}")
            if "baseline" in value:
                given = value["baseline"]
                self._baseline(
                    number, Baseline.model_validate(given) if self.backup else _BASELINES.validate_python(given)
                )
            elif "candidates" in value:
                self._candidates(number, value["candidates"])
            else:
                self._element(number, value)
        except _REFUSING as error:
            self.refuse(number, _reason(error))

    def refuse(self, number: int, reason: str) -> None:
        self.refused.append(Refusal(number, reason.encode("utf-8", "replace").decode()))

    def finish(self) -> None:
        """Returns when everything has its outcome."""
        while self._open:
            self._settle()
        self.refused.sort(key=lambda refusal: refusal.line)

    def _element(self, number: int, value: dict[str, Any]) -> None:
        element, run = _read_element(value, self.backup)
        given = value.get("element", value)
        source = given.get("index")
        if source is not None and (not _is_integer(source) or source < 1 or source in self._known):
            raise RefusedError(f"expected an index of its own, a positive integer, got {str(source)[:40]}")
        parent = given.get("parent")
        if parent is not None:
            element = element.model_copy(update={"parent": self._index(parent, "its parent")})
        if source is not None and self._keeps and source <= _HIGHEST_KEPT:
            # Kept in the order of submission, so the element that follows gets this index.
            reserved: int = source
            self.memory.store.submit(lambda session: session.ledger.reserve(reserved))
        key = None if self.key is None else f"import:{self.key}:{number}"
        future = self.memory.submit(element, run, key)
        if source is not None:
            self._known[source] = future
        self._open.append((number, future))
        if len(self._open) > _OPEN:
            self._settle()

    def _index(self, source: Any, role: str) -> int:
        """The index here of an element that the file calls `source`.

        Args:
            role: what it is to the line, for the refusal.
        """
        if not _is_integer(source):
            raise RefusedError(f"expected {role} as the index of an element, an integer, got {str(source)[:40]}")
        future = self._known.get(source)
        if future is None:
            raise RefusedError(f"{role} {str(source)[:40]} is not among the lines before it")
        try:
            return future.result().index
        except (RefusedError, ConflictError) as error:
            raise RefusedError(f"{role} {source} was refused") from error

    def _settle(self) -> None:
        number, future = self._open.popleft()
        try:
            created = future.result().created
        except (RefusedError, ConflictError) as error:
            self.refuse(number, str(error))
            return
        self.stored += created
        self.repeated += not created

    def _baseline(self, number: int, baseline: Baseline) -> None:
        """A late repetition must not make an old baseline the newest."""
        kept: list[int] = []

        def work(session: Session) -> dict[str, Any]:
            kept.append(self.memory.keep_baseline(session, baseline))
            return {}

        key = None if self.key is None else f"{self.key}:{number}"
        self.memory.once("import", key, work, sha256_text(baseline.model_dump_json()))
        self.memory.rescore_soon()
        self.stored += len(kept) > 0
        self.repeated += not kept

    def _candidates(self, number: int, members: Any) -> None:
        if not isinstance(members, list):
            raise RefusedError("expected candidates as a list of indices")
        self.memory.settling.settle()
        indices: dict[Any, int] = {}
        for at, member in enumerate(members):
            try:
                indices[at] = self._index(member, "candidate")
            except RefusedError as error:
                self.refuse(number, str(error))

        def work(session: Session) -> dict[str, Any]:
            refused = []
            for at, index in indices.items():
                try:
                    self.memory.candidates.add(session, index)
                except (RefusedError, NotFoundError) as error:  # each says so before it changes the set
                    refused.append(f"candidate {members[at]}: {error}")
            return {"refused": refused}

        # The elements of a repeated file are told by their own lines; what has become of the set since stays.
        key = None if self.key is None else f"{self.key}:{number}"
        answer = self.memory.once("import", key, work, sha256_text(json.dumps(members)))
        for reason in answer["refused"]:
            self.refuse(number, reason)


def _read_element(value: dict[str, Any], backup: bool) -> tuple[NewElement, RunRecord | None]:
    """The element of a line, without its parent, and its run.

    Raises:
        ValidationError, RefusedError: they are none.
    """
    given = value.get("element", value)
    runs = value.get("runs") or []
    if not isinstance(given, dict) or not isinstance(runs, list) or len(runs) > 1:
        raise RefusedError("expected an element, an object, with at most one run in a list")
    alone = {**given, "parent": None}
    element = NewElement.model_validate(alone) if backup else PostedElement.model_validate(alone)
    if not runs:
        return element, None
    return element, RunRecord.model_validate(runs[0]) if backup else _RUNS.validate_python(runs[0])


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])
    return str(error) or "nested too deeply"


def _is_integer(value: Any) -> bool:
    """True is an int to Python, and would be element 1."""
    return isinstance(value, int) and not isinstance(value, bool)
