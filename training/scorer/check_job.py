"""The job "check": verifies programs, two at a time, and reports each as it is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.records import CheckOutcome, CheckReport
from training import docker_config, sandbox
from training.programs import Program, from_job
from training.scorer.verifier import Options, verify_many

__all__ = ["run"]


def run(job: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """{programs, options, backend, image, device, parallel} -> {reports}.

    Events: {event: "sandbox", backend, note}, {event: "check", program, check}, {event: "report", index, report}.

    Raises:
        SandboxError: the backend that was asked for does not work here.
    """
    box = sandbox.choose(
        str(job.get("backend", "auto")), str(job.get("device", "cpu")), str(job.get("image", docker_config.IMAGE))
    )
    emit({"event": "sandbox", "backend": box.backend, "note": box.note})

    def on_check(program: Program, outcome: CheckOutcome) -> None:
        emit({"event": "check", "program": program.name, "check": outcome.model_dump()})

    def on_report(index: int, report: CheckReport) -> None:
        emit({"event": "report", "index": index, "report": report.model_dump()})

    reports = verify_many(
        from_job(job["programs"]),
        box,
        Options(**job.get("options", {})),
        on_check,
        on_report,
        int(job.get("parallel", 2)),
    )
    return {"reports": [report.model_dump() for report in reports]}
