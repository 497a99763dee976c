"""Changes as they happen: as a page, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from common.errors import StoreError
from database.answers import EventPage
from database.ledger import Event
from database.memory import Memory
from database.routers import MemoryDep, Whole
from database.routers.route import ThreadRoute
from database.store import MAX_INDEX, Session

__all__ = ["NewestEvent", "router"]

router = APIRouter(prefix="/v2", tags=["v2"], route_class=ThreadRoute)
_LOG = logging.getLogger(__name__)
_ID = re.compile(r"[0-9]{1,19}")
_POLL_SECONDS = 0.2
_UNHELD = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""No cache keeps a stream, and nginx does not hold it back."""
_COMMENT_SECONDS = 15.0
"""Proxies close a connection on which nothing comes for a while."""
_PAGE = 500
Cursor = Annotated[Whole, Query(ge=0, le=MAX_INDEX, description="id of the last event seen")]


class EventStream(StreamingResponse):
    media_type = "text/event-stream"


class NewestEvent:
    """The id of the last event, for the streams of one server: however many wait for the next, the store is asked once.

    Used in the event loop only.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._look: asyncio.Task[int | None] | None = None
        self._away = False

    async def soon(self) -> int | None:
        """As it will be in a moment; None where the store cannot be asked then."""
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._ask())
        # One of those who wait may leave.
        return await asyncio.shield(self._look)

    async def _ask(self) -> int | None:
        await asyncio.sleep(_POLL_SECONDS)
        try:
            last = await run_in_threadpool(_last, self._memory)
        except StoreError as error:
            if not self._away:
                _LOG.warning("streams of events wait for the store: %s", error)
            self._away = True
            return None
        self._away = False
        return last


@router.get("/events")
def list_events(memory: MemoryDep, after: Cursor = 0, limit: Annotated[Whole, Query(ge=1, le=1000)] = 100) -> EventPage:
    """Changes since a cursor, oldest first; `next` is the cursor to go on from. Where `oldest` is above the cursor by
    more than one, events in between are no longer kept; where `last` is below it, the store is one of before it."""

    def work(session: Session) -> EventPage:
        found = session.ledger.events(after, limit)
        oldest, last = session.ledger.event_span()
        following = found[-1].id if found else min(after, last)
        return EventPage.model_validate(
            {"events": [asdict(event) for event in found], "next": following, "oldest": oldest, "last": last}
        )

    return memory.store.read(work)


@router.get("/events/stream", response_class=EventStream)
async def stream_events(
    memory: MemoryDep,
    request: Request,
    after: Annotated[
        Whole | None, Query(ge=0, le=MAX_INDEX, description="id of the last event seen; unset: from now on")
    ] = None,
    last_event_id: Annotated[
        str | None, Header(description="as after; a browser sends it when it connects again")
    ] = None,
) -> EventStream:
    """Server-sent events: each change with its id, its kind as the event's name, and {index, time, data} as data.

    An event `gap` with {oldest, last} says that changes between those told are not kept any more, or that the cursor is
    beyond the last one, as after a restore. The stream goes on from the id of the gap.
    """
    cursor = after
    if last_event_id is not None and _ID.fullmatch(last_event_id) and int(last_event_id) <= MAX_INDEX:
        cursor = int(last_event_id)
    if cursor is None:
        # Here, so that a store that does not answer is an error of the request, not a cut stream.
        cursor = await run_in_threadpool(_last, memory)
    state = request.app.state
    return EventStream(_follow(memory, state.newest_event, cursor, state.closing.is_set), headers=_UNHELD)


async def _follow(memory: Memory, newest: NewestEvent, cursor: int, ended: Callable[[], bool]) -> AsyncIterator[str]:
    """The changes after `cursor`, told where some are missing, and a comment where there were none for a while; it ends
    with the server."""
    # Written out here: fastapi.sse sends through two tasks of its own, and where a client leaves while one of them
    # holds an event, the request ends with a BrokenResourceError.
    told, behind = time.monotonic(), True
    while not ended():
        found, oldest, last = list[Event](), 0, cursor
        if behind:
            # A store that cannot be asked is told of, and asked again, in `newest`.
            with contextlib.suppress(StoreError):
                found, oldest, last = await run_in_threadpool(_following, memory, cursor)
        # The first that is there, or the last there is.
        start = found[0].id - 1 if found else min(cursor, last)
        if start != cursor:
            cursor = start
            yield _gap(oldest, last, cursor)
            told = time.monotonic()
        for event in found:
            yield _frame(event)
            cursor = event.id
        if found:
            told = time.monotonic()
        elif time.monotonic() - told > _COMMENT_SECONDS:
            yield ": nothing new\n\n"
            told = time.monotonic()
        if len(found) < _PAGE:
            behind = await newest.soon() not in (None, cursor)


def _frame(event: Event) -> str:
    # JSON holds no line breaks, and the kinds are words of ours.
    data = json.dumps({"index": event.index, "time": event.time, "data": event.data})
    return f"event: {event.kind}\ndata: {data}\nid: {event.id}\n\n"


def _gap(oldest: int, last: int, cursor: int) -> str:
    """Whoever connects again sends its id, and is not told of the same gap twice."""
    return f"event: gap\ndata: {json.dumps({'oldest': oldest, 'last': last})}\nid: {cursor}\n\n"


def _last(memory: Memory) -> int:
    return memory.store.read(lambda session: session.ledger.event_span()[1])


def _following(memory: Memory, cursor: int) -> tuple[list[Event], int, int]:
    """The next events, and the ids of the oldest and the last that are kept."""

    def work(session: Session) -> tuple[list[Event], int, int]:
        found = session.ledger.events(cursor, _PAGE)
        # Asked after them: where reads are no snapshot, the last one cannot be before one that was found.
        return found, *session.ledger.event_span()

    return memory.store.read(work)
