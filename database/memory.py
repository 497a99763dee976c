"""The shared memory of all pipelines: what an element goes through when it is stored, scored, changed or removed.

Store, vector index, embedder and candidate rules meet here; the routers only translate to and from HTTP. Embedding is
always done before a transaction, never in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.embeddings import Embedder, best_pair
from common.errors import ServiceError
from common.files import sha256_text
from common.records import Baseline, RunRecord
from common.settings import Database as DatabaseSettings
from database import tree
from database.candidate_manager import Candidates
from database.embedding_guard import EmbeddingGuard
from database.errors import NotFoundError, RefusedError, key_used
from database.evaluate_agent.rubric import Novelty
from database.evaluate_agent.score import SCORE_VERSION, Evaluation, Evidence, evaluate, evidence_of, parse_table
from database.faiss_manager import VectorIndex
from database.models import Element, NewElement, ScoredElement, StoredExperiment
from database.novelty import Sketches, shingles, sketch
from database.store import NewEntry, Session, Store, Where

__all__ = ["Memory"]

_BODIES = "body of"
_REQUEST = "request_sha256"
_SCORED_AS = "score_version"
_SETTLE_WITH_WRITE = 4
_SETTLE_WITH_SEARCH = 32


@dataclass(frozen=True)
class _Embedded:
    """A motivation's windows, and its shingled program: what its novelty is computed from. `index` is None for a new
    element."""

    index: int | None
    model: str
    windows: np.ndarray
    hashes: np.ndarray


class Memory:
    """Domain operations over a store. Thread-safe.

    Args:
        store: where everything is kept.
        embedder: turns motivations into vectors; asked lazily.
    """

    def __init__(self, store: Store, embedder: Embedder, settings: DatabaseSettings) -> None:
        cache = store.cache_file()
        self.store = store
        self.settings = settings
        self.candidates = Candidates(settings)
        self.index = VectorIndex(None if cache is None else Path(cache))
        self.guard = EmbeddingGuard(embedder)
        self._sketches = Sketches()

    def close(self) -> None:
        self.guard.close()
        self.index.save()
        self.store.close()

    # Adding

    def add(
        self, element: NewElement, run: RunRecord | None = None, key: str | None = None, body: str | None = None
    ) -> StoredExperiment:
        """Stores an element, its run, vectors and score, and updates the candidates when they are due, in one
        transaction.

        A repeated `key` stores nothing and answers with the element stored under it; `body` is a hash of the request
        that a repetition has to have as well. When the motivation cannot be
        embedded now the element is stored all the same, without judge and score, and is pending.

        Raises:
            RefusedError: empty result, unknown parent, an unfinished run, or a run of another program.
            ConflictError: the key was used before with another program, or with another body.
        """
        wanted = element.stored()
        _refuse_unfit(element, run)
        known = self.store.read(lambda session: self._repeat(session, key, wanted, body))
        if known is not None:
            return known
        self.store.read(lambda session: _refuse_unknown_parent(session, wanted.parent))
        hashes = shingles(wanted.program)
        waiting = self.store.read(lambda session: _pending(session, _SETTLE_WITH_WRITE))
        embedded = self._embed([*waiting, (None, wanted.motivation, hashes)])
        evidence = evidence_of(wanted.result.train, wanted.result.test, run)
        complete = parse_table(wanted.result.train).complete and parse_table(wanted.result.test).complete
        own = embedded[-1] if embedded else None
        entry = NewEntry(
            element=wanted,
            evidence=evidence,
            complete=complete,
            sketch=sketch(hashes),
            windows=None if own is None else own.windows,
            model=None if own is None else own.model,
            run=run,
            key=key,
        )
        return self.store.write(lambda session: self._insert(session, entry, embedded, body))

    def _insert(
        self, session: Session, entry: NewEntry, embedded: list[_Embedded], body: str | None
    ) -> StoredExperiment:
        known = self._repeat(session, entry.key, entry.element, body)
        if known is not None:
            return known
        _refuse_unknown_parent(session, entry.element.parent)
        # Searches first: the caches follow what is committed, so nothing may be written before them.
        novelties = [self._novelty(session, item, embedded) for item in embedded]
        index = session.insert(entry)
        if entry.key is not None and body is not None:
            session.put_answer(_BODIES, entry.key, {_REQUEST: body})
        for item, novelty in zip(embedded[:-1], novelties[:-1], strict=True):
            self._settle_one(session, item, novelty)
        self.candidates.reconsider(session, [item.index for item in embedded if item.index is not None])
        evidence = entry.evidence.model_copy(
            update={
                "novelty": novelties[-1] if novelties else None,
                "anchor": index == 1 and entry.element.parent is None,
            }
        )
        evaluation = _evaluated(session, evidence)
        session.set_evaluation(index, evidence, evaluation)
        self.candidates.after_insert(session)
        return StoredExperiment(index=index, name=entry.element.name, score=evaluation.score, created=True)

    def _repeat(
        self, session: Session, key: str | None, wanted: NewElement, body: str | None
    ) -> StoredExperiment | None:
        facts = None if key is None else session.find_key(key)
        if key is None or facts is None:
            return None
        before, named = session.answer(_BODIES, key), key.partition(":")[2]
        if session.elements([facts.index])[0].program != wanted.program:
            raise key_used(named, f"element {facts.index} ({facts.name}), which is another program")
        if before is not None and before[_REQUEST] != body:
            raise key_used(named, f"element {facts.index} ({facts.name}), with another body")
        return StoredExperiment(index=facts.index, name=facts.name, score=facts.score, created=False)

    def once(
        self, route: str, key: str | None, work: Callable[[Session], dict[str, Any]], body: str = ""
    ) -> dict[str, Any]:
        """Runs `work` as one transaction; with a `key`, once: a repetition gets the stored answer of the first.

        Raises:
            ConflictError: the first had another `body` (a hash).
        """

        def run(session: Session) -> dict[str, Any]:
            if key is not None:
                before = session.answer(route, key)
                if before is not None:
                    if before.pop(_REQUEST, body) != body:
                        raise key_used(key, f"{route} with another body")
                    return before
            answer = work(session)
            if key is not None:
                session.put_answer(route, key, answer | {_REQUEST: body})
            return answer

        return self.store.write(run)

    # Vectors and scores that could not be had at once

    def settle(self, limit: int = _SETTLE_WITH_SEARCH, index: int | None = None) -> int:
        """Embeds and scores pending elements (or just `index`), as far as the embedding server allows.

        Returns:
            How many are still pending.
        """
        waiting = self.store.read(lambda session: _pending(session, limit, index))
        embedded = self._embed(waiting)
        if embedded:

            def work(session: Session) -> None:
                novelties = [self._novelty(session, item, embedded) for item in embedded]
                for item, novelty in zip(embedded, novelties, strict=True):
                    self._settle_one(session, item, novelty)
                self.candidates.reconsider(session, [item.index for item in embedded if item.index is not None])

            self.store.write(work)
        return self.store.read(lambda session: session.count(Where(pending=True)))

    def _embed(self, texts: Sequence[tuple[int | None, str, np.ndarray]]) -> list[_Embedded]:
        answer = self.guard.windows([text for _, text, _ in texts]) if texts else None
        if answer is None:
            return []
        model, found = answer
        return [
            _Embedded(index, model, windows, hashes) for (index, _, hashes), windows in zip(texts, found, strict=True)
        ]

    def _novelty(self, session: Session, item: _Embedded, batch: Sequence[_Embedded]) -> Novelty:
        """Distance to the nearest earlier motivation and program, among those stored and those of the same batch."""
        found = self.index.search(session, item.windows, 1, before=item.index)
        for other in batch:
            if other is not item and other.index is not None and (item.index is None or other.index < item.index):
                found.append((other.index, best_pair(item.windows, other.windows)))
        nearest = max(found, key=lambda pair: (pair[1], -pair[0]), default=None)
        program = self._sketches.nearest(session, item.hashes, before=item.index)
        return Novelty(
            motivation=None if nearest is None else min(1.0, max(0.0, 1 - nearest[1])),
            motivation_index=None if nearest is None else nearest[0],
            program=None if program is None else program[1],
            program_index=None if program is None else program[0],
        )

    def _settle_one(self, session: Session, item: _Embedded, novelty: Novelty) -> None:
        assert item.index is not None
        known = session.evidence(item.index)
        # Another writer may have settled it while it was being embedded here.
        if known is None or not tree.facts_of(session, item.index).pending:
            return
        evidence = known[0] if known[0].novelty is not None else known[0].model_copy(update={"novelty": novelty})
        session.put_windows(item.index, item.model, item.windows)
        session.set_evaluation(item.index, evidence, _evaluated(session, evidence))

    def score(self, index: int) -> float | None:
        """The score, computed and kept if it is absent and can be had; else None.

        Raises:
            NotFoundError: there is no such element.
        """
        facts = self.store.read(lambda session: tree.facts_of(session, index))
        if facts.score is None and facts.pending:
            self.settle(1, index)
            facts = self.store.read(lambda session: tree.facts_of(session, index))
        return facts.score

    def score_details(self, index: int) -> dict[str, Any]:
        """Terms, judge parts and how each was obtained, version, clip widths, baseline key; and the evidence.

        Raises:
            NotFoundError: there is no such element.
        """
        self.score(index)

        def work(session: Session) -> dict[str, Any]:
            known = session.evidence(index)
            if known is None:
                raise NotFoundError(f"there is no element {index}")
            evidence, evaluation = known
            shown = evaluation or _evaluated(session, evidence)
            return {"index": index, **shown.model_dump(), "evidence": evidence.model_dump()}

        return self.store.read(work)

    def scored(self, indices: Sequence[int]) -> list[ScoredElement]:
        """Whole elements with their scores, in the order asked."""
        scores = {index: self.score(index) for index in indices}
        found = self.store.read(lambda session: session.elements(indices))
        return [with_score(element, scores[element.index]) for element in found]

    def put_baseline(self, baseline: Baseline) -> int:
        """Keeps a baseline as the newest and scores again what was measured against its key; returns how many."""

        def work(session: Session) -> int:
            outdated = session.state(_SCORED_AS) != SCORE_VERSION
            changed = session.baseline(baseline.key) != baseline
            if changed:
                session.put_baseline(baseline)
            self.candidates.put_newest_key(session, baseline.key)
            if not changed and not outdated:
                return 0
            # Scores of two versions of the rules are no more comparable than those of two baselines.
            measured = session.facts(Where() if outdated else Where(baseline_key=baseline.key))
            session.put_state(_SCORED_AS, SCORE_VERSION)
            for facts in measured:
                self.candidates.rescore(session, facts.index)
            return len(measured)

        return self.store.write(work)

    # Searching

    def similar(self, motivation: str, k: int) -> list[Element]:
        """The elements with the nearest motivations, nearest first.

        Raises:
            ServiceError: the embedding server cannot be asked now.
        """
        if not self.store.read(lambda session: session.count(limit=1)):
            return []
        self.settle()
        answer = self.guard.windows([motivation])
        if answer is None:
            raise ServiceError(
                f"motivations cannot be compared now: {self.guard.last_error or 'the embedding server rests'}",
                "start the embedding server, or ask again in a few seconds",
            )
        windows = answer[1][0]

        def work(session: Session) -> list[Element]:
            found = self.index.search(session, windows, k)
            return session.elements([index for index, _ in found])

        return self.store.read(work)

    # Removing and mending

    def delete(self, session: Session, indices: Sequence[int]) -> int:
        """Removes elements with all that belongs to them; their children go to the nearest ancestor that stays.

        Returns:
            How many children moved.
        """
        moved = tree.detach(session, indices)
        session.delete(indices)
        return moved

    def clean_invalid(self, session: Session) -> dict[str, Any]:
        """Removes the elements whose train or test row is missing or has an empty cell."""
        before = session.count()
        gone = [facts.index for facts in session.facts(Where(incomplete=True))]
        moved = self.delete(session, gone)
        data = {
            "count_before": before,
            "cleaned_count": len(gone),
            "reparented_children": moved,
            "count_after": before - len(gone),
        }
        return data if gone else data | {"message": "every element is complete"}

    def repair(self, session: Session) -> dict[str, Any]:
        """Derives again what can be derived: completeness, scores, parents that do not exist, candidates, the vector
        index."""
        problems = session.check()
        facts = session.facts()
        known = {item.index for item in facts}
        orphans = [item.index for item in facts if item.parent is not None and item.parent not in known]
        session.set_parent(orphans, None)
        completed = 0
        for item in facts:
            element = session.elements([item.index])[0]
            complete = parse_table(element.result.train).complete and parse_table(element.result.test).complete
            if complete != item.complete:
                session.set_complete(item.index, complete)
                completed += 1
            self.candidates.rescore(session, item.index)
        candidates = [item.index for item in self.candidates.ranked(session)]
        session.put_candidates(candidates[: self.settings.candidate_capacity])
        return {
            "elements": len(facts),
            "storage_problems": problems,
            "orphans_made_roots": len(orphans),
            "completeness_corrected": completed,
            "candidates": len(candidates),
        }


def with_score(element: Element, score: float | None) -> ScoredElement:
    return ScoredElement(**{name: getattr(element, name) for name in Element.model_fields}, score=score)


def _evaluated(session: Session, evidence: Evidence) -> Evaluation:
    return evaluate(evidence, None if evidence.baseline_key is None else session.baseline(evidence.baseline_key))


def _pending(session: Session, limit: int, index: int | None = None) -> list[tuple[int | None, str, np.ndarray]]:
    where = Where(pending=True) if index is None else Where(pending=True, after=index - 1)
    found = [facts.index for facts in session.facts(where, limit=limit)]
    if index is not None:
        found = [item for item in found if item == index]
    return [(element.index, element.motivation, shingles(element.program)) for element in session.elements(found)]


def _refuse_unknown_parent(session: Session, parent: int | None) -> None:
    if parent is None:
        return
    try:
        tree.facts_of(session, parent)
    except NotFoundError as error:
        raise RefusedError(f"expected the index of a stored element as parent, got {parent}") from error


def _refuse_unfit(element: NewElement, run: RunRecord | None) -> None:
    if not element.result.train and not element.result.test:
        raise RefusedError("expected result to hold the train and test CSV, got an empty result")
    if run is None:
        return
    if run.status != "finished":
        raise RefusedError(
            f"expected a finished run, got one that {run.status}: only finished experiments become elements"
        )
    if run.program_sha256 != sha256_text(element.program):
        raise RefusedError("the run's program_sha256 is not that of the element's program: another text was trained")
