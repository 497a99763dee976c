"""The OpenAPI description: for every route an example answer, its errors with their statuses, and the key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from database.envelope import REASONS, ErrorBody
from database.evaluate_agent.score import SCORE_VERSION

__all__ = ["EXAMPLES", "describe_api"]

_RESULT = {"train": "step,1,2000\nx,10.8767,4.5749\n", "test": "Model,arc_easy,piqa\nx,0.324,0.526\n"}
_ELEMENT = {
    "time": "2025-07-01 12:00:00",
    "name": "delta_net_gated_mix",
    "result": _RESULT,
    "program": "class DeltaNet(nn.Module): ...",
    "motivation": "Mix two decay rates by a gate of the token.",
    "analysis": "none",
    "cognition": "none",
    "log": "none",
    "parent": 1,
    "index": 7,
    "summary": "",
}
_SCORED = {**_ELEMENT, "score": 1.62}
_TREE = {
    "element": {"index": 1, "name": "delta_net", "time": "2025-07-01 10:00:00", "parent": None},
    "children": [
        {"element": {"index": 7, "name": "delta_net_gated_mix", "time": _ELEMENT["time"], "parent": 1}, "children": []}
    ],
}
_STATS = {
    "total_records": 7,
    "unique_names": 7,
    "database_size": 409600,
    "collection_size": 143360,
    "index_size": 57344,
    "storage_size": 450560,
    "average_object_size": 20480.0,
    "database_name": "database.sqlite",
    "collection_name": "elements",
}
_CANDIDATES = {
    "capacity": 50,
    "current_size": 2,
    "update_threshold": 50,
    "new_data_count": 5,
    "needs_update": False,
    "highest_score": 1.62,
    "lowest_score": 1.44,
    "average_score": 1.53,
    "score_range": 0.18,
}
_MEASURED = {"value": 4.31, "n": 20480, "se": 0.004}
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_USAGE = {
    "role": "planner",
    "model": "gpt-4.1",
    "calls": 3,
    "failed": 0,
    "input_tokens": 21000,
    "output_tokens": 4800,
    "seconds": 61.5,
    "cost": 0.08,
    "index": 7,
}
_RUN = {
    "version": 1,
    "run_id": "20250701-115500-7",
    "name": "delta_net_gated_mix",
    "profile": "cpu",
    "seed": 0,
    "status": "finished",
    "program_sha256": _SHA256,
    "baseline_key": "4a1f",
    "heldout_loss": _MEASURED,
    "benchmark_mean": {"value": 0.41, "n": 200, "se": 0.02},
}
_BASELINE = {
    "key": "4a1f",
    "profile": "cpu",
    "seeds": [0, 1, 2],
    "loss": 4.35,
    "loss_sd": 0.03,
    "benchmark": 0.4,
    "benchmark_sd": 0.02,
    "tasks": ["associative_recall", "induction"],
}
_JUDGED = {
    "index": 7,
    "version": SCORE_VERSION,
    "revision": 3,
    "score": 1.62,
    "loss_term": 0.51,
    "benchmark_term": 0.53,
    "judge": 0.58,
    "judgement": {"performance_score": 6, "innovation_score": 5, "complexity_score": 8},
    "source": "run",
    "baseline_key": "4a1f",
    "loss_clip": 0.1,
    "benchmark_clip": 0.4,
    "missing": [],
    "evidence": {"loss": _MEASURED},
}


def _done(message: str, data: Any) -> dict[str, Any]:
    return {"success": True, "message": message, "data": data}


EXAMPLES: dict[str, Any] = {
    "GET /": _done("architecture database", {"version": "0.1.0", "docs": "/docs", "redoc": "/redoc", "port": 8001}),
    "GET /health": {
        "status": "healthy",
        "timestamp": "2025-07-01T12:00:00+00:00",
        "database": {"connected": True, "total_records": 7},
    },
    "GET /ready": {"status": "ready"},
    "GET /metrics": 'asi_database_requests_total{method="GET",route="/stats",status="200"} 3.0\n',
    "GET /stats": _STATS,
    "GET /v2/stats": _STATS
    | {
        "pending_embeddings": 0,
        "unscored": 0,
        "stale_scores": 0,
        "incomplete": 0,
        "sizes_measured_at": None,
        "embedding_model": "all-MiniLM-L6-v2",
        "embedding_error": None,
        "judge": {"backend": "rubric", "model": None, "failed": 0, "error": None},
        "vector_index": {"vectors": 9, "elements": 7, "orphans": 0, "dimension": 384, "recall": None},
        "candidates": _CANDIDATES | {"cold_start": 200},
    },
    "POST /repair": _done(
        "7 elements checked; the storage is sound; scores are computed again",
        {
            "elements": 7,
            "storage_problems": [],
            "orphans_made_roots": 0,
            "completeness_corrected": 0,
            "rows_corrected": 0,
            "evidence_corrected": 0,
            "to_be_embedded": 0,
            "not_mended": [],
            "candidates": 2,
        },
    ),
    "POST /faiss/rebuild": _done(
        "the index holds 9 vectors of 7 elements", {"total_vectors": 9, "active_mappings": 9, "pending": 0}
    ),
    "GET /faiss/stats": {
        "success": True,
        "data": {
            "total_vectors": 9,
            "dimension": 384,
            "index_type": "IP",
            "active_mappings": 9,
            "orphan_vectors": 0,
            "next_index": 9,
            "health_status": "healthy",
        },
    },
    "POST /faiss/clean-orphans": _done("0 vectors dropped", {"total_vectors": 9, "orphan_vectors": 0, "cleaned": 0}),
    "POST /elements": _done("element 7 is stored", {"name": "delta_net_gated_mix", "index": 7}),
    "GET /elements/sample": _ELEMENT,
    "GET /elements/by-name/{name}": [_ELEMENT],
    "GET /elements/by-index/{index}": _ELEMENT,
    "GET /elements/with-score/by-name/{name}": [_SCORED],
    "GET /elements/with-score/by-index/{index}": _SCORED,
    "GET /elements/top-k/{k}": [_ELEMENT],
    "GET /elements/sample-range/{a}/{b}/{k}": [_ELEMENT],
    "GET /elements/search-similar": [_ELEMENT],
    "GET /elements/{index}/score": _done("computed", {"index": 7, "score": 1.62}),
    "DELETE /elements/by-index/{index}": _done("element 7 is removed", {"deleted_count": 1}),
    "DELETE /elements/by-name/{name}": _done("2 elements are removed", {"deleted_count": 2}),
    "DELETE /elements/all": _done("7 elements are removed", {"deleted_count": 7}),
    "POST /elements/clean-invalid": _done(
        "1 incomplete elements are removed",
        {"count_before": 7, "cleaned_count": 1, "reparented_children": 0, "count_after": 6},
    ),
    "GET /elements/roots": [_ELEMENT | {"parent": None, "index": 1, "name": "delta_net"}],
    "GET /elements/uct-select": _ELEMENT,
    "GET /elements/uct-scores": [
        {
            "index": 7,
            "name": "delta_net_gated_mix",
            "base_score": 0.425,
            "n_node": 0,
            "exploration_term": "infinite",
            "uct_score": "infinite",
            "summary": "",
        }
    ],
    "GET /elements/context/{parent}": _done(
        "relatives of a child of element 7",
        {"direct_parent": _ELEMENT, "grandparent": None, "strongest_siblings": [_ELEMENT]},
    ),
    "POST /elements/{index}/set-parent": _done("element 7 is re-attached", {"child_index": 7, "parent_index": 1}),
    "GET /elements/{index}/children": [_ELEMENT],
    "GET /elements/{index}/path": [_ELEMENT],
    "GET /tree-structure": {"success": True, "data": {"trees": [_TREE], "total_roots": 1}},
    "GET /candidates/stats": {"success": True, "data": _CANDIDATES},
    "GET /candidates/new-data-count": _done("5 elements since the last update", {"new_data_count": 5}),
    "GET /candidates/top-k/{k}": [_ELEMENT],
    "GET /candidates/all": [_SCORED],
    "GET /candidates/sample-range/{a}/{b}/{k}": [_ELEMENT],
    "POST /candidates/{index}/add": _done("element 7 is a candidate", {"index": 7}),
    "PUT /candidates/{index}": _done("candidate 7 is scored again", {"index": 7}),
    "DELETE /candidates/by-index/{index}": _done("element 7 is no candidate any more", {"index": 7}),
    "DELETE /candidates/by-name/{name}": _done("1 candidates are removed", {"deleted_count": 1}),
    "DELETE /candidates/all": _done("2 candidates are removed", {"deleted_count": 2}),
    "POST /candidates/force-update": _done(
        "1 new candidates",
        {
            "updated_at": "2025-07-01 12:00:00",
            "total_evaluated": 9,
            "new_elements_evaluated": 7,
            "old_candidates": 2,
            "final_candidates": 3,
            "new_entries": 1,
            "replaced_entries": 0,
            "highest_score": 1.62,
            "lowest_score": 1.44,
            "average_score": 1.53,
        },
    ),
    "POST /candidates/rebuild-from-scored": _done(
        "the candidate set holds the best 7 of the stored scores",
        {
            "updated_at": "2025-07-01 12:00:00",
            "old_candidate_count": 3,
            "new_candidate_count": 7,
            "message": "the candidate set holds the best 7 of the stored scores",
        },
    ),
    "POST /v2/experiments": _done(
        "experiment 7 is stored", {"index": 7, "name": "delta_net_gated_mix", "score": 1.62, "created": True}
    ),
    "GET /v2/experiments/{key}": {"index": 7, "name": "delta_net_gated_mix", "score": 1.62, "created": False},
    "GET /v2/elements": {"elements": [_SCORED], "next": 7},
    "GET /v2/elements/{index}/runs": [_RUN],
    "GET /v2/runs": {"runs": [{"index": 7, "run": _RUN}], "next": None},
    "GET /v2/elements/{index}/checks": [
        {
            "run_id": "20250701-115500-7",
            "name": "causality",
            "passed": True,
            "severity": "refuse",
            "detail": "nothing depends on what comes later",
            "counterexample": None,
        }
    ],
    "GET /v2/elements/{index}/measurements": [
        {"run_id": "20250701-115500-7", "profile": "cpu", "seed": 0, "name": "heldout_loss", **_MEASURED}
    ],
    "GET /v2/programs/{sha256}": {"sha256": _SHA256, "program": "class DeltaNet(nn.Module): ...", "indices": [7]},
    "POST /v2/usage": _done("1 record kept", {"stored": 1}),
    "GET /v2/usage": {"usage": [_USAGE], "next": None},
    "GET /v2/usage/totals": [{name: value for name, value in _USAGE.items() if name != "index"}],
    "GET /v2/events": {
        "events": [
            {
                "id": 12,
                "time": "2025-07-01 12:00:00",
                "kind": "added",
                "index": 7,
                "data": {"name": "delta_net_gated_mix", "parent": 1},
            }
        ],
        "next": 12,
        "oldest": 1,
        "last": 12,
    },
    "GET /v2/events/stream": (
        'event: added\ndata: {"index": 7, "time": "2025-07-01 12:00:00", '
        '"data": {"name": "delta_net_gated_mix", "parent": 1}}\nid: 12\n\n'
    ),
    "GET /v2/export": '{"element": {"index": 1, ...}, "score": 1.4, "runs": []}\n{"candidates": [], "last_index": 1}\n',
    "POST /v2/import": _done(
        "2 lines are stored, 0 were before, 1 are refused",
        {
            "stored": 2,
            "repeated": 0,
            "refused": [{"line": 3, "reason": "its parent 9 is no element of the file"}],
            "left_out": 0,
        },
    ),
    "GET /v2/fingerprints/{fingerprint}": [7],
    "GET /v2/elements/{index}/score": _JUDGED,
    "PUT /v2/baselines/{key}": _done("baseline 4a1f is stored; 7 elements are scored again", {"rescored": 7}),
    "GET /v2/baselines/{key}": _BASELINE,
}
"""What each route answers, by method and path."""

_BODIES: dict[str, Any] = {
    "POST /elements": {name: value for name, value in _ELEMENT.items() if name != "index"},
    "POST /elements/{index}/set-parent": {"parent_index": 1},
    "POST /v2/experiments": {
        "idempotency_key": "run-3-experiment-7",
        "element": {name: value for name, value in _ELEMENT.items() if name != "index"},
        "run": _RUN,
    },
    "PUT /v2/baselines/{key}": _BASELINE,
    "POST /v2/usage": [_USAGE],
    "POST /v2/import": '{"element": {"index": 1, "name": "delta_net", ...}}\n',
}
_UNKNOWN = ("{index}", "{name}", "{parent}", "{key}", "sample", "uct-select", "tree-structure", "{sha256}")
"""Parts of a path that a 404 belongs to, beside those of `_EMPTY`."""
_EMPTY = (
    "/sample-range/",
    "GET /elements/by-name/",
    "GET /elements/with-score/by-name/",
    "DELETE /candidates/by-name/",
)
"""Parts of a route that finds none instead."""


def describe_api(app: FastAPI) -> None:
    """Completes the description that FastAPI derives from the routes of `app`."""
    derive = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(derive())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _completed(schema: dict[str, Any]) -> dict[str, Any]:
    parts = schema["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(name, None)
    parts["schemas"]["ErrorBody"] = ErrorBody.model_json_schema()
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            route = f"{method.upper()} {path}"
            # Keys are needed where the server has some.
            operation["security"] = [{"key": []}, {}]
            for content in operation["responses"]["200"]["content"].values():
                if route in EXAMPLES:
                    content["example"] = EXAMPLES[route]
            body = operation.get("requestBody", {}).get("content", {})
            for content in body.values():
                if route in _BODIES:
                    content["example"] = _BODIES[route]
            for status in _statuses(method, path, operation):
                operation["responses"][str(status)] = {
                    "description": REASONS[status],
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
                }
            operation["responses"] = dict(sorted(operation["responses"].items()))
    return schema


def _statuses(method: str, path: str, operation: dict[str, Any]) -> set[int]:
    """The errors that a route may answer with."""
    found = {401, 429, 500, 503}
    if operation.get("parameters") or "requestBody" in operation:
        found.add(422)
    if method != "get":
        found |= {400, 403, 409, 413, 507}
    if "/sample-range/" in path:
        found.add(400)
    if any(part in path for part in _UNKNOWN) and not any(part in f"{method.upper()} {path}" for part in _EMPTY):
        found.add(404)
    return found
