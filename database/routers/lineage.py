"""The exploration tree: relatives, paths, UCT."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from database import tree
from database.answers import ApiResponse, Moved, UctRow
from database.models import Context, Element, ParentChange, TreeStructure
from database.routers import IdempotencyKey, MemoryDep, Whole, answered
from database.routers.listing import listed
from database.routers.route import ThreadRoute
from database.store import Session, Where

__all__ = ["router"]

router = APIRouter(tags=["tree"], route_class=ThreadRoute)
Exploration = Annotated[float, Query(gt=0, le=10, allow_inf_nan=False)]


@router.get("/elements/roots", response_model=list[Element])
def roots(memory: MemoryDep) -> Response:
    """Elements without a parent."""
    return memory.store.read(
        lambda session: listed(session, [facts.index for facts in session.facts(Where(roots=True))])
    )


@router.get("/elements/uct-select")
def uct_select(memory: MemoryDep, c_param: Exploration = 1.414) -> Element:
    """The element UCT would expand next. While leaves are infinite that is the oldest leaf, whatever c_param is."""
    return memory.store.read(lambda session: tree.element_of(session, tree.uct_select(session)))


@router.get("/elements/uct-scores", response_model=list[UctRow])
def uct_scores(memory: MemoryDep, c_param: Exploration = 1.414) -> list[dict[str, Any]]:
    """The UCT score of every element, highest first; elements without children are "infinite"."""
    return memory.store.read(lambda session: tree.uct_scores(session, c_param))


@router.get("/elements/context/{parent}")
def context(memory: MemoryDep, parent: Whole) -> ApiResponse[Context]:
    """The parent, its own parent, and its two children that have most children."""
    found = memory.store.read(lambda session: tree.context(session, parent))
    return ApiResponse(message=f"relatives of a child of element {parent}", data=found)


@router.post("/elements/{index}/set-parent")
def set_parent(
    memory: MemoryDep, request: Request, index: Whole, change: ParentChange, key: IdempotencyKey = None
) -> ApiResponse[Moved]:
    """Re-attaches an element; refuses what would close a cycle."""

    def work(session: Session) -> tuple[str, object]:
        tree.set_parent(session, index, change.parent_index)
        return f"element {index} is re-attached", {"child_index": index, "parent_index": change.parent_index}

    return answered(memory, request, key, work, change)


@router.get("/elements/{index}/children", response_model=list[Element])
def children(memory: MemoryDep, index: Whole) -> Response:
    """The children, oldest index first; [] when there are none."""

    def work(session: Session) -> Response:
        tree.facts_of(session, index)
        return listed(session, [facts.index for facts in session.facts(Where(parent=index))])

    return memory.store.read(work)


@router.get("/elements/{index}/path", response_model=list[Element])
def path(memory: MemoryDep, index: Whole) -> Response:
    """From the root down to the element."""
    return memory.store.read(lambda session: listed(session, tree.path(session, index)))


@router.get("/tree-structure", response_model=TreeStructure)
def tree_structure(memory: MemoryDep, root_index: Whole | None = None) -> Response:
    """Every tree, or the one below root_index."""
    text = memory.store.read(lambda session: tree.tree_json(session, root_index))
    return Response(text, media_type="application/json")
