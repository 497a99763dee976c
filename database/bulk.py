"""JSON Lines into a store: what `database.exporting` wrote, or bare elements.

Indices are names within the file: an empty store keeps them, any other gives new ones, and parents, candidates and
usage follow. An empty store takes the keys and answers of the exported one as well, so that it answers as that did.
"""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from common.files import sha256_text
from common.records import Baseline, RunRecord, Usage
from database import keys
from database.entries import entry_of, refuse_unfit
from database.errors import ConflictError, RefusedError
from database.import_notes import HIGHEST_KEPT, Begun, Told
from database.lines import (
    REFUSING,
    Refusal,
    is_integer,
    kind_of,
    read_answer,
    read_baseline,
    read_element,
    read_novelty,
    read_usage,
    read_verdict,
    reason_of,
)
from database.memory import Memory
from database.models import NewElement, StoredExperiment
from database.store import Session
from database.waiting import Place, Waiting

__all__ = ["MOST_REFUSALS", "Importer"]

MOST_REFUSALS = 10_000
"""That are named. A body has no longest size: it could be refused line after line until the memory is full."""
_IMPORT = keys.IMPORTS[0]
_LONGEST_REASON = 1000
_OPEN = 64


@dataclass
class _Taken:
    """An element that was handed to the store. Writes after it may share its commit: inside them it is there before it
    is acknowledged."""

    stored: Future[StoredExperiment] | None = None
    index: int | None = None
    """That its write gave it; None where it was refused."""

    def found(self) -> int | None:
        """Its index, as a write after it sees it; None where it was refused."""
        if self.stored is None or not self.stored.done():
            return self.index
        try:
            return self.stored.result().index
        except RefusedError:
            return None


@dataclass
class Importer:
    """Takes lines one after the other, in any order; what cannot be stored is a refusal, and the rest goes on. An
    element waits for its parent, candidates for the end.

    Args:
        key: with it, the same lines sent again are stored once.
        compared: whether a line sent again under the key has to be the same.
        backup: the lines come out of a store of ours: what was taken once is taken again, though it would be refused
            today.
        kept: most refusals that are kept; the others are counted.
    """

    memory: Memory
    key: str | None = None
    compared: bool = True
    backup: bool = False
    kept: int = MOST_REFUSALS
    refused: list[Refusal] = field(default_factory=list)
    more_refused: int = 0
    """Refusals beside those that are kept."""
    refused_lines: int = 0
    """Lines of which something was refused; of the candidates several may be."""
    stored: int = 0
    repeated: int = 0
    left_out: int = 0
    """Idempotency keys that the exported store held and this one does not take."""

    def __post_init__(self) -> None:
        self._refused_last = 0
        self._begun = Begun.of(self.memory, self.key)
        self._waiting = Waiting()
        self._late: list[tuple[int, Place]] = []
        self._known: dict[int, _Taken | int | None] = {}
        """By the index in the file: the index here, once it is known; None for what the store refused."""
        self._unfit: set[int] = set()
        """Indices of elements that were refused before the store was asked."""
        self._open: deque[tuple[int, int | None, Future[StoredExperiment] | Future[bool]]] = deque()

    @property
    def refusals(self) -> int:
        return len(self.refused) + self.more_refused

    def line(self, number: int, text: str | bytes) -> None:
        """Takes one line of JSON. Empty ones are passed over.

        Raises:
            ConflictError: the key was used before, with another text of this line or one before it.
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
            kind = kind_of(value)
            if kind == "baseline":
                self._baseline(number, read_baseline(value, self.backup))
            elif kind == "usage":
                self._usage(number, *read_usage(value, self.backup))
            elif kind == "answer":
                self._answer(number, *read_answer(value))
            elif kind == "candidates":
                self._late.append((number, self._waiting.put(value)))
            else:
                self._element(number, value)
        except REFUSING as error:
            self.refuse(number, reason_of(error))

    def refuse(self, number: int, reason: str) -> None:
        # All that is refused of one line is refused in a row.
        self.refused_lines += number != self._refused_last
        self._refused_last = number
        if len(self.refused) >= self.kept:
            self.more_refused += 1
            return
        self.refused.append(Refusal(number, reason[:_LONGEST_REASON].encode("utf-8", "replace").decode()))

    def finish(self) -> None:
        """Returns when everything has its outcome.

        Raises:
            ConflictError, StoreError: see `line`.
        """
        while self._open:
            self._settle()
        refused = self._unfit | {source for source, index in self._known.items() if index is None}
        for number, reason in self._waiting.hopeless(refused):
            self.refuse(number, reason)
        for number, place in self._late:
            try:
                self._candidates(number, self._waiting.read(place))
            except REFUSING as error:
                self.refuse(number, reason_of(error))
        self._waiting.close()
        self.refused.sort(key=lambda refusal: refusal.line)

    # Elements

    def _element(self, number: int, value: dict[str, Any]) -> None:
        given = value.get("element", value)
        source = given.get("index") if isinstance(given, dict) else None
        if source is not None and (not is_integer(source) or source < 1 or self._has(source)):
            raise RefusedError(f"expected an index of its own, a positive integer, got {str(source)[:40]}")
        try:
            read = read_element(value, self.backup)
            parent = given.get("parent")
            if is_integer(parent) and parent not in self._known:
                refuse_unfit(*read[:2])
                self._waiting.hold(number, source, parent, value)
                return
            self._submit(number, source, value, read)
        except REFUSING:
            if source is not None:
                self._unfit.add(source)
            raise
        below = [] if source is None else self._waiting.released(source)[::-1]
        while below:
            held = below.pop()
            try:
                value = self._waiting.read(held.place)
                self._submit(held.line, held.source, value, read_element(value, self.backup))
            except REFUSING as error:
                self.refuse(held.line, reason_of(error))
                if held.source is not None:
                    self._unfit.add(held.source)
                continue
            if held.source is not None:
                below += self._waiting.released(held.source)[::-1]

    def _submit(
        self,
        number: int,
        source: int | None,
        value: dict[str, Any],
        read: tuple[NewElement, RunRecord | None, str | None],
    ) -> None:
        """Stores an element whose parent was submitted: its write comes after that of the parent, whose commit it may
        share.

        Args:
            read: what `value` says.
        """
        element, run, own = read
        parent = value.get("element", value).get("parent")
        above = None if parent is None else self._submitted(parent, "its parent")
        if own is not None and not self._begun.keeps:
            own, self.left_out = None, self.left_out + 1
        entry = entry_of(element, run, own)
        # As what a route answered: believed of a backup.
        if self.backup and (verdict := read_verdict(value)) is not None:
            entry = replace(entry, evidence=entry.evidence.model_copy(update={"verdict": verdict}))
        told, taken = self._told(number, value), _Taken()
        novelty = read_novelty(value) if self._begun.whole else None
        begun, keep = self._begun, self.memory.keep

        def work(session: Session) -> StoredExperiment:
            # A group may be tried again.
            taken.index = None
            stored = taken_in(session)
            taken.index = stored.index
            return stored

        def taken_in(session: Session) -> StoredExperiment:
            begun.refuse_cleared(session)
            new = entry
            if above is not None:
                new = replace(entry, element=entry.element.model_copy(update={"parent": _there(above, parent)}))
            before = told.stored(session, new.element)
            if before is None and own is not None and session.find_key(own) is not None:
                # Another client stored it since the import began.
                try:
                    before = keys.first_answer(session, own, new.element, None)
                except ConflictError as error:
                    raise RefusedError(str(error)) from error
            if before is not None:
                return before
            place = begun.place(session, source)
            if novelty is not None and place == source:
                # Among the same indices it says what it said there.
                new = replace(new, evidence=new.evidence.model_copy(update={"novelty": novelty}))
            try:
                stored = keep(session, new, place)
            except RefusedError as error:
                above_here = new.element.parent
                if above_here is None or session.parents([above_here]):
                    raise
                # It names the index here, which is no index of the file.
                raise RefusedError(f"its parent {parent} was removed since it was stored") from error
            told.keep(session, {"index": stored.index, "name": stored.name})
            return stored

        taken.stored = self.memory.submit_entry(work)
        if source is not None:
            self._known[source] = taken
        self._wait_for(number, source, taken.stored)

    def _has(self, source: int) -> bool:
        """Whether an element of the file with this index was taken."""
        return source in self._known or source in self._waiting

    def _submitted(self, source: Any, role: str) -> _Taken | int:
        """The element that the file calls `source`, or its index here, where it is known already.

        Args:
            role: what it is to the line, for the refusal.
        """
        if not is_integer(source):
            raise RefusedError(f"expected {role} as the index of an element, an integer, got {str(source)[:40]}")
        if source not in self._known:
            was = "was refused" if source in self._unfit or source in self._waiting else "is no element of the file"
            raise RefusedError(f"{role} {str(source)[:40]} {was}")
        found = self._known[source]
        if found is None:
            raise RefusedError(f"{role} {source} was refused")
        return found

    def _wait_for(self, number: int, source: int | None, future: Future[StoredExperiment] | Future[bool]) -> None:
        self._open.append((number, source, future))
        if len(self._open) > _OPEN:
            self._settle()

    def _settle(self) -> None:
        number, source, future = self._open.popleft()
        index: int | None = None
        try:
            outcome = future.result()
        except RefusedError as error:
            self.refuse(number, str(error))
        else:
            created = outcome if isinstance(outcome, bool) else outcome.created
            self.stored += created
            self.repeated += not created
            index = None if isinstance(outcome, bool) else outcome.index
        if source is not None:
            self._known[source] = index

    # What lies beside them

    def _usage(self, number: int, record: Usage, its: int | None) -> None:
        """Removing all elements leaves usage where it is: what lies under the same number already is not added.

        Args:
            its: its number in the store that was exported.
        """
        index: _Taken | int | None = None
        if record.index in self._known:
            index = self._known[record.index]
        elif self._begun.whole:
            index = record.index
        told, begun = self._told(number, record.model_dump(mode="json")), self._begun

        def work(session: Session) -> bool:
            begun.refuse_cleared(session)
            there = [] if its is None else session.ledger.usage(its - 1, 1)
            if told.before(session) is not None or there == [(its, record)]:
                return False
            here = index.found() if isinstance(index, _Taken) else index
            session.ledger.put_usage([record.model_copy(update={"index": here})])
            told.keep(session, {})
            return True

        self._wait_for(number, None, self.memory.store.submit(work))

    def _answer(self, number: int, route: str, key: str, body: dict[str, Any]) -> None:
        """What a write was answered. It names indices, which are the same in a store that becomes the exported one;
        what a route answered is believed of a backup only."""
        if not self._begun.whole or not (self.backup or keys.is_note(route, body)):
            self.left_out += 1
            return
        begun = self._begun

        def work(session: Session) -> bool:
            begun.refuse_cleared(session)
            if session.answer(route, key) is not None:
                return False
            session.put_answer(route, key, body)
            return True

        self._wait_for(number, None, self.memory.store.submit(work))

    def _baseline(self, number: int, baseline: Baseline) -> None:
        """A late repetition must not make an old baseline the newest."""
        kept: list[int] = []

        def work(session: Session) -> dict[str, Any]:
            kept.append(self.memory.keep_baseline(session, baseline))
            return {}

        self.memory.once(_IMPORT, self._key(number), work, sha256_text(baseline.model_dump_json()))
        self.memory.rescore_soon()
        self.stored += len(kept) > 0
        self.repeated += not kept

    def _candidates(self, number: int, value: dict[str, Any]) -> None:
        """The set, and the counters beside it. In a store that becomes the exported one it is the set of that, whatever
        was merged while its elements came."""
        members = value["candidates"]
        if not isinstance(members, list):
            raise RefusedError("expected candidates as a list of indices")
        last, merged = _counter(value, "last_index"), _counter(value, "merged_through")
        self.memory.settling.settle()
        indices: dict[int, Any] = {}
        for member in members:
            try:
                indices.setdefault(_there(self._submitted(member, "candidate"), member, "candidate"), member)
            except RefusedError as error:
                self.refuse(number, str(error))
        candidates, begun, whole = self.memory.candidates, self._begun, self._begun.whole

        def work(session: Session) -> dict[str, Any]:
            begun.refuse_cleared(session)
            refused = []
            there = []
            for index, member in indices.items():
                if session.evidence(index) is None:
                    refused.append(f"candidate {member} was removed since it was stored")
                else:
                    there.append(index)
            if whole:
                session.ledger.reserve(last + 1)
                full = f"the candidate set is full ({candidates.capacity})"
                over = candidates.take_over(session, there, merged)
                return {"refused": refused + [f"candidate {indices[index]}: {full}" for index in over]}
            for index in there:
                try:
                    candidates.add(session, index)
                except RefusedError as error:  # it says so before it changes the set
                    refused.append(f"candidate {indices[index]}: {error}")
            return {"refused": refused}

        # The elements of a repeated file are told by their own lines; what has become of the set since stays.
        answer = self.memory.once(_IMPORT, self._key(number), work, sha256_text(json.dumps(members)))
        for reason in answer["refused"]:
            self.refuse(number, reason)

    def _key(self, number: int) -> str | None:
        return None if self.key is None else f"{self.key}:{number}"

    def _told(self, number: int, value: dict[str, Any]) -> Told:
        text = json.dumps(value, sort_keys=True) if self.compared and self.key is not None else None
        return Told(self._key(number), None if text is None else sha256_text(text))


def _counter(value: dict[str, Any], name: str) -> int:
    """An index up to which something counts, beside the candidates; 0 where it is not told.

    Raises:
        RefusedError: it is none.
    """
    found = value.get(name, 0)
    if not is_integer(found) or not 0 <= found <= HIGHEST_KEPT:
        raise RefusedError(f"expected {name} as an integer from 0 to {HIGHEST_KEPT}, got {str(found)[:40]}")
    return int(found)


def _there(found: _Taken | int, source: Any, role: str = "its parent") -> int:
    """The index here of an element that the file calls `source`, as the write that is asking sees it.

    Raises:
        RefusedError: it was refused.
    """
    index = found.found() if isinstance(found, _Taken) else found
    if index is None:
        raise RefusedError(f"{role} {source} was refused")
    return index
