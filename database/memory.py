"""The shared memory of all pipelines: what an element goes through when it is stored, scored, changed or removed.

Store, vector index, embedder and candidate rules meet here; the routers only translate to and from HTTP. A write is
answered when it is on disk: embedding and scoring follow (`database.settling`, `database.scores`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from common.embeddings import Embedder
from common.errors import ServiceError
from common.knobs import Database as DatabaseSettings
from common.records import Baseline, RunRecord, Usage
from database import keys, tree
from database.background import Background
from database.candidate_file import read_candidate_file
from database.candidate_manager import Candidates
from database.embedding_guard import EmbeddingGuard
from database.entries import entry_of, refuse_unknown_parent, with_score
from database.errors import NotFoundError, StoppingError, key_used
from database.evaluate_agent.model_judger import ModelJudger
from database.faiss_manager import VectorIndex
from database.judging import Judging
from database.models import Element, NewElement, ScoredElement, StoredExperiment
from database.repair import embed_again, repair
from database.scores import Scores
from database.settling import LONGEST_MOTIVATION, Settling
from database.store import Facts, NewEntry, Session, Store, Where

__all__ = ["Memory"]

_REQUEST = "request_sha256"
_KEEP_SECONDS = 10.0
_RESCORED_AT_ONCE = 50


class Memory:
    """Domain operations over a store. Thread-safe. `start` lets it settle and score in the background.

    Args:
        store: where everything is kept.
        embedder: turns motivations into vectors; asked lazily.
        judger: asks a language model for the judge's part of each score; None for the rubric. Asked once `start` was
            called.
    """

    def __init__(
        self, store: Store, embedder: Embedder, settings: DatabaseSettings, judger: ModelJudger | None = None
    ) -> None:
        cache = store.cache_file()
        self.store = store
        self.settings = settings
        self.scores = Scores()
        self.candidates = Candidates(settings, self.scores)
        self.index = VectorIndex(None if cache is None else Path(cache), settings.exact_windows, store.read)
        self.guard = EmbeddingGuard(embedder, settings.retry_seconds)
        self.settling = Settling(store, self.guard, self.index, self.scores, self.candidates)
        rest = settings.retry_seconds
        self.judging = None if judger is None else Judging(store, judger, self.scores, self.candidates, rest)
        self._settler = Background("settling", self._settle_some, rest)
        self._rescorer = Background("scoring", self._rescore_some, rest)
        self._keeper = Background("vector index", lambda: self.index.maintain(store.read), _KEEP_SECONDS)
        self._judge = None if self.judging is None else Background("judging", self.judging.step, rest)
        store.write(self.scores.begin)
        if settings.candidate_file is not None:
            indices, new_count = read_candidate_file(settings.candidate_file)
            store.write(lambda session: self.candidates.adopt(session, indices, new_count))

    def start(self) -> None:
        """Begins to settle pending elements, to judge, and to compute out-of-date scores in the background."""
        model = None if self.judging is None else self.judging.model
        self.store.write(lambda session: self.scores.choose(session, model))
        self._settler.start()
        if self._judge is not None:
            self._judge.start()
        self._rescorer.start()
        self._keeper.start()

    def hurry(self) -> None:
        """Nothing waits for an embedding or a verdict from now on: what lacks one is settled after the next start."""
        self.guard.close()
        if self.judging is not None:
            self.judging.hurry()

    def close(self) -> None:
        self.hurry()
        if self.judging is not None:
            self.judging.close()
        if self._judge is not None:
            self._judge.close()
        self._settler.close()
        self._rescorer.close()
        self._keeper.close()
        self.index.save()
        self.store.close()

    # Adding

    def add(
        self, element: NewElement, run: RunRecord | None = None, key: str | None = None, body: str | None = None
    ) -> StoredExperiment:
        """Stores an element and its run and updates the candidates when they are due, in one transaction.

        Returns when that is on disk; vectors, novelty and score follow in the background. A repeated `key` stores
        nothing and answers with the element stored under it; `body` is a hash of the request that a repetition has to
        have as well.

        Raises:
            RefusedError: empty result, unknown parent, an unfinished run, or a run of another program.
            ConflictError: the key was used before with another program, or with another body.
        """
        return self.submit(element, run, key, body).result()

    def submit(
        self,
        element: NewElement,
        run: RunRecord | None = None,
        key: str | None = None,
        body: str | None = None,
        usage: Sequence[Usage] = (),
    ) -> Future[StoredExperiment]:
        """As `add`, without waiting; `usage` is kept with it, under its index."""
        entry = entry_of(element, run, key)
        return self.submit_entry(lambda session: self._insert(session, entry, body, usage))

    def submit_entry(self, work: Callable[[Session], StoredExperiment]) -> Future[StoredExperiment]:
        """Runs a write that stores an element (see `keep`), without waiting; what it stored is settled afterwards."""
        stored = self.store.submit(work)
        stored.add_done_callback(lambda _: self._settler.wake())
        return stored

    def settles(self, index: int) -> bool:
        """Whether the element is about to be embedded or judged in the background; not while its embedder or judge
        rests."""
        if self.settling.settles(index):
            return True
        if self.judging is None or self._judge is None or not self.judging.judges(index):
            return False
        self._judge.wake()
        return True

    def with_score(self, stored: StoredExperiment) -> StoredExperiment:
        """`stored` with the score that it has by now."""
        scores = self._scores_now([stored.index])
        return stored.model_copy(update={"score": scores[stored.index]}) if scores else stored

    def _insert(self, session: Session, entry: NewEntry, body: str | None, usage: Sequence[Usage]) -> StoredExperiment:
        known = None if entry.key is None else keys.first_answer(session, entry.key, entry.element, body)
        if known is not None:
            return known
        stored = self.keep(session, entry)
        if usage:
            session.ledger.put_usage([record.model_copy(update={"index": stored.index}) for record in usage])
        if entry.key is not None and body is not None:
            keys.keep_body(session, entry.key, body)
        return stored

    def keep(self, session: Session, entry: NewEntry, index: int | None = None) -> StoredExperiment:
        """Stores an element and updates the candidates when they are due, within a transaction.

        Args:
            index: see `Session.insert`.

        Raises:
            RefusedError: unknown parent.
        """
        refuse_unknown_parent(session, entry.element.parent)
        index = session.insert(entry, index)
        score = None
        if index == 1:
            # The standard, wherever it was moved in the tree: nothing earlier is needed to judge it.
            evidence = entry.evidence.model_copy(update={"anchor": True})
            evaluation = self.scores.evaluate(session, evidence)
            session.set_evaluation(index, evidence, evaluation)
            score = evaluation.score
        self.candidates.after_insert(session, index)
        return StoredExperiment(index=index, name=entry.element.name, score=score, created=True)

    def once(
        self, route: str, key: str | None, work: Callable[[Session], dict[str, Any]], body: str = ""
    ) -> dict[str, Any]:
        """Runs `work` as one transaction; with a `key`, once: a repetition gets the stored answer of the first.

        Raises:
            ConflictError: the first had another `body` (a hash).
        """

        def run(session: Session) -> dict[str, Any]:
            if key is not None:
                before = _first_answer(session, route, key, body)
                if before is not None:
                    return before
            answer = work(session)
            if key is not None:
                session.put_answer(route, key, answer | {_REQUEST: body})
            return answer

        return self.store.write(run)

    def repeated(self, route: str, key: str | None, body: str = "") -> dict[str, Any] | None:
        """What `once` answered before under this key; None where that is still to be done. For work that is no single
        transaction.

        Raises:
            ConflictError: the first had another `body` (a hash).
        """
        if key is None:
            return None
        name = key
        return self.store.read(lambda session: _first_answer(session, route, name, body))

    # Scores

    def score(self, index: int) -> float | None:
        """The score, computed and kept if it is absent or out of date and can be had; else None.

        Raises:
            NotFoundError: there is no such element.
        """
        scores = self._scores([index])
        if index not in scores:
            raise NotFoundError(f"there is no element {index}")
        return scores[index]

    def _scores(self, indices: Sequence[int]) -> dict[int, float | None]:
        """As `score`, for each of these that exists. However many they are, it waits for pending ones once: the score
        of what is still pending then is None."""
        if self.store.read(lambda session: any(known.pending for known in tree.known(session, indices))):
            self.settling.settle()
        scores: dict[int, float | None] = {}
        for start in range(0, len(indices), _RESCORED_AT_ONCE):
            scores |= self._scores_now(indices[start : start + _RESCORED_AT_ONCE])
        return scores

    def _scores_now(self, indices: Sequence[int]) -> dict[int, float | None]:
        def look(session: Session) -> tuple[dict[int, float | None], list[int]]:
            known = tree.known(session, indices)
            stale = [one.index for one in known if not self._fresh(session, one)]
            return {one.index: one.score for one in known}, stale

        scores, stale = self.store.read(look)
        if stale:
            scores |= self.store.write(lambda session: {index: self.scores.rescore(session, index) for index in stale})
        return scores

    def _fresh(self, session: Session, facts: Facts) -> bool:
        return facts.revision in (None, self.scores.revision(session, facts.baseline_key))

    def rescore(self, seconds: float = 3.0) -> None:
        """Computes out-of-date scores now, for at most about `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._rescore_some():
            pass

    def _settle_some(self) -> bool:
        more = self.settling.step()
        if self._judge is not None:
            self._judge.wake()
        return more

    def _rescore_some(self) -> bool:
        """Computes some of the out-of-date scores; whether more are left. Writes of others come between."""
        if not self.store.read(lambda session: self.scores.stale(session, 1)):
            return False

        def work(session: Session) -> int:
            found = self.scores.stale(session, _RESCORED_AT_ONCE)
            for facts in found:
                self.scores.rescore(session, facts.index)
            return len(found)

        return self.store.write(work) > 0

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
            shown = evaluation or self.scores.evaluate(session, evidence)
            return {"index": index, **shown.model_dump(), "evidence": evidence.model_dump()}

        return self.store.read(work)

    def scored(self, indices: Sequence[int]) -> list[ScoredElement]:
        """Whole elements with their scores, in the order asked; what was deleted meanwhile is left out."""
        scores = self._scores(indices)
        found = self.store.read(lambda session: session.elements(indices))
        return [with_score(element, scores.get(element.index)) for element in found]

    def put_baseline(self, baseline: Baseline) -> int:
        """Keeps a baseline as the newest; returns how many elements are scored again because it changed."""
        count = self.store.write(lambda session: self.keep_baseline(session, baseline))
        self.rescore_soon()
        return count

    def keep_baseline(self, session: Session, baseline: Baseline) -> int:
        """As `put_baseline`, within a transaction, after which `rescore_soon` is to be called: the candidates are
        scored again at once, everything else that was measured against its key in the background."""
        changed = session.baseline(baseline.key) != baseline
        if changed:
            session.put_baseline(baseline)
        self.candidates.put_newest_key(session, baseline.key)
        self.candidates.refresh_all(session)
        return session.count(Where(baseline_key=baseline.key)) if changed else 0

    def rescore_soon(self) -> None:
        """Lets the background look for out-of-date scores now."""
        self._rescorer.wake()

    # Searching

    def similar(self, motivation: str, k: int) -> tuple[list[Element], int]:
        """The elements with the nearest motivations, nearest first; and how many are not searched yet, because they
        could not be embedded so far.

        Raises:
            ServiceError: the embedding server cannot be asked now.
            StoppingError: nor will it be, by this process.
        """
        if not self.store.read(lambda session: session.count(limit=1)):
            return [], 0
        answer = self.guard.query(motivation[:LONGEST_MOTIVATION])
        if answer is None:
            if self.guard.closed:
                raise StoppingError
            raise ServiceError(
                f"motivations cannot be compared now: {self.guard.last_error or 'the embedding server rests'}",
                "start the embedding server, or ask again in a few seconds",
            )
        model, windows = answer
        if self.settling.adopt(model):
            self._settler.wake()
        waiting = self.store.read(lambda session: session.count(Where(pending=True), limit=1))
        remaining = self.settling.settle() if waiting else 0

        def work(session: Session) -> list[Element]:
            found = self.index.search(session, windows, k)
            return session.elements([index for index, _ in found])

        return self.store.read(work), remaining

    # Mending

    def repair(self) -> dict[str, Any]:
        """See `database.repair`; every score follows in the background."""
        data = repair(self.store, self.scores, self.candidates)
        self._settler.wake()
        self.rescore_soon()
        return data

    def embed_again(self) -> int:
        """Has elements embedded again, in the background, whose vectors or sketch are missing or wrong, or all when the
        embedder has another model than before: how many."""
        # A model is told with its first answer.
        answer = self.guard.query("which model")
        if answer is not None:
            self.settling.adopt(answer[0])
        count = embed_again(self.store)
        self._settler.wake()
        return count


def _first_answer(session: Session, route: str, key: str, body: str) -> dict[str, Any] | None:
    before = session.answer(route, key)
    if before is not None and before.pop(_REQUEST, body) != body:
        raise key_used(key, f"{route} with another body")
    return before
