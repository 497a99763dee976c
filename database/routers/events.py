"""Changes as they happen: as a page, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from database.answers import EventPage
from database.ledger import Event
from database.memory import Memory
from database.routers import MemoryDep
from database.store import MAX_INDEX, Session

__all__ = ["router"]

router = APIRouter(prefix="/v2", tags=["v2"])
_POLL_SECONDS = 0.2
_PAGE = 500
Cursor = Annotated[int, Query(ge=0, le=MAX_INDEX, description="id of the last event seen")]


@router.get("/events")
def list_events(memory: MemoryDep, after: Cursor = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> EventPage:
    """Changes since a cursor, oldest first; `next` is the cursor to go on from. Where `oldest` is above the cursor by
    more than one, events in between are no longer kept."""

    def work(session: Session) -> EventPage:
        found = session.ledger.events(after, limit)
        oldest, last = session.ledger.event_span()
        following = found[-1].id if found else min(after, last) if last else after
        return EventPage.model_validate(
            {"events": [asdict(event) for event in found], "next": following, "oldest": oldest, "last": last}
        )

    return memory.store.read(work)


@router.get("/events/stream", response_class=EventSourceResponse)
async def stream_events(
    memory: MemoryDep,
    request: Request,
    after: Annotated[
        int | None, Query(ge=0, le=MAX_INDEX, description="id of the last event seen; unset: from now on")
    ] = None,
    last_event_id: Annotated[
        str | None, Header(description="as after; a browser sends it when it connects again")
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: each change with its id, its kind as the event's name, and {index, time, data} as data."""
    cursor = after
    if last_event_id is not None and last_event_id.isdecimal() and int(last_event_id) <= MAX_INDEX:
        cursor = int(last_event_id)
    if cursor is None:
        cursor = await run_in_threadpool(_last, memory)
    while not request.app.state.closing.is_set():
        found = await run_in_threadpool(_following, memory, cursor)
        for event in found:
            data = {"index": event.index, "time": event.time, "data": event.data}
            yield ServerSentEvent(data=data, event=event.kind, id=str(event.id))
            cursor = event.id
        if len(found) < _PAGE:
            await asyncio.sleep(_POLL_SECONDS)


def _last(memory: Memory) -> int:
    return memory.store.read(lambda session: session.ledger.event_span()[1])


def _following(memory: Memory, cursor: int) -> list[Event]:
    return memory.store.read(lambda session: session.ledger.events(cursor, _PAGE))
