"""The exploration tree: relatives of a design, paths, UCT, and surgery that keeps it a forest."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from database.errors import NotFoundError, RefusedError, VanishedError
from database.models import Context, Element
from database.store import Facts, Session, Where

__all__ = [
    "context",
    "detach",
    "path",
    "set_parent",
    "tree_json",
    "uct_scores",
    "uct_select",
]

INFINITE = "infinite"


def facts_of(session: Session, index: int) -> Facts:
    """The facts of one element.

    Raises:
        NotFoundError: there is none.
    """
    found = session.facts(Where(index=index), limit=1)
    if not found:
        raise NotFoundError(f"there is no element {index}")
    return found[0]


def known(session: Session, indices: Sequence[int]) -> list[Facts]:
    """The facts of those that exist, in the order asked."""
    return [facts for index in indices for facts in session.facts(Where(index=index), limit=1)]


def path(session: Session, index: int) -> list[int]:
    """Indices from the root down to `index`."""
    steps = {index: None}
    parent = facts_of(session, index).parent
    while parent is not None and parent not in steps:
        steps[parent] = None
        try:
            parent = facts_of(session, parent).parent
        except NotFoundError as error:
            raise VanishedError(f"element {parent} was deleted while its tree was read", "ask again") from error
    return [*steps][::-1]


def element_of(session: Session, index: int) -> Element:
    """The element `index`, which was just seen.

    Raises:
        VanishedError: it was deleted since; only a store whose reads are no snapshot (MongoDB) lets that be seen.
    """
    found = session.elements([index])
    if not found:
        raise VanishedError(f"element {index} was deleted while it was read", "ask again")
    return found[0]


def context(session: Session, parent: int) -> Context:
    """What a child of `parent` is compared with: the parent, its own parent, and the parent's two children that have
    most children."""
    above = facts_of(session, parent).parent
    grandparent = [] if above is None else session.elements([above])
    return Context(
        direct_parent=element_of(session, parent),
        grandparent=grandparent[0] if grandparent else None,
        strongest_siblings=session.elements(session.strongest_children(parent, 2)),
    )


def set_parent(session: Session, child: int, parent: int | None) -> None:
    """Re-attaches one element.

    Raises:
        NotFoundError: there is no such child.
        RefusedError: the parent does not exist, or lies below the child.
    """
    facts_of(session, child)
    if parent is not None:
        try:
            above = path(session, parent)
        except NotFoundError as error:
            raise RefusedError(f"expected the index of a stored element as parent, got {parent}") from error
        if child in above:
            raise RefusedError(f"element {parent} is element {child} or below it: that would close a cycle")
    session.set_parent([child], parent)


def detach(session: Session, gone: Sequence[int]) -> int:
    """Re-attaches the children of elements that are about to go to their nearest ancestor that stays; returns how
    many moved."""
    leaving = set(gone)
    parents = {index: facts_of(session, index).parent for index in gone}
    counts = session.child_counts(gone)
    moved = 0
    for index in gone:
        if not counts.get(index):
            continue
        target = parents[index]
        while target is not None and target in leaving:
            target = parents[target]
        children = [child.index for child in session.facts(Where(parent=index)) if child.index not in leaving]
        session.set_parent(children, target)
        moved += len(children)
    return moved


def uct_select(session: Session) -> int:
    """The element UCT chooses. A forest always has a childless element, whose term is infinite; ties go to the first.

    Raises:
        NotFoundError: the store is empty.
    """
    leaf = session.oldest_leaf()
    if leaf is None:
        raise NotFoundError("there are no elements yet")
    return leaf


def uct_scores(session: Session, c: float) -> list[dict[str, Any]]:
    """benchmark mean + c sqrt(ln(max(N - 1, 1)) / children) of every element, best first, childless ones first of all.

    An element without a benchmark mean has no score and comes last.
    """
    elements = session.facts()
    children = session.child_counts()
    growth = math.log(max(len(elements) - 1, 1))
    rows: list[tuple[tuple[int, float, int], dict[str, Any]]] = []
    for facts in elements:
        count = children.get(facts.index, 0)
        term = c * math.sqrt(growth / count) if count else None
        uct = None if term is None or facts.benchmark is None else facts.benchmark + term
        row = {
            "index": facts.index,
            "name": facts.name,
            "base_score": facts.benchmark,
            "n_node": count,
            "exploration_term": INFINITE if term is None else term,
            "uct_score": uct if count else INFINITE,
            "summary": facts.summary,
        }
        group = 0 if not count else 1 if uct is not None else 2
        rows.append(((group, -(uct or 0.0), facts.index), row))
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def tree_json(session: Session, root: int | None) -> str:
    """{success, data} of the whole forest or the tree below `root`, as JSON text.

    Written without recursion: a lineage may be deeper than any recursion limit.
    """
    if root is not None:
        facts_of(session, root)
    below: dict[int | None, list[Facts]] = defaultdict(list)
    known: dict[int, Facts] = {}
    for facts in session.facts():
        known[facts.index] = facts
        below[facts.parent].append(facts)
    tops = [known[root]] if root is not None else below[None]
    pieces: list[str] = []
    stack: list[Facts | str] = []
    for position, top in enumerate(tops):
        stack += [top] if position == 0 else [",", top]
    stack.reverse()
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            pieces.append(item)
            continue
        element = {"index": item.index, "name": item.name, "time": item.time, "parent": item.parent}
        pieces.append(f'{{"element":{json.dumps(element)},"children":[')
        stack.append("]}")
        children = below[item.index]
        for position in range(len(children) - 1, -1, -1):
            stack.append(children[position])
            if position:
                stack.append(",")
    trees = "".join(pieces)
    data = trees if root is not None else f'{{"trees":[{trees}],"total_roots":{len(tops)}}}'
    return f'{{"success":true,"data":{data}}}'
