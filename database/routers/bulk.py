"""Whole stores as JSON Lines, streamed."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.types import Send

from common.errors import StoreError
from database.answers import ApiResponse, Imported
from database.bulk import Importer
from database.errors import ConflictError, RefusedError
from database.exporting import export_lines
from database.routers import IdempotencyKey, MemoryDep
from database.routers.route import ThreadRoute
from database.routers.threads import apart

__all__ = ["router"]

router = APIRouter(prefix="/v2", tags=["v2"], route_class=ThreadRoute)
_LOG = logging.getLogger(__name__)
_LINES = "application/x-ndjson"
_NAMED = 10
"""Refusals that an error names."""
_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {_LINES: {"schema": {"type": "string"}}}}}


class LinesResponse(StreamingResponse):
    """Lines as they are found. Where the store fails in the middle, the connection ends without the last chunk, which
    a client notices."""

    media_type = _LINES

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except StoreError as error:
            _LOG.error("an export is cut off: %s", error)


@router.get("/export", response_class=LinesResponse)
def export_all(memory: MemoryDep) -> LinesResponse:
    """Baselines, elements with their runs and keys, usage, answers to keyed writes and the candidate set, as JSON
    Lines; /v2/import reads them again. The elements are those of one moment, parents first."""
    lines = export_lines(memory)
    # Found before the answer begins, so that a store that is away is an error and no empty export.
    first = next(lines)
    return LinesResponse(itertools.chain([first], lines))


@router.post("/import", openapi_extra=_BODY)
async def import_lines(memory: MemoryDep, request: Request, key: IdempotencyKey = None) -> ApiResponse[Imported]:
    """Stores the lines of an export, or bare elements, one by one; each line that is refused is named with its reason.

    Parents may come after their children. With an Idempotency-Key the same lines sent again are stored once; another
    text of a line ends the import (409). A line may be as long as a body elsewhere. Where every line is refused, so is
    the import (400). The first 10,000 refusals are named; `more_refused` counts the others, and is there where there
    are any. After a removal of all elements nothing more of the lines is taken.
    """
    importer = await apart("store", Importer, memory, key)
    longest = memory.settings.max_body_mb << 20
    number = given = 0
    conflict: ConflictError | None = None
    async for line in _lines(request, longest):
        if conflict is not None:
            # Read to its end: a client may not look for an answer before it has sent everything.
            continue
        number += 1
        given += line is None or bool(line.strip())
        if line is None:
            importer.refuse(number, f"expected a line of at most {longest} bytes, got more")
        else:
            try:
                await apart("store", importer.line, number, line)
            except ConflictError as error:
                conflict = error
    if conflict is not None:
        raise conflict
    await apart("store", importer.finish)
    if given and importer.refused_lines == given:
        said = [f"line {refusal.line}: {refusal.reason}" for refusal in importer.refused[:_NAMED]]
        more = [f"and {importer.refusals - _NAMED} more"] if importer.refusals > _NAMED else []
        raise RefusedError(f"no line can be stored: {'; '.join([*said, *more])}")
    message = f"{importer.stored} lines are stored, {importer.repeated} were before, {importer.refusals} are refused"
    data: Imported = {
        "stored": importer.stored,
        "repeated": importer.repeated,
        "refused": [{"line": refusal.line, "reason": refusal.reason} for refusal in importer.refused],
        "left_out": importer.left_out,
    }
    if importer.more_refused:
        message += f", {importer.more_refused} of them without being named"
        data["more_refused"] = importer.more_refused
    if importer.left_out:
        message += f", {importer.left_out} idempotency keys are left out"
    return ApiResponse(message=message, data=data)


async def _lines(request: Request, longest: int) -> AsyncIterator[bytes | None]:
    """The lines of a body as they come; None for one that is too long."""
    held, too_long = bytearray(), False
    async for chunk in request.stream():
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            yield None if too_long or len(held) + len(part) > longest else bytes(held) + part
            held, too_long = bytearray(), False
        held += rest
        if len(held) > longest:
            held, too_long = bytearray(), True
    if held or too_long:
        yield None if too_long else bytes(held)
