"""All elements and their parents as one state, parents first: what an export writes, whatever is changed meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from database.store import CLEARED, Store

__all__ = ["Forest", "parents_first", "read_forest"]

_LOOKS = 10
"""How often what does not fit together is read again."""


@dataclass(frozen=True)
class Forest:
    """Which elements there were, and what each lay below then."""

    parents: dict[int, int | None]
    """By index: each parent is an element of it, and nothing is its own ancestor."""
    order: list[int]
    """By index, but for those whose parent comes later: they follow it."""
    cleared: int | None
    """How often everything had been removed before."""


def read_forest(store: Store) -> Forest:
    """In one read, of which nothing is left open. Where reads are no snapshot (MongoDB) it may find an element below
    one that was removed before it came there, or two that changed places each below the other: those are read again.
    What still does not fit together is broken in the store as well, and becomes a root."""
    # Before the elements: those of after a removal of everything are no part of it.
    cleared, parents = store.read(lambda session: (session.state(CLEARED), session.parents()))
    order, left = parents_first(parents)
    for _ in range(_LOOKS):
        if not left:
            break
        doubtful = _doubtful(parents, left)
        found = store.read(lambda session, asked=doubtful: session.parents(asked))  # type: ignore[misc]
        for index in doubtful:
            parents.pop(index, None)
        parents |= found
        order, left = parents_first(parents)
    if left:
        _make_roots(parents, left)
        order, left = parents_first(parents)
    return Forest(parents, order, cleared)


def parents_first(parents: dict[int, int | None]) -> tuple[list[int], list[int]]:
    """The elements as a `Forest` orders them, and those that have no place in it: their parent is none of them, or they
    are their own ancestors, or they lie below such ones."""
    order: list[int] = []
    placed: set[int] = set()
    waiting: dict[int, list[int]] = {}
    for index in sorted(parents):
        parent = parents[index]
        if parent is not None and parent not in placed:
            waiting.setdefault(parent, []).append(index)
            continue
        ready = [index]
        while ready:
            at = ready.pop()
            placed.add(at)
            order.append(at)
            ready += waiting.pop(at, [])[::-1]
    return order, sorted(index for below in waiting.values() for index in below)


def _doubtful(parents: dict[int, int | None], left: list[int]) -> list[int]:
    """What to read again: elements below one that is not there, and that one, which may be new; without any, those of
    circles, and what lies below them."""
    missing = {index: parent for index in left if (parent := parents[index]) is not None and parent not in parents}
    return sorted({*missing, *missing.values()}) if missing else left


def _make_roots(parents: dict[int, int | None], left: list[int]) -> None:
    """Makes a root of each whose parent is not there, and of one in each circle."""
    seen: set[int] = set()
    for start in left:
        trail: set[int] = set()
        at: int | None = start
        while at is not None and at not in seen:
            seen.add(at)
            trail.add(at)
            above = parents[at]
            if above is not None and (above not in parents or above in trail):
                parents[at] = above = None
            at = above
