"""The service itself: description, health, statistics, repair, and the vector index."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from common.errors import StoreError
from database.answers import (
    ApiResponse,
    Described,
    ExtendedStats,
    Health,
    IndexNumbers,
    JudgeState,
    OrphansCleaned,
    Plain,
    Ready,
    Repaired,
    Stats,
    VectorsRebuilt,
)
from database.memory import Memory
from database.routers import IdempotencyKey, MemoryDep, answered, answered_before
from database.routers.route import ThreadRoute
from database.routers.threads import awaits
from database.store import Session, Sizes, UncountedError, Where

__all__ = ["VERSION", "router"]

VERSION = "0.1.0"
router = APIRouter(tags=["service"], route_class=ThreadRoute)


@router.get("/")
def describe(request: Request) -> ApiResponse[Described]:
    """What this is and where its description lies."""
    return ApiResponse(
        message="architecture database",
        data={"version": VERSION, "docs": "/docs", "redoc": "/redoc", "port": request.app.state.port},
    )


@router.get("/health", response_model=Health)
def health(memory: MemoryDep) -> dict[str, Any] | JSONResponse:
    """healthy with the number of elements, null while these are counted; 503 when the store does not answer."""
    timestamp = datetime.now(UTC).isoformat(timespec="seconds")
    total: int | None
    try:
        total = memory.store.read(lambda session: session.count())
    except UncountedError:
        total = None
    except StoreError as error:
        body = {
            "success": False,
            "message": error.message,
            "detail": str(error),
            "status": "unhealthy",
            "timestamp": timestamp,
            "database": {"connected": False, "total_records": 0},
        }
        return JSONResponse(body, status_code=503)
    return {"status": "healthy", "timestamp": timestamp, "database": {"connected": True, "total_records": total}}


@router.get("/ready", response_model=Ready)
@awaits("store")
def ready(request: Request) -> Ready:
    """ready when a write is taken now; 503 or 507 while the store is locked, read-only, full or away. It is found out
    by a write, once a second at most: who asks in between gets the same answer."""
    request.app.state.readiness.require()
    return Ready(status="ready")


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(memory: MemoryDep, request: Request) -> PlainTextResponse:
    """Counters in Prometheus' text format: requests by route and status, their time, what is stored."""
    text = memory.store.read(request.app.state.metrics.text)
    return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/stats")
def stats(memory: MemoryDep) -> Stats:
    """Counts and bytes, under the published names."""
    return Stats.model_validate(memory.store.read(lambda session: _published(session, session.sizes())))


def _published(session: Session, sizes: Sizes) -> dict[str, Any]:
    total = session.count()
    return {
        "total_records": total,
        "unique_names": session.unique_names(),
        "database_size": sizes.database,
        "collection_size": sizes.documents,
        "index_size": sizes.index,
        "storage_size": sizes.storage,
        "average_object_size": sizes.documents / total if total else 0,
        "database_name": sizes.database_name,
        "collection_name": sizes.collection_name,
    }


@router.get("/v2/stats", tags=["v2"])
def extended_stats(memory: MemoryDep) -> ExtendedStats:
    """As /stats, with what still waits: motivations to embed, elements without a score or with an outdated one; who
    judges, and what went wrong; and the candidate set."""

    def work(session: Session) -> dict[str, Any]:
        # Once: asked again, they may have been measured meanwhile.
        sizes = session.sizes()
        return _published(session, sizes) | {
            "sizes_measured_at": sizes.measured_at,
            "pending_embeddings": session.count(Where(pending=True)),
            "unscored": session.count(Where(unscored=True)),
            "stale_scores": memory.scores.stale_count(session),
            "incomplete": session.count(Where(incomplete=True)),
            "embedding_model": session.vector_state().model,
            "embedding_error": memory.guard.last_error,
            "judge": _judge(memory),
            "vector_index": asdict(memory.index.stats(session)),
            "candidates": memory.candidates.stats(session),
        }

    return ExtendedStats.model_validate(memory.store.read(work))


def _judge(memory: Memory) -> JudgeState:
    judging = memory.judging
    if judging is None:
        return {"backend": "rubric", "model": None, "failed": 0, "error": None}
    return {"backend": "llm", "model": judging.model, "failed": judging.failed, "error": judging.last_error}


@router.post("/repair")
def repair(memory: MemoryDep, request: Request, key: IdempotencyKey = None) -> ApiResponse[Repaired]:
    """Checks the storage and derives again what can be derived: scores, evidence, completeness, hashes, counts,
    parents, candidates; what lacks vectors or a sketch is embedded again."""
    before = answered_before(memory, request, key)
    if before is not None:
        return before
    data = memory.repair()
    sound = "sound" if not data["storage_problems"] else "damaged: restore a backup"
    message = f"{data['elements']} elements checked; the storage is {sound}; scores are computed again"
    answer = answered(memory, request, key, lambda _: (message, data))
    memory.store.read(memory.index.rebuild)
    return answer


@router.post("/faiss/rebuild", tags=["faiss"])
def rebuild_index(memory: MemoryDep, request: Request, key: IdempotencyKey = None) -> ApiResponse[VectorsRebuilt]:
    """Embeds what is pending or lacks its vectors, as far as possible, and builds the vector index anew from the
    store."""
    before = answered_before(memory, request, key)
    if before is not None:
        return before
    memory.embed_again()
    remaining = memory.settling.settle()
    found = memory.store.read(memory.index.rebuild)
    message = f"the index holds {found.vectors} vectors of {found.elements} elements"
    data = {"total_vectors": found.vectors, "active_mappings": found.active, "pending": remaining}
    return answered(memory, request, key, lambda _: (message, data))


@router.get("/faiss/stats", tags=["faiss"])
@awaits("embedding")
def index_stats(memory: MemoryDep) -> Plain[IndexNumbers]:
    """What the vector index holds now; several vectors an element where its motivation is long. `total_vectors` is
    `active_mappings`, those of elements that are there, plus `orphan_vectors`, those of removed ones, which no search
    finds and which are dropped sooner or later."""
    return Plain(data=_index_data(memory))


def _index_data(memory: Memory) -> IndexNumbers:
    # What cannot be written now, on a full disk, stays pending, as is told.
    with contextlib.suppress(StoreError):
        memory.settling.settle()
    found = memory.store.read(memory.index.stats)
    pending = memory.store.read(lambda session: session.count(Where(pending=True), limit=1))
    return {
        "total_vectors": found.vectors,
        "dimension": found.dimension,
        "index_type": "IP",
        "active_mappings": found.active,
        "orphan_vectors": found.orphans,
        "next_index": found.vectors,
        "health_status": "pending" if pending else "healthy",
    }


@router.post("/faiss/clean-orphans", tags=["faiss"])
def clean_orphans(memory: MemoryDep, request: Request, key: IdempotencyKey = None) -> ApiResponse[OrphansCleaned]:
    """Drops vectors of elements that are gone. `total_vectors` and `orphan_vectors` are what is held afterwards."""
    before = answered_before(memory, request, key)
    if before is not None:
        return before
    found = memory.store.read(memory.index.clean)
    data = {"total_vectors": found.active, "orphan_vectors": 0, "cleaned": found.orphans}
    return answered(memory, request, key, lambda _: (f"{found.orphans} vectors dropped", data))
