"""Beyond the published contract: whole experiments in one write, runs, score details, baselines, listing by page."""

from __future__ import annotations

from anyio import move_on_after, sleep
from fastapi import APIRouter, Request

from common.records import Baseline
from database import keys
from database.answers import ApiResponse, BaselineStored, ScoreDetails
from database.errors import NotFoundError, RefusedError
from database.memory import Memory
from database.models import NewExperiment, StoredExperiment
from database.possible import NewBaseline
from database.routers import IdempotencyKey, MemoryDep, Whole, answered, submitted
from database.routers.route import ThreadRoute, reads_body
from database.routers.threads import apart, awaits
from database.store import Session

__all__ = ["router"]

router = APIRouter(prefix="/v2", tags=["v2"], route_class=ThreadRoute)
_SCORE_SECONDS = 12.0
_FIRST_LOOK = 0.01
_LAST_LOOK = 0.25
"""Seconds between two looks whether a score is there, each twice as many as before up to these."""


@router.post("/experiments")
@reads_body(NewExperiment, keyed=False)
async def add_experiment(memory: MemoryDep, experiment: NewExperiment) -> ApiResponse[StoredExperiment]:
    """Stores element, run record and usage and updates the candidates, in one transaction, once for each key. Then
    waits for the score, at most 12 s; null when it takes longer."""
    key = f"experiments:{experiment.idempotency_key}"
    stored = await submitted(memory, experiment.element, experiment.run, key, usage=experiment.usage)
    stored = await _scored(memory, stored)
    message = f"experiment {stored.index} is stored" if stored.created else f"it was stored before, as {stored.index}"
    return ApiResponse(message=message, data=stored)


async def _scored(memory: Memory, stored: StoredExperiment) -> StoredExperiment:
    """`stored` with its score, which is waited for as long as one is to be expected. No thread waits with it."""
    pause = _FIRST_LOOK
    with move_on_after(_SCORE_SECONDS):
        while await apart("score", memory.settles, stored.index):
            await sleep(pause)
            pause = min(_LAST_LOOK, 2 * pause)
    return await apart("score", memory.with_score, stored)


@router.get("/experiments/{key:text}")
def get_experiment(memory: MemoryDep, key: str) -> StoredExperiment:
    """Where the experiment with this idempotency key was stored."""

    def work(session: Session) -> StoredExperiment:
        facts = session.find_key(f"experiments:{key}")
        if facts is not None:
            return StoredExperiment(index=facts.index, name=facts.name, score=facts.score, created=False)
        note = keys.removed(session, f"experiments:{key}")
        if note is not None:
            raise NotFoundError(f"the experiment with the key {key!r} was stored as {note['index']} and is deleted")
        raise NotFoundError(f"no experiment was stored with the key {key!r}")

    return memory.store.read(work)


@router.get("/elements/{index}/score")
@awaits("embedding")
def score_details(memory: MemoryDep, index: Whole) -> ScoreDetails:
    """The terms of the score, the judge's parts and how each was obtained, and the evidence behind them."""
    return ScoreDetails.model_validate(memory.score_details(index))


@router.put("/baselines/{key:text}")
def put_baseline(
    memory: MemoryDep, request: Request, key: str, baseline: NewBaseline, idempotency: IdempotencyKey = None
) -> ApiResponse[BaselineStored]:
    """Keeps a baseline; when it changed, the candidates are scored again at once, the rest in the background."""
    if baseline.key != key:
        raise RefusedError(f"expected the baseline of {key!r}, got that of {baseline.key!r}")

    def work(session: Session) -> tuple[str, object]:
        count = memory.keep_baseline(session, baseline)
        return f"baseline {key} is stored; {count} elements are scored again", {"rescored": count}

    answer = answered(memory, request, idempotency, work, baseline)
    memory.rescore_soon()
    return answer


@router.get("/baselines/{key:text}")
def get_baseline(memory: MemoryDep, key: str) -> Baseline:
    """One baseline."""
    found = memory.store.read(lambda session: session.baseline(key))
    if found is None:
        raise NotFoundError(f"there is no baseline {key!r}")
    return found
