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
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, FiniteFloat, StrictInt, ValidationError

from common.errors import JournalError, StoreError
from common.files import read_json, write_atomic, write_json
from common.llm import Call, CallLog, append_call, usage_of
from common.records import CheckReport, RunRecord, Usage
from pipeline.agents.roles import Proposal

__all__ = ["STAGES", "Experiment", "journal", "proposal_from", "restore_pool"]

STAGES = ("sample", "evolve", "evaluate", "analyse", "update")


def _known_keys(value: Any) -> Any:
    if isinstance(value, dict) and (unknown := value.keys() - {one.name for one in fields(Proposal)}):
        raise ValueError(f"a proposal has no {', '.join(sorted(unknown))}")
    return value


JournalledProposal = Annotated[Proposal, BeforeValidator(_known_keys)]


class _Attempt(BaseModel):
    kind: str
    detail: str
    proposal: JournalledProposal
    report: CheckReport | None = None
    run: RunRecord | None = None
    seconds: FiniteFloat = 0.0


class _Stage(BaseModel):
    seconds: FiniteFloat


class _Sample(_Stage):
    parent: StrictInt
    references: list[StrictInt]


class _Evolve(_Stage):
    proposal: JournalledProposal
    report: CheckReport
    attempts: list[_Attempt]
    check_seconds: FiniteFloat


class _Evaluate(_Stage):
    proposal: JournalledProposal
    run: RunRecord
    result: dict[str, str]
    log: str
    attempts: list[_Attempt]


class _Analyse(_Stage):
    analysis: str
    cognition: str
    summary: str


class _Update(_Stage):
    index: StrictInt
    name: str
    score: FiniteFloat | None
    gain: FiniteFloat | None


class _Failed(_Stage):
    stage: Literal["sample", "evolve", "evaluate", "analyse", "update"]
    reason: str
    detail: str
    attempts: list[_Attempt]


_FORMS: dict[str, type[_Stage]] = {
    "sample": _Sample,
    "evolve": _Evolve,
    "evaluate": _Evaluate,
    "analyse": _Analyse,
    "update": _Update,
    "failed": _Failed,
}
"""What each file holds at least."""


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
            JournalError: the file is damaged, lacks fields, or holds something else in them.
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
        try:
            _FORMS[stage].model_validate(value)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
            raise JournalError(f"{path} does not hold what its stage writes: {wrong}", _fix(self.folder)) from error
        found: dict[str, Any] = value
        self._known[stage] = found
        return found

    def write(self, stage: str, value: dict[str, Any]) -> dict[str, Any]:
        """Journals the result of `stage`: once this returns, no kill can lose it."""
        assert _FORMS[stage].model_fields.keys() <= value.keys(), stage
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


def restore_pool(pool: Path, experiments: Sequence[Experiment]) -> list[str]:
    """Writes the programs of stored experiments that `pool` lost, as they are journalled.

    Returns:
        The names of those that were missing or other.

    Raises:
        StoreError: they cannot be written.
    """
    restored = []
    for experiment in experiments:
        evaluated, updated = experiment.read("evaluate"), experiment.read("update")
        if evaluated is None or updated is None:
            continue
        path, text = pool / f"{updated['name']}.py", proposal_from(evaluated["proposal"]).program
        try:
            same = path.read_bytes() == text.encode()
        except OSError:
            same = False
        if not same:
            write_atomic(path, text)
            restored.append(updated["name"])
    return restored


def proposal_from(value: dict[str, Any]) -> Proposal:
    """A journalled proposal."""
    return Proposal(**{**value, "mechanisms": tuple(value.get("mechanisms", ()))})


def _fix(folder: Path) -> str:
    return f"restore {folder} from a backup, or start over with another --data-dir"
