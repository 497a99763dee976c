"""Idempotency keys of stored elements: a repeated write is answered as the first was, and stores nothing.

A key lies with its element. An element that is removed leaves a note under its key, so that a late repetition does not
store it anew; emptying the store takes the notes along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.files import sha256_text
from database import tree
from database.errors import ConflictError, key_used
from database.models import Element, NewElement, StoredExperiment, read_time
from database.store import Session

__all__ = [
    "IMPORTS",
    "OF_ELEMENTS",
    "OF_IMPORTS",
    "first_answer",
    "is_note",
    "keep_body",
    "note_removal",
    "removed",
]

IMPORTS = ("import", "import begun")
"""Under which routes it is kept what became of the lines of an import, and how it found the store."""
OF_IMPORTS = "import:"
"""How the key of an imported element began in an earlier release."""
OF_ELEMENTS = ("elements:", "experiments:")
"""How the key of an element begins: by the route that stored it."""

_BODIES = "body of"
_REMOVED = "removed under"
_REQUEST = "request_sha256"
_PAGE = 100


def first_answer(session: Session, key: str, wanted: NewElement, body: str | None) -> StoredExperiment | None:
    """What the first write with this key was answered; None where there was none. The score is that of now, None of
    what is removed.

    Args:
        body: a hash of the request that a repetition has to have as well; None where only the program counts.

    Raises:
        ConflictError: it had another program, or another body.
    """
    facts, element = session.find_key(key), None
    if facts is not None:
        stored = StoredExperiment(index=facts.index, name=facts.name, score=facts.score, created=False)
        element = tree.element_of(session, facts.index)
        program = sha256_text(element.program)
    else:
        note = removed(session, key)
        if note is None:
            return None
        stored = StoredExperiment(index=note["index"], name=note["name"], score=None, created=False)
        program = note["program_sha256"]
    if program != sha256_text(wanted.program):
        raise _used(key, stored, "which is another program")
    before = session.answer(_BODIES, key)
    if before is not None and before[_REQUEST] != body and not _differs_in_form_only(element, wanted):
        raise _used(key, stored, "with another body")
    return stored


def _differs_in_form_only(stored: Element | None, wanted: NewElement) -> bool:
    """Whether both are the same element but for the form of its time, which an earlier release stored, and hashed, as
    it came."""
    if stored is None or stored.time == wanted.time:
        return False
    try:
        time = read_time(stored.time)
    except ValueError:
        return False
    return stored.model_dump(exclude={"index"}) | {"time": time} == wanted.model_dump()


def keep_body(session: Session, key: str, body: str) -> None:
    """Notes the hash of the request, which `first_answer` compares."""
    session.put_answer(_BODIES, key, {_REQUEST: body})


def note_removal(session: Session, indices: Sequence[int]) -> None:
    """To be called before these elements are removed."""
    keys = session.keys(indices)
    keyed = list(keys)
    for start in range(0, len(keyed), _PAGE):
        for element in session.elements(keyed[start : start + _PAGE]):
            note = {"index": element.index, "name": element.name, "program_sha256": sha256_text(element.program)}
            session.put_answer(_REMOVED, keys[element.index], note)


def removed(session: Session, key: str) -> dict[str, Any] | None:
    """{index, name, program_sha256} of a removed element that was stored under this key."""
    return session.answer(_REMOVED, key)


def is_note(route: str, body: dict[str, Any]) -> bool:
    """Whether this answer is one of the notes that are kept here under the key of an element."""
    forms: dict[str, dict[str, type]] = {
        _BODIES: {_REQUEST: str},
        _REMOVED: {"index": int, "name": str, "program_sha256": str},
    }
    form = forms.get(route, {})
    return bool(form) and body.keys() == form.keys() and all(type(body[name]) is form[name] for name in form)


def _used(key: str, stored: StoredExperiment, what: str) -> ConflictError:
    return key_used(key.partition(":")[2], f"element {stored.index} ({stored.name}), {what}")
