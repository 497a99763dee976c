"""One experiment as a journalled state machine.

Each stage's result is one file, written atomically before the next stage begins. Whatever kills the pipeline, the next
start reads the files that are there and goes on with the first stage that is missing; a stage that was cut short is
done again from its beginning. The last stage carries an idempotency key, so that a store which
did answer before the kill answers the same again and keeps one element.

    sample.json    parent and reference indices
    evolve.json    the accepted proposal, its check report, and every attempt that was turned down
    evaluate.json  the run record, and every attempt that failed
    analyse.json   the five fields, what the cognition base answered, the summary
    update.json    index and score given by the database
    failed.json    instead of what would have come next: why the experiment ended without an element
    calls.jsonl    what each call of a language model took, appended as they end, of stages cut short as well
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.errors import JournalError, StoreError
from common.files import read_json, write_json
from common.llm import Call, CallLog, append_call, usage_of
from common.records import CheckReport, RunRecord, Usage
from pipeline.agents.roles import Proposal

__all__ = ["STAGES", "Experiment", "journal", "proposal_from"]

STAGES = ("sample", "evolve", "evaluate", "analyse", "update")
_FIELDS = {
    "sample": {"parent", "references", "seconds"},
    "evolve": {"proposal", "report", "attempts", "check_seconds", "seconds"},
    "evaluate": {"proposal", "run", "result", "log", "attempts", "seconds"},
    "analyse": {"analysis", "cognition", "summary", "seconds"},
    "update": {"index", "name", "score", "gain", "seconds"},
    "failed": {"stage", "reason", "detail", "attempts", "seconds"},
}


@dataclass(frozen=True)
class Experiment:
    """Number `number` of one data-dir, in `folder`; `run_id` names the run that it belongs to.

    A stage that was read is kept: only this object writes the folder while the data-dir is held.
    """

    number: int
    folder: Path
    run_id: str
    _known: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def key(self) -> str:
        """Idempotency key of the element it stores."""
        return f"{self.run_id}:{self.number:04d}"

    def read(self, stage: str) -> dict[str, Any] | None:
        """The journalled result of `stage`, None when it has not been reached.

        Raises:
            JournalError: the file is damaged or lacks fields.
        """
        if stage in self._known:
            return self._known[stage]
        path = self.folder / f"{stage}.json"
        if not path.exists():
            return None
        try:
            value = read_json(path)
        except StoreError as error:
            raise JournalError(error.message, _fix(self.folder)) from error
        if not isinstance(value, dict) or not _FIELDS[stage] <= value.keys():
            missing = sorted(_FIELDS[stage] - (value.keys() if isinstance(value, dict) else set()))
            raise JournalError(f"{path}: expected an object with {', '.join(missing)}", _fix(self.folder))
        try:
            _validate(value)
        except (ValidationError, TypeError, KeyError) as error:
            raise JournalError(f"{path} does not hold what its stage writes: {error}", _fix(self.folder)) from error
        self._known[stage] = value
        return value

    def write(self, stage: str, value: dict[str, Any]) -> dict[str, Any]:
        """Journals the result of `stage`: once this returns, no kill can lose it."""
        assert _FIELDS[stage] <= value.keys(), stage
        write_json(self.folder / f"{stage}.json", value)
        self._known[stage] = value
        return value

    def note_call(self, call: Call) -> None:
        """Keeps what a call of a language model took, without its texts, which are in the log of all calls."""
        append_call(self._calls, replace(call, system="", prompt="", answer=None))

    def usage(self) -> list[Usage]:
        """What its calls of language models took so far, by role and model."""
        return usage_of(CallLog.read(self._calls)) if self._calls.exists() else []

    @property
    def _calls(self) -> Path:
        return self.folder / "calls.jsonl"

    @property
    def state(self) -> str:
        """ "stored", "failed" or the first stage that is missing."""
        if self.read("update") is not None:
            return "stored"
        if self.read("failed") is not None:
            return "failed"
        return next(stage for stage in STAGES if self.read(stage) is None)


def journal(folder: Path, run_id: str) -> list[Experiment]:
    """Every experiment of a data-dir in the order of their numbers, all stages read and found sound.

    Raises:
        JournalError: a damaged file, with its path.
    """
    entries = [entry for entry in folder.iterdir() if entry.is_dir() and re.fullmatch(r"\d{4,}", entry.name)]
    found = [Experiment(int(entry.name), entry, run_id) for entry in entries]
    found.sort(key=lambda experiment: experiment.number)
    for experiment in found:
        for stage in (*STAGES, "failed"):
            experiment.read(stage)
    return found


def _validate(value: dict[str, Any]) -> None:
    """Raises when a proposal, report or run in a stage's result is not one."""
    for holder in (value, *value.get("attempts", [])):
        if "proposal" in holder:
            proposal_from(holder["proposal"])
        if "report" in holder:
            CheckReport.model_validate(holder["report"])
        if "run" in holder:
            RunRecord.model_validate(holder["run"])


def proposal_from(value: dict[str, Any]) -> Proposal:
    """A journalled proposal."""
    return Proposal(**{**value, "mechanisms": tuple(value["mechanisms"])})


def _fix(folder: Path) -> str:
    return f"restore {folder} from a backup, or start over with another --data-dir"
