"""What is known of an element beyond the published keys: runs, checks, measurements, programs; and usage."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Annotated

from fastapi import APIRouter, Body, Query, Request, Response
from fastapi import Path as PathArgument

from common.records import Measurement, RunRecord, Status, Usage
from common.text import counted
from database import tree
from database.answers import (
    ApiResponse,
    CheckOfRun,
    MeasurementOfRun,
    Program,
    RunOfElement,
    RunPage,
    UsagePage,
    UsageStored,
    UsageTotal,
)
from database.errors import NotFoundError
from database.models import ElementPage
from database.possible import NewUsage
from database.routers import IdempotencyKey, MemoryDep, Whole, answered
from database.routers.listing import listed
from database.routers.route import ThreadRoute
from database.store import MAX_INDEX, Session, Where

__all__ = ["router"]

router = APIRouter(prefix="/v2", tags=["v2"], route_class=ThreadRoute)
_PAGE = 1000
After = Annotated[Whole, Query(ge=0, le=MAX_INDEX, description="the `next` of the page before")]
Limit = Annotated[Whole, Query(ge=1, le=500)]


@router.get("/elements", response_model=ElementPage)
def list_elements(
    memory: MemoryDep,
    after: After = 0,
    limit: Limit = 100,
    name: str | None = None,
    parent: Annotated[Whole | None, Query(ge=1, le=MAX_INDEX)] = None,
    baseline_key: str | None = None,
    roots: bool = False,
    published: Annotated[bool, Query(description="only those without a run record")] = False,
    unscored: bool = False,
    pending: bool = False,
    incomplete: bool = False,
) -> Response:
    """Elements by index with their scores, from the one that follows `after`; all conditions hold together."""
    where = Where(
        after=after,
        name=name,
        parent=parent,
        baseline_key=baseline_key,
        roots=roots,
        published=published,
        unscored=unscored,
        pending=pending,
        incomplete=incomplete,
    )

    def work(session: Session) -> Response:
        found = session.facts(where, limit=limit + 1)
        shown = found[:limit]
        scores = {facts.index: facts.score for facts in shown}
        following = json.dumps(shown[-1].index if len(found) > limit else None)
        # As an ElementPage is written.
        return listed(session, list(scores), scores, (b'{"elements":[', f'],"next":{following}}}'.encode()))

    return memory.store.read(work)


@router.get("/runs")
def list_runs(
    memory: MemoryDep,
    after: After = 0,
    limit: Limit = 100,
    profile: str | None = None,
    status: Status | None = None,
    baseline_key: str | None = None,
) -> RunPage:
    """Run records of up to `limit` elements, by index, from the one that follows `after`: profile, seed, curve, status,
    measurements, checks. Only finished experiments become elements: no record of another status is stored."""

    def work(session: Session) -> RunPage:
        found = session.facts(Where(after=after, baseline_key=baseline_key), limit=limit + 1)
        runs = [
            RunOfElement(index=facts.index, run=run)
            for facts in found[:limit]
            for run in session.runs(facts.index)
            if profile in (None, run.profile) and status in (None, run.status)
        ]
        return RunPage(runs=runs, next=found[limit - 1].index if len(found) > limit else None)

    return memory.store.read(work)


@router.get("/elements/{index}/runs")
def element_runs(memory: MemoryDep, index: Whole) -> list[RunRecord]:
    """The run records stored with an element; [] for one that was added without."""

    def work(session: Session) -> list[RunRecord]:
        tree.facts_of(session, index)
        return session.runs(index)

    return memory.store.read(work)


@router.get("/elements/{index}/checks")
def element_checks(memory: MemoryDep, index: Whole) -> list[CheckOfRun]:
    """What the verifier found, check by check; [] for an element without a run record."""
    return [
        CheckOfRun(run_id=run.run_id, **check.model_dump())
        for run in element_runs(memory, index)
        for check in run.checks
    ]


@router.get("/elements/{index}/measurements")
def element_measurements(memory: MemoryDep, index: Whole) -> list[MeasurementOfRun]:
    """Every number that was measured, with n and its standard error; [] for an element without a run record."""
    found = []
    for run in element_runs(memory, index):
        named = _measured(run)
        found += [
            MeasurementOfRun(
                run_id=run.run_id,
                profile=run.profile,
                seed=run.seed,
                name=name,
                value=measured.value,
                n=measured.n,
                se=measured.se,
            )
            for name, measured in named.items()
            if measured is not None
        ]
    return found


def _measured(run: RunRecord) -> dict[str, Measurement | None]:
    """Everything in the record that has an n, by name: a benchmark's is the task's, any other's its place."""
    named: dict[str, Measurement | None] = {"heldout_loss": run.heldout_loss, "benchmark_mean": run.benchmark_mean}
    for task, score in run.benchmarks.items():
        named |= {task: score, f"{task}.bits_per_byte": score.bits_per_byte}
    named |= {f"perplexities.{task}": measured for task, measured in run.perplexities.items()}
    named["learning_curve"] = run.learning_curve
    if run.efficiency is not None:
        named["efficiency.decode"] = run.efficiency.decode
        named |= {f"efficiency.prefill.{length}": measured for length, measured in run.efficiency.prefill.items()}
    return named


@router.get("/programs/{sha256}")
def program_by_hash(
    memory: MemoryDep,
    sha256: Annotated[str, PathArgument(pattern="^[0-9a-f]{64}$", description="SHA-256 of its UTF-8 text, in hex")],
) -> Program:
    """The text of a program, and the elements that hold exactly this text."""

    def work(session: Session) -> Program:
        indices = session.ledger.with_program(sha256)
        elements = session.elements(indices[:1])
        if not elements:
            raise NotFoundError(f"there is no program with the SHA-256 {sha256}")
        return Program(sha256=sha256, program=elements[0].program, indices=indices)

    return memory.store.read(work)


@router.get("/fingerprints/{fingerprint:text}")
def elements_with_fingerprint(memory: MemoryDep, fingerprint: str) -> list[int]:
    """Indices of the elements that compute the same function; [] where none does."""
    return memory.store.read(lambda session: session.with_fingerprint(fingerprint))


@router.post("/usage")
def add_usage(
    memory: MemoryDep,
    request: Request,
    records: Annotated[list[NewUsage], Body(min_length=1, max_length=1000)],
    key: IdempotencyKey = None,
) -> ApiResponse[UsageStored]:
    """Keeps what calls of a language model took: one record a role and model, of any number of calls."""

    def work(session: Session) -> tuple[str, object]:
        session.ledger.put_usage(records)
        return f"{counted(len(records), 'record')} kept", {"stored": len(records)}

    return answered(memory, request, key, work, records)


@router.get("/usage")
def list_usage(memory: MemoryDep, after: After = 0, limit: Limit = 100) -> UsagePage:
    """Usage records in the order in which they came."""
    found = memory.store.read(lambda session: session.ledger.usage(after, limit + 1))
    shown = found[:limit]
    return UsagePage(usage=[record for _, record in shown], next=shown[-1][0] if len(found) > limit else None)


@router.get("/usage/totals")
def usage_totals(memory: MemoryDep) -> list[UsageTotal]:
    """Sums by role and model; the cost is null where a record has none."""

    def work(session: Session) -> list[UsageTotal]:
        groups: dict[tuple[str, str], list[Usage]] = defaultdict(list)
        after = 0
        while page := session.ledger.usage(after, _PAGE):
            for _, record in page:
                groups[record.role, record.model].append(record)
            after = page[-1][0]
        return [_total(role, model, records) for (role, model), records in sorted(groups.items())]

    return memory.store.read(work)


def _total(role: str, model: str, records: list[Usage]) -> UsageTotal:
    costs = [record.cost for record in records]
    return UsageTotal(
        role=role,
        model=model,
        calls=sum(record.calls for record in records),
        failed=sum(record.failed for record in records),
        input_tokens=sum(record.input_tokens for record in records),
        output_tokens=sum(record.output_tokens for record in records),
        seconds=sum(record.seconds for record in records),
        cost=None if None in costs else sum(cost for cost in costs if cost is not None),
    )
