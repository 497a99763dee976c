"""Shapes of the answers that are no elements, for validation and for OpenAPI."""

from __future__ import annotations

from typing import Any, Generic, Literal, NotRequired, TypeVar

from pydantic import BaseModel
from typing_extensions import TypedDict

from common.records import CheckOutcome, RunRecord, Usage

__all__ = [
    "ApiResponse",
    "BaselineStored",
    "CandidateNumbers",
    "CandidateState",
    "CheckOfRun",
    "Cleaned",
    "Deleted",
    "Described",
    "EventOut",
    "EventPage",
    "ExtendedStats",
    "Health",
    "Imported",
    "IndexNumbers",
    "JudgeState",
    "MeasurementOfRun",
    "Merged",
    "Moved",
    "OneIndex",
    "OneScore",
    "OrphansCleaned",
    "Plain",
    "Program",
    "Ready",
    "Rebuilt",
    "RefusedLine",
    "Repaired",
    "RunOfElement",
    "RunPage",
    "ScoreDetails",
    "Stats",
    "Stored",
    "UctRow",
    "UsagePage",
    "UsageStored",
    "UsageTotal",
    "VectorsRebuilt",
    "Waiting",
]

T = TypeVar("T")


class ApiResponse(BaseModel, Generic[T]):
    success: Literal[True] = True
    message: str = ""
    data: T


class Plain(BaseModel, Generic[T]):
    """An answer without a message."""

    success: Literal[True] = True
    data: T


class Described(TypedDict):
    version: str
    docs: str
    redoc: str
    port: int


class HealthNumbers(TypedDict):
    connected: bool
    total_records: int | None
    """null while the elements of a large store are being counted."""


class Health(BaseModel):
    status: Literal["healthy"]
    timestamp: str
    database: HealthNumbers


class Ready(BaseModel):
    status: Literal["ready"]


class Stats(BaseModel):
    """Counts, and sizes in bytes."""

    total_records: int
    unique_names: int
    database_size: int | None
    collection_size: int
    index_size: int | None
    storage_size: int | None
    average_object_size: float
    database_name: str
    collection_name: str


class CandidateNumbers(TypedDict):
    """An empty set has the first five; scores are null where no member has one."""

    capacity: int
    current_size: int
    update_threshold: int
    new_data_count: int
    needs_update: bool
    highest_score: NotRequired[float | None]
    lowest_score: NotRequired[float | None]
    average_score: NotRequired[float | None]
    score_range: NotRequired[float | None]


class CandidateState(CandidateNumbers):
    cold_start: int


class JudgeState(TypedDict):
    """Who judges. `failed` counts the elements that the model was asked about in vain, whether its answer was of no use
    or its endpoint failed; they are asked about again. `error` is the last thing that went wrong."""

    backend: Literal["rubric", "llm"]
    model: str | None
    failed: int
    error: str | None


class ExtendedStats(Stats):
    sizes_measured_at: str | None
    """When a MongoDB server said its sizes in bytes, UTC; null where they are those of now, or not known."""
    pending_embeddings: int
    unscored: int
    stale_scores: int
    incomplete: int
    embedding_model: str | None
    embedding_error: str | None
    judge: JudgeState
    vector_index: dict[str, Any]
    candidates: CandidateState


class Repaired(TypedDict):
    elements: int
    storage_problems: list[str]
    orphans_made_roots: int
    completeness_corrected: int
    rows_corrected: int
    evidence_corrected: int
    to_be_embedded: int
    not_mended: list[str]
    candidates: int


class Stored(TypedDict):
    name: str
    index: int


class OneIndex(TypedDict):
    index: int


class OneScore(TypedDict):
    index: int
    score: float | None


class Deleted(TypedDict):
    deleted_count: int


class Cleaned(TypedDict):
    count_before: int
    cleaned_count: int
    reparented_children: int
    count_after: int
    message: NotRequired[str]


class IndexNumbers(TypedDict):
    """`total_vectors` counts windows, of which a long motivation has several, and is `active_mappings` +
    `orphan_vectors`."""

    total_vectors: int
    dimension: int
    index_type: Literal["IP"]
    active_mappings: int
    orphan_vectors: int
    next_index: int
    health_status: str


class VectorsRebuilt(TypedDict):
    total_vectors: int
    active_mappings: int
    pending: int


class OrphansCleaned(TypedDict):
    total_vectors: int
    orphan_vectors: int
    cleaned: int


class Waiting(TypedDict):
    new_data_count: int


class Merged(TypedDict):
    updated_at: str
    total_evaluated: int
    new_elements_evaluated: int
    old_candidates: int
    final_candidates: int
    new_entries: int
    replaced_entries: int
    highest_score: float | None
    lowest_score: float | None
    average_score: float | None


class Rebuilt(TypedDict):
    updated_at: str
    old_candidate_count: int
    new_candidate_count: int
    message: str


class Moved(TypedDict):
    child_index: int
    parent_index: int | None


class UctRow(BaseModel):
    """`uct_score` is null without a benchmark mean, "infinite" without children."""

    index: int
    name: str
    base_score: float | None
    n_node: int
    exploration_term: float | Literal["infinite"]
    uct_score: float | Literal["infinite"] | None
    summary: str


class BaselineStored(TypedDict):
    rescored: int


class ScoreDetails(BaseModel):
    """How a score came about: see evaluate_agent/score.py."""

    index: int
    version: int
    revision: int | None
    score: float | None
    loss_term: float | None
    benchmark_term: float | None
    judge: float | None
    judgement: dict[str, Any] | None
    source: Literal["run", "result"]
    baseline_key: str | None
    loss_clip: float | None
    benchmark_clip: float | None
    missing: list[str]
    evidence: dict[str, Any]


class EventOut(BaseModel):
    id: int
    time: str
    kind: Literal["added", "removed", "cleared", "scored", "parent", "candidates", "baseline"]
    index: int | None
    data: dict[str, Any]


class EventPage(BaseModel):
    """`next` is the cursor to go on from; `oldest` and `last` are the ids of the oldest event kept and of the last."""

    events: list[EventOut]
    next: int
    oldest: int
    last: int


class RefusedLine(TypedDict):
    line: int
    reason: str


class Imported(TypedDict):
    """`refused` names the first 10,000 refusals, `more_refused` counts those beyond, where there are any."""

    stored: int
    repeated: int
    refused: list[RefusedLine]
    more_refused: NotRequired[int]
    left_out: int


class RunOfElement(BaseModel):
    index: int
    run: RunRecord


class RunPage(BaseModel):
    runs: list[RunOfElement]
    next: int | None


class CheckOfRun(CheckOutcome):
    run_id: str


class MeasurementOfRun(BaseModel):
    run_id: str
    profile: str
    seed: int
    name: str
    value: float
    n: int
    se: float | None


class Program(BaseModel):
    sha256: str
    program: str
    indices: list[int]


class UsageStored(TypedDict):
    stored: int


class UsagePage(BaseModel):
    usage: list[Usage]
    next: int | None


class UsageTotal(BaseModel):
    role: str
    model: str
    calls: int
    failed: int
    input_tokens: int
    output_tokens: int
    seconds: float
    cost: float | None
