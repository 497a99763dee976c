"""One run of the user's own training script (training.command): its record and its files.

OUT/NAME.py is the program, command.log what the command printed. What it reports is checked for its form
(training/command_results.py) and otherwise believed: no held-out loss is computed here, nothing is audited, the size is
not fitted, and the monitor sees nothing but the time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import StoreError
from common.files import write_atomic, write_json
from common.records import CheckOutcome, CheckReport, RunRecord
from training.command import LOG, WARNING, Command, Ended, label
from training.command_results import NAMES, BadResultsError, NotFiniteLossError, Results, read_results
from training.environment import git_commit, versions
from training.events import Event, OnEvent
from training.programs import Program
from training.repeat import profile_word, repeating_command
from training.results import clear, csv_text, reported_mean

if TYPE_CHECKING:
    from training.launcher import Launcher

__all__ = ["command_record", "run_command"]

_LAST_WORDS = 1500


def run_command(
    launcher: Launcher,
    command: Command,
    program: Program,
    *,
    seed: int,
    out: Path,
    run_id: str,
    checks: CheckReport | Sequence[CheckOutcome],
    on_event: OnEvent,
    cancel: threading.Event | None,
    repeat: str,
) -> RunRecord:
    """Runs it, reads what it left in `out`, and writes train.csv, test.csv, stderr.log (the end of its log) and
    result.json.

    Args:
        repeat: the command line that repeats the run; "" for one made from the settings.

    Raises:
        StoreError: `out` cannot be written.
    """
    out = out.absolute()
    _clear(out)
    name = label(program.name)
    file = out / f"{name}.py"
    write_atomic(file, program.text)
    values = {
        "program": str(file),
        "name": name,
        "profile": profile_word(launcher.settings, launcher.profile.name),
        "seed": str(seed),
        "out": str(out),
    }
    on_event(Event("stage", "train"))
    begun = time.perf_counter()
    ended = command.run(values, out, cancel, lambda line: on_event(Event("note", "train", text=line)))
    seconds = time.perf_counter() - begun
    facts, results = _outcome(command, ended, out, name)
    record = command_record(launcher, program, checks, facts, seed=seed, run_id=run_id, repeat=repeat, seconds=seconds)
    if results is not None:
        record = record.model_copy(
            update={
                "train_loss": results.train,
                "reported": results.test,
                "benchmark_mean": reported_mean(results.test),
            }
        )
        write_atomic(out / "train.csv", csv_text("step", record.name, results.train))
        write_atomic(out / "test.csv", csv_text("Model", record.name, results.test))
    write_atomic(out / "stderr.log", ended.said)
    write_json(out / "result.json", record.model_dump(mode="json"))
    return record


def _clear(out: Path) -> None:
    """Removes results of an earlier run under all their names, so that none is taken for one of this."""
    clear(out)
    for name in (LOG, *(name for names in NAMES.values() for name in names)):
        try:
            (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot remove {out / name}: {error.strerror}", "name another --out") from error


def _outcome(command: Command, ended: Ended, out: Path, name: str) -> tuple[dict[str, Any], Results | None]:
    """{status, reason, detail}, and the results of a finished run."""
    if ended.reason == "interrupted":
        return {"status": "stopped", "reason": "interrupted", "detail": "the run was interrupted"}, None
    words = f"; its last words: {ended.said.strip()[-_LAST_WORDS:]}" if ended.said.strip() else ""
    if ended.reason == "timeout":
        detail = f"training.command did not end within {command.seconds:g} s{words}"
        return {"status": "failed", "reason": "timeout", "detail": detail}, None
    if ended.status != 0:
        detail = f"training.command ended with status {ended.status}{words}"
        return {"status": "failed", "reason": "crashed", "detail": detail}, None
    try:
        results = read_results(out, name)
    except BadResultsError as error:
        reason = "nan" if isinstance(error, NotFiniteLossError) else "crashed"
        detail = f"training.command ended with status 0, but left no usable results. {error}{words}"
        return {"status": "failed", "reason": reason, "detail": detail}, None
    return {"status": "finished", "reason": None, "detail": WARNING}, results


def command_record(
    launcher: Launcher,
    program: Program,
    checks: CheckReport | Sequence[CheckOutcome],
    ended: Mapping[str, Any],
    *,
    seed: int,
    run_id: str,
    repeat: str,
    seconds: float | None = None,
    total: float | None = None,
) -> RunRecord:
    """The record of a run whose trainer is the user's command, without what it reported.

    Args:
        ended: status, reason and detail.
        seconds: that the command took; None where it was not started.
        total: of all; None: those of checks and command.
    """
    outcomes = checks.checks if isinstance(checks, CheckReport) else list(checks)
    facts = checks.facts if isinstance(checks, CheckReport) else {}
    checked = sum(check.seconds or 0.0 for check in outcomes)
    parts = ({"train": seconds} if seconds is not None else {}) | ({"check": round(checked, 3)} if outcomes else {})
    return RunRecord(
        run_id=run_id,
        name=program.name,
        profile=launcher.profile.name,
        seed=seed,
        program_sha256=program.sha256,
        fingerprint=facts.get("fingerprint"),
        baseline_key=launcher.baseline_key(),
        trainer="command",
        flops_per_token=facts.get("flops_per_token"),
        work_exponent=facts.get("work_exponent"),
        seconds={**parts, "total": sum(parts.values()) if total is None else total},
        checks=outcomes,
        sandbox="none: training.command",
        trust=program.trust,
        versions=versions(),
        git_commit=git_commit(),
        command=repeat
        or repeating_command(launcher.settings, profile_word(launcher.settings, launcher.profile.name), program, seed),
        reference=program.reference,
        **ended,
    )
