"""The roots of the search: the seeds, which are elements 1 and 2, and the user's own programs (--seed-program).

The seeds are stored as the mean of their calibration runs; an own root is checked and trained once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.errors import ServiceError, StoreError, UsageError
from common.llm import Call, metered, usage_of
from common.records import RunRecord
from database.models import NewElement, Result
from pipeline.agents.roles import Proposal
from pipeline.analyse.stage import analyse
from pipeline.baselines import seed_programs
from pipeline.designer import genome_of, mechanisms_of
from pipeline.lab import Lab
from pipeline.measured import Measured, Root, load_baseline, mean_run, save_baseline, seeds_of
from pipeline.workspace import now
from training.baseline import recount
from training.programs import Program, load
from training.results import element_result, finished_run

__all__ = ["store_roots"]

MOTIVATIONS = {
    "delta_net": (
        "DeltaNet writes to its matrix memory by the delta rule: what the memory already answers to a key is "
        "subtracted from the value "
        "before it is added, so that a new association replaces the old one instead of piling up on it. It is the "
        "root of the "
        "search and the measure of every other design."
    ),
    "gated_delta_net": (
        "Gated DeltaNet adds to the delta rule a forget gate per head and token that depends on the data: the "
        "whole memory can fade at "
        "once, which the delta rule, erasing one key at a time, cannot do. An output gate lets each head be silent."
    ),
}
CHANGES = {"delta_net": "root", "gated_delta_net": "decay: none -> data-dependent per head; output gate"}


def store_roots(lab: Lab) -> None:
    """Stores the baseline and the roots (once; repeated starts find them stored), and makes them candidates.

    Roots of an earlier start that is not told of them again (--seed-program) stay roots.

    Raises:
        UsageError: a --seed-program is refused or does not finish training.
    """
    lab.ask(lambda: lab.database.put_baseline(lab.baseline))
    indices = []
    for program in seed_programs():
        run = recount(mean_run(lab.baseline_runs[program.name]), lab.baseline.tasks)
        origin = _Origin(MOTIVATIONS[program.name], CHANGES[program.name])
        indices.append(_store_root(lab, program, run, origin))
    own = [_store_own_root(lab, path) for path in lab.settings.run.seed_program]
    before = load_baseline(lab.workspace.root)
    roots = before.roots if before is not None else []
    known = [root.index for root in roots if _holds(lab, root.index, root.name)]
    indices = list(dict.fromkeys([*indices, *known, *own]))
    # Later the set has its own opinion of the shipped roots; what was just given is always tried.
    _make_candidates(lab, [index for index in own if index not in known] if _has_candidates(lab) else indices)
    roots = [_root(lab, index) for index in indices]
    save_baseline(lab.workspace.root, Measured(baseline=lab.baseline, runs=lab.baseline_runs, roots=roots))


def _has_candidates(lab: Lab) -> bool:
    """Whether the candidate set holds an element that was measured against this baseline."""
    return any(_comparable(lab, element.index) for element in lab.ask(lab.database.candidates))


def _make_candidates(lab: Lab, indices: Sequence[int]) -> None:
    """A full set may refuse one that is not above its lowest: told, and no reason to stop."""
    for index in indices:
        try:
            lab.ask(partial(lab.database.add_candidate, index))
        except ServiceError as error:
            if error.status != 400:
                raise
            lab.console.note(f"Root {index} is stored, but is no candidate: {error.message}")


def _root(lab: Lab, index: int) -> Root:
    scored = lab.ask(partial(lab.database.scored, index))
    runs = lab.ask(partial(lab.database.runs, index))
    if scored is None or not runs:
        raise StoreError(
            f"element {index}, a root of the search, is not in the database with its run", "use another store"
        )
    return Root(index=index, name=scored.name, score=scored.score, run=runs[-1])


@dataclass(frozen=True)
class _Origin:
    """Why a root is there: its motivation, and the words for the table."""

    motivation: str
    change: str


def _stored(lab: Lab, program: Program) -> int | None:
    """Index of the element that holds exactly this root, measured against this baseline; None when it is not
    stored."""
    for element in lab.ask(partial(lab.database.by_name, program.name)):
        if element.program == program.text and _comparable(lab, element.index):
            return element.index
    return None


def _holds(lab: Lab, index: int, name: str) -> bool:
    """Whether the database still holds this root under its index: another database would not."""
    element = lab.ask(partial(lab.database.element, index))
    return element is not None and element.name == name and _comparable(lab, index)


def _comparable(lab: Lab, index: int) -> bool:
    """Whether an element was measured against this baseline."""
    runs = lab.ask(partial(lab.database.runs, index))
    return bool(runs) and runs[-1].baseline_key == lab.baseline.key


def _store_root(lab: Lab, program: Program, run: RunRecord, origin: _Origin) -> int:
    """Stores a root unless it is there, and returns its index."""
    genome = genome_of(program.text)
    mechanisms = mechanisms_of(genome) if genome is not None else ()
    proposal = Proposal(program.name, origin.motivation, program.text, "root", origin.change, mechanisms=mechanisms)
    lab.ideas.claim_element(program.name, program.text)
    found = _stored(lab, program)
    if found is not None:
        return found
    calls: list[Call] = []
    with metered(calls.append):
        texts = analyse(lab, proposal, run, None)
    design = {"operator": "root", "change": origin.change, "genome": None, "mechanisms": list(mechanisms)}
    run = run.model_copy(update={"design": {**design, "seeds": seeds_of(run)}})
    element = NewElement(
        time=now(),
        name=program.name,
        result=Result(**element_result(run)),
        program=program.text,
        motivation=origin.motivation,
        log="",
        parent=None,
        **texts,
    )
    key = f"root:{program.sha256}:{lab.baseline.key}"
    return lab.ask(lambda: lab.database.add_experiment(key, element, run, usage_of(calls))).index


def _store_own_root(lab: Lab, path: Path) -> int:
    """Checks, trains and stores a program of the user's; its name carries its hash, so that an edited file is
    another root."""
    text = load(path)
    program = load(path, name=f"{_element_name(path)}_{text.sha256[:8]}")
    found = _stored(lab, program)
    if found is not None:
        lab.ideas.claim_element(program.name, program.text)
        return found
    report = lab.check(program)
    if not report.accepted:
        refused = report.why_refused()
        raise UsageError(f"--seed-program {path} is refused: {refused}", f"python training/check.py {path}")
    out = lab.workspace.roots / program.name
    run = finished_run(out, program_sha256=program.sha256, baseline_key=lab.baseline.key, seed=0) or lab.launcher.train(
        program,
        seed=0,
        out=out,
        run_id=f"{lab.workspace.run_id}:root:{program.name}",
        checks=report,
        counted_tasks=lab.baseline.tasks,
        on_event=lambda event: lab.console.progress(program.name, event),
        cancel=lab.cancelled,
    )
    lab.console.done(program.name)
    lab.checkpoint()
    if run.status != "finished":
        raise UsageError(f"--seed-program {path} ended {run.status}, {run.reason}: {run.detail}", f"see {out}")
    origin = _Origin(f"A root of the search given by the user: {path.name}.", "given by the user")
    return _store_root(lab, program, recount(run, lab.baseline.tasks), origin)


def _element_name(path: Path) -> str:
    name = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in path.stem.lower())
    return name.strip("_")[:50] or "root"
