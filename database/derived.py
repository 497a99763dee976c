"""What is kept of an element beside its document, and can be computed from it again: what of it is wrong.

`database.invariants` tells it, `database.repair` puts it right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.errors import StoreError, first_line
from common.files import sha256_text
from common.records import Baseline, RunRecord
from common.result_table import parse_table
from database.evaluate_agent.score import SCORE_VERSION, Evaluation, Evidence, evaluate, evidence_of
from database.models import Element, Result
from database.novelty import PERMUTATIONS
from database.scores import Scores
from database.store import Facts, Session

__all__ = ["Fault", "Mend", "faults", "is_complete", "part_faults", "read_evidence", "rederived"]

Mend = Literal["row", "completeness", "evidence", "score", "vectors", "backup"]
"""What puts it right: the row from the document, the evidence from results and run, the score from the evidence,
vectors and sketch by embedding again; or only a backup."""
_UNREADABLE = (StoreError, ValueError, TypeError, KeyError)
_NUMBERS = ("source", "baseline_key", "loss", "benchmark", "flops_per_token", "work_exponent")
_TERMS = ("score", "loss_term", "benchmark_term", "judge")
_CLOSE = 1e-9
_UNIT = 0.01
"""How far from 1 the length of a vector may be."""
_SKETCH_BYTES = 4 * PERMUTATIONS


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the element `index`."""

    index: int
    what: str
    mend: Mend


@dataclass(frozen=True)
class _Against:
    """What the scores of one baseline key follow from now."""

    revision: int
    baseline: Baseline | None
    judge: str | None


def part_faults(session: Session, page: Sequence[Facts]) -> list[Fault]:
    """What is wrong with the vectors and sketches of these elements; those that are pending get new ones.

    Of a sketch it is seen whether it is there and how long it is, not what it holds: that takes longer than all else
    together, and it only chooses which programs are compared.
    """
    indices = [facts.index for facts in page if not facts.pending]
    windows, sketches = session.windows_of(indices), session.sketches_of(indices)
    dimensions = Counter(block.shape[1] for block in windows.values())
    dimension = dimensions.most_common(1)[0][0] if dimensions else 0
    return [fault for index in indices for fault in _parts(index, windows.get(index), sketches.get(index), dimension)]


def faults(session: Session, page: Sequence[Facts]) -> list[Fault]:
    """Everything that is wrong with these elements."""
    standards: dict[str | None, _Against | None] = {}
    found = part_faults(session, page)
    hashes = session.ledger.program_hashes([facts.index for facts in page])
    for facts in page:
        if facts.baseline_key not in standards:
            standards[facts.baseline_key] = _against(session, facts.baseline_key)
        found += _element(session, facts, hashes.get(facts.index), standards[facts.baseline_key])
    return found


def is_complete(result: Result) -> bool:
    """Whether neither row of an element's results is missing or has an empty cell."""
    return parse_table(result.train).complete and parse_table(result.test).complete


def read_evidence(session: Session, index: int) -> tuple[Evidence, Evaluation | None] | None:
    """As `Session.evidence`; None as well where it cannot be read."""
    try:
        return session.evidence(index)
    except _UNREADABLE:
        return None


def rederived(element: Element, runs: Sequence[RunRecord], before: Evidence | None) -> Evidence:
    """The evidence of an element from its results and run; what cannot be had from these is taken from `before`."""
    fresh = evidence_of(element.result.train, element.result.test, runs[0] if runs else None)
    if before is None:
        return fresh.model_copy(update={"anchor": element.index == 1 and element.parent is None})
    kept = {"anchor": before.anchor, "novelty": before.novelty, "verdict": before.verdict}
    return fresh.model_copy(update=kept)


def _against(session: Session, key: str | None) -> _Against | None:
    """None where the rules or the baseline cannot be read, which `Ledger.damages` tells."""
    scores = Scores()
    try:
        baseline = None if key is None else session.baseline(key)
        return _Against(scores.revision(session, key), baseline, scores.judge(session))
    except _UNREADABLE:
        return None


def _parts(index: int, windows: np.ndarray | None, sketch: bytes | None, dimension: int) -> Iterator[Fault]:
    wrong = None
    if windows is None:
        wrong = "it has no vectors of the embedding model of now and does not wait for them, so no search finds it"
    elif not len(windows) or not np.isfinite(windows).all():
        wrong = "its vectors are not finite, or cannot be read"
    elif windows.shape[1] != dimension:
        wrong = f"its vectors have {windows.shape[1]} numbers, those of others {dimension}"
    elif (np.abs(np.linalg.norm(windows, axis=1) - 1) > _UNIT).any():
        wrong = "its vectors are not of length 1, so no search finds it where it should"
    if wrong is not None:
        yield Fault(index, wrong, "vectors")
    if sketch is None or len(sketch) != _SKETCH_BYTES:
        said = "none" if sketch is None else f"one of {len(sketch)} bytes"
        yield Fault(
            index, f"expected a sketch of its program of {_SKETCH_BYTES} bytes, found {said}: "
            "later programs are not compared with it", "vectors"
        )  # fmt: skip


def _element(session: Session, facts: Facts, hashed: str | None, against: _Against | None) -> Iterator[Fault]:
    index = facts.index
    try:
        found = session.elements([index])
        runs = session.runs(index)
    except _UNREADABLE as error:
        yield Fault(index, f"its document or run cannot be read: {first_line(error)[:200]}", "backup")
        return
    if not found:
        yield Fault(index, "it has no document", "backup")
        return
    element = found[0]
    for name in ("name", "time", "summary"):
        if getattr(element, name) != getattr(facts, name):
            yield Fault(index, f"its {name} differs between its row and its document", "row")
    sha256 = sha256_text(element.program)
    if any(run.program_sha256 != sha256 for run in runs):
        yield Fault(index, "a run record is of another program", "backup")
    if hashed != sha256:
        yield Fault(index, "its program is not found by its hash", "row")
    if is_complete(element.result) != facts.complete:
        said = "complete" if facts.complete else "incomplete"
        yield Fault(index, f"it is marked {said}, which it is not", "completeness")
    try:
        known = session.evidence(index)
    except _UNREADABLE as error:
        yield Fault(index, f"its evidence cannot be read: {first_line(error)[:200]}", "evidence")
        return
    if known is None:
        yield Fault(index, "it has no evidence", "evidence")
        return
    yield from _evidence(facts, known[0], rederived(element, runs, known[0]))
    yield from _score(facts, *known, against)


def _evidence(facts: Facts, evidence: Evidence, derived: Evidence) -> Iterator[Fault]:
    for name in _NUMBERS:
        kept, there = getattr(evidence, name), getattr(derived, name)
        if kept != there:
            said = f"its evidence says {name} {_shown(kept)}, its results or run {_shown(there)}"
            yield Fault(facts.index, said, "evidence")
    for name in ("loss", "benchmark", "baseline_key"):
        kept = getattr(evidence, name)
        value = kept if kept is None or isinstance(kept, str) else kept.value
        if value != getattr(facts, name):
            said = f"its row says {name} {getattr(facts, name)}, its evidence {_shown(kept)}"
            yield Fault(facts.index, said, "evidence")
    if evidence.novelty is None and not facts.pending:
        yield Fault(facts.index, "its novelty is not known and it does not wait for it, so it gets no score", "vectors")


def _score(
    facts: Facts, evidence: Evidence, evaluation: Evaluation | None, against: _Against | None
) -> Iterator[Fault]:
    index = facts.index
    if evaluation is None:
        if (facts.score, facts.revision) != (None, None):
            yield Fault(index, "its row has a score or revision, and there is no evaluation", "score")
        return
    if evaluation.version > SCORE_VERSION:
        said = f"its score is of version {evaluation.version}, this release knows {SCORE_VERSION}"
        yield Fault(index, said, "score")
        return
    if facts.score != evaluation.score:
        yield Fault(index, "its score differs between its row and its evaluation", "score")
    if facts.revision is None or facts.revision != (evaluation.revision or 0):
        said = f"its row says revision {facts.revision}, its evaluation {evaluation.revision}"
        yield Fault(index, f"{said}: it may never be computed again", "score")
    elif against is None:
        return
    elif facts.revision > against.revision:
        yield Fault(index, f"its score is of revision {facts.revision}, the last was {against.revision}", "score")
    elif facts.revision == against.revision and evaluation.version == SCORE_VERSION:
        right = evaluate(evidence, against.baseline, against.judge)
        for term in _TERMS:
            if not _close(getattr(evaluation, term), getattr(right, term)):
                said = f"its {term} is {getattr(evaluation, term)}, from its evidence follows {getattr(right, term)}"
                yield Fault(index, said, "score")


def _shown(value: object) -> object:
    return getattr(value, "value", value)


def _close(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and abs(one - other) <= _CLOSE)
