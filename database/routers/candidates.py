"""The candidate set."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi import Path as PathArgument

from database.answers import ApiResponse, CandidateNumbers, Deleted, Merged, OneIndex, Plain, Rebuilt, Waiting
from database.errors import NotFoundError
from database.models import Element, ScoredElement
from database.routers import IdempotencyKey, MemoryDep, Whole, answered
from database.routers.elements import check_range, draw
from database.routers.listing import listed
from database.routers.route import ThreadRoute
from database.store import Session

__all__ = ["router"]

router = APIRouter(prefix="/candidates", tags=["candidates"], route_class=ThreadRoute)
Count = Annotated[Whole, PathArgument(ge=1, le=50)]


@router.get("/stats", response_model=Plain[CandidateNumbers])
def candidate_stats(memory: MemoryDep) -> Any:
    """Size, threshold, what waits to be merged, and the scores; an empty set has no scores."""
    data = memory.store.read(memory.candidates.stats)
    return Plain(data={name: value for name, value in data.items() if name != "cold_start"})


@router.get("/new-data-count")
def new_data_count(memory: MemoryDep) -> ApiResponse[Waiting]:
    """Elements stored since the candidates were last merged."""
    count = memory.store.read(memory.candidates.new_count)
    return ApiResponse(message=f"{count} elements since the last update", data={"new_data_count": count})


@router.get("/top-k/{k}", response_model=list[Element])
def candidate_top_k(memory: MemoryDep, k: Count) -> Response:
    """The k best candidates, best score first."""
    return memory.store.read(
        lambda session: listed(session, [facts.index for facts in memory.candidates.ranked(session)[:k]])
    )


@router.get("/all", response_model=list[ScoredElement])
def all_candidates(memory: MemoryDep) -> Response:
    """The whole set with scores, best first."""

    def work(session: Session) -> Response:
        current = memory.candidates.ranked(session)
        scores = {facts.index: facts.score for facts in current}
        return listed(session, list(scores), scores)

    return memory.store.read(work)


@router.get("/sample-range/{a}/{b}/{k}", response_model=list[Element])
def candidate_sample_range(memory: MemoryDep, a: Whole, b: Whole, k: Count) -> Response:
    """k candidates drawn without repetition from ranks a to b, best first; fewer when the set is smaller."""
    check_range(a, b, 50)

    def work(session: Session) -> Response:
        ranked = memory.candidates.ranked(session)[a - 1 : b]
        return listed(session, [ranked[at].index for at in draw(len(ranked), k)])

    return memory.store.read(work)


@router.post("/{index}/add")
def add_candidate(
    memory: MemoryDep, request: Request, index: Whole, key: IdempotencyKey = None
) -> ApiResponse[OneIndex]:
    """Puts an element into the set by hand."""
    memory.settling.settle()

    def work(session: Session) -> tuple[str, object]:
        memory.candidates.add(session, index)
        return f"element {index} is a candidate", {"index": index}

    return answered(memory, request, key, work)


@router.put("/{index}")
def update_candidate(
    memory: MemoryDep, request: Request, index: Whole, key: IdempotencyKey = None
) -> ApiResponse[OneIndex]:
    """Scores a candidate again."""

    def work(session: Session) -> tuple[str, object]:
        memory.candidates.refresh(session, index)
        return f"candidate {index} is scored again", {"index": index}

    return answered(memory, request, key, work)


@router.delete("/by-index/{index}")
def remove_candidate(
    memory: MemoryDep, request: Request, index: Whole, key: IdempotencyKey = None
) -> ApiResponse[OneIndex]:
    """Takes an element out of the set."""

    def work(session: Session) -> tuple[str, object]:
        if not memory.candidates.remove(session, index=index):
            raise NotFoundError(f"element {index} is not a candidate")
        return f"element {index} is no candidate any more", {"index": index}

    return answered(memory, request, key, work)


@router.delete("/by-name/{name:text}")
def remove_candidates_by_name(
    memory: MemoryDep, request: Request, name: str, key: IdempotencyKey = None
) -> ApiResponse[Deleted]:
    """Takes every candidate of this name out of the set."""

    def work(session: Session) -> tuple[str, object]:
        count = memory.candidates.remove(session, name=name)
        return f"{count} candidates are removed", {"deleted_count": count}

    return answered(memory, request, key, work)


@router.delete("/all")
def remove_all_candidates(memory: MemoryDep, request: Request, key: IdempotencyKey = None) -> ApiResponse[Deleted]:
    """Empties the set."""

    def work(session: Session) -> tuple[str, object]:
        count = memory.candidates.remove(session)
        return f"{count} candidates are removed", {"deleted_count": count}

    return answered(memory, request, key, work)


@router.post("/force-update")
def force_update(memory: MemoryDep, request: Request, key: IdempotencyKey = None) -> ApiResponse[Merged]:
    """Merges the newest 300 elements now, filtered and scored again."""
    memory.settling.settle()

    def work(session: Session) -> tuple[str, object]:
        report = memory.candidates.force_update(session)
        return f"{report['new_entries']} new candidates", report

    return answered(memory, request, key, work)


@router.post("/rebuild-from-scored")
def rebuild_from_scored(memory: MemoryDep, request: Request, key: IdempotencyKey = None) -> ApiResponse[Rebuilt]:
    """Makes the set anew from the best stored scores, unfiltered."""
    memory.settling.settle()
    memory.rescore()

    def work(session: Session) -> tuple[str, object]:
        data = memory.candidates.rebuild(session)
        return data["message"], data

    return answered(memory, request, key, work)
