"""Elements: adding, finding, ranking, removing."""

from __future__ import annotations

import random
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathArgument

from database import repair, tree
from database.answers import ApiResponse, Cleaned, Deleted, OneScore, Stored
from database.errors import NotFoundError, RefusedError
from database.models import Element, PostedElement, ScoredElement
from database.routers import IdempotencyKey, MemoryDep, Whole, answered, body_hash, submitted
from database.routers.listing import listed
from database.routers.route import ThreadRoute, reads_body
from database.routers.threads import awaits
from database.store import MAX_INDEX, Session, Where

__all__ = ["check_range", "router"]

router = APIRouter(tags=["elements"], route_class=ThreadRoute)
Count = Annotated[Whole, PathArgument(ge=1, le=1000)]


@router.post("/elements")
@reads_body(PostedElement)
async def add_element(memory: MemoryDep, element: PostedElement, key: IdempotencyKey = None) -> ApiResponse[Stored]:
    """Stores an element without a run record. Answered when it is on disk; vectors and score follow."""
    if key is None:
        stored = await submitted(memory, element)
    else:
        stored = await submitted(memory, element, key=f"elements:{key}", body=body_hash(element))
    return ApiResponse(message=f"element {stored.index} is stored", data={"name": stored.name, "index": stored.index})


@router.get("/elements/sample")
def sample_element(memory: MemoryDep) -> Element:
    """One element, uniformly at random."""

    def work(session: Session) -> Element:
        chosen = session.sample()
        if chosen is None:
            raise NotFoundError("there are no elements yet")
        return tree.element_of(session, chosen)

    return memory.store.read(work)


@router.get("/elements/by-name/{name:text}", response_model=list[Element])
def elements_by_name(memory: MemoryDep, name: str) -> Response:
    """All elements of this name, oldest first; [] when there is none."""
    return memory.store.read(
        lambda session: listed(session, [facts.index for facts in session.facts(Where(name=name), "time")])
    )


@router.get("/elements/by-index/{index}")
def element_by_index(memory: MemoryDep, index: Whole) -> Element:
    """One element."""
    found = memory.store.read(lambda session: session.elements([index]))
    if not found:
        raise NotFoundError(f"there is no element {index}")
    return found[0]


@router.get("/elements/with-score/by-name/{name:text}")
@awaits("embedding")
def scored_by_name(memory: MemoryDep, name: str) -> list[ScoredElement]:
    """As by-name, each with its score, computed if it was absent; null when a term of it cannot be had."""
    found = memory.store.read(lambda session: session.facts(Where(name=name), "time"))
    return memory.scored([facts.index for facts in found])


@router.get("/elements/with-score/by-index/{index}")
@awaits("embedding")
def scored_by_index(memory: MemoryDep, index: Whole) -> ScoredElement:
    """One element with its score, computed if it was absent."""
    found = memory.scored([index])
    if not found:
        raise NotFoundError(f"there is no element {index}")
    return found[0]


@router.get("/elements/top-k/{k}", response_model=list[Element])
def top_k(memory: MemoryDep, k: Count) -> Response:
    """The k elements with the best benchmark mean, best first."""
    return memory.store.read(lambda session: listed(session, session.ranked("benchmark", limit=k)))


@router.get("/elements/sample-range/{a}/{b}/{k}", response_model=list[Element])
def sample_range(memory: MemoryDep, a: Whole, b: Whole, k: Count) -> Response:
    """k elements drawn without repetition from ranks a to b by benchmark mean, best first; all of them when fewer."""
    check_range(a, b, 10_000)

    def work(session: Session) -> Response:
        ranked = session.ranked("benchmark", limit=b - a + 1, offset=a - 1)
        return listed(session, [ranked[at] for at in draw(len(ranked), k)])

    return memory.store.read(work)


@router.get("/elements/search-similar")
@awaits("embedding")
def search_similar(
    memory: MemoryDep,
    response: Response,
    motivation: Annotated[str, Query(min_length=1)],
    top_k: Annotated[Whole, Query(ge=1, le=20)] = 5,
) -> list[Element]:
    """The elements whose motivation is nearest to this one, nearest first.

    What is pending is embedded first, within 3 s; the header Pending-Embeddings says how many elements remain.
    """
    found, remaining = memory.similar(motivation, top_k)
    response.headers["Pending-Embeddings"] = str(remaining)
    return found


@router.get("/elements/{index}/score")
@awaits("embedding")
def element_score(memory: MemoryDep, index: Whole) -> ApiResponse[OneScore]:
    """The score alone, computed if it was absent; null when a term of it cannot be had."""
    score = memory.score(index)
    message = "computed" if score is not None else "a term of the score cannot be computed; see /v2/elements/{i}/score"
    return ApiResponse(message=message, data={"index": index, "score": score})


@router.delete("/elements/by-index/{index}")
def delete_by_index(
    memory: MemoryDep, request: Request, index: Whole, key: IdempotencyKey = None
) -> ApiResponse[Deleted]:
    """Removes an element, its runs, vectors and candidacy; its children go to its parent."""

    def work(session: Session) -> tuple[str, object]:
        tree.facts_of(session, index)
        repair.remove(session, [index])
        return f"element {index} is removed", {"deleted_count": 1}

    return answered(memory, request, key, work)


@router.delete("/elements/by-name/{name:text}")
def delete_by_name(memory: MemoryDep, request: Request, name: str, key: IdempotencyKey = None) -> ApiResponse[Deleted]:
    """Removes every element of this name."""

    def work(session: Session) -> tuple[str, object]:
        gone = [facts.index for facts in session.facts(Where(name=name))]
        if not gone:
            raise NotFoundError(f"there is no element named {name!r}")
        repair.remove(session, gone)
        return f"{len(gone)} elements are removed", {"deleted_count": len(gone)}

    return answered(memory, request, key, work)


@router.delete("/elements/all")
def delete_all(memory: MemoryDep, request: Request, key: IdempotencyKey = None) -> ApiResponse[Deleted]:
    """Removes everything but the baselines; the next index is 1."""

    def work(session: Session) -> tuple[str, object]:
        # With a limit it is answered, too, while elements are counted.
        count = session.count(limit=MAX_INDEX)
        session.clear()
        return f"{count} elements are removed", {"deleted_count": count}

    return answered(memory, request, key, work)


@router.post("/elements/clean-invalid")
def clean_invalid(memory: MemoryDep, request: Request, key: IdempotencyKey = None) -> ApiResponse[Cleaned]:
    """Removes the elements whose train or test row is missing or has an empty cell."""

    def work(session: Session) -> tuple[str, object]:
        data = repair.clean_invalid(session)
        return f"{data['cleaned_count']} incomplete elements are removed", data

    return answered(memory, request, key, work)


def check_range(a: int, b: int, widest: int) -> None:
    """Refuses ranks that make no range.

    Raises:
        RefusedError: a < 1, b < a, or more than `widest` ranks.
    """
    if a < 1 or b < a or b - a + 1 > widest:
        raise RefusedError(f"expected ranks 1 <= a <= b with at most {widest} of them, got {a} to {b}")


def draw(population: int, k: int) -> list[int]:
    """k of `population` positions, without repetition, in order."""
    return sorted(random.sample(range(population), min(k, population)))
