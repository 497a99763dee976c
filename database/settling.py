"""What an element gets after it is stored: vectors, novelty, score. In the order of the indices, whoever asks for it.

Novelty is the distance to the nearest EARLIER motivation and program, so an element is settled after all that came
before it. Nothing is embedded or searched inside a write.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.embeddings import best_pair
from database import tree
from database.candidate_manager import Candidates
from database.embedding_guard import EmbeddingGuard
from database.errors import NotFoundError
from database.evaluate_agent.rubric import Novelty
from database.faiss_manager import VectorIndex
from database.models import Element
from database.novelty import Sketches, distance, shingles, sketch
from database.scores import Scores
from database.store import Session, Store, Where

__all__ = ["LONGEST_MOTIVATION", "Settling"]

LONGEST_MOTIVATION = 200_000
"""Characters of a motivation that are embedded: more than the windows that the embedding server looks at."""
_BATCH = 32
_BATCH_BYTES = 8 << 20
"""About how many bytes of elements are held for a batch; a larger one is a batch by itself."""
_SMALL = 8
_TURN_SECONDS = 5.0


@dataclass(frozen=True)
class _Embedded:
    """A stored element that gets its vectors now: `windows` float32 [w, dimension], `hashes` its program's shingles."""

    element: Element
    hashes: np.ndarray
    model: str
    windows: np.ndarray

    @property
    def index(self) -> int:
        return self.element.index


class Settling:
    """Settles pending elements, for the background and for requests that need it now. Thread-safe."""

    def __init__(
        self, store: Store, guard: EmbeddingGuard, index: VectorIndex, scores: Scores, candidates: Candidates
    ) -> None:
        self._store = store
        self._guard = guard
        self._index = index
        self._scores = scores
        self._candidates = candidates
        self._sketches = Sketches()
        self._turn = threading.Lock()
        self._batch = _BATCH

    def step(self) -> bool:
        """Settles one batch; whether more can be settled at once."""
        found = self._once(self._batch, _TURN_SECONDS)
        if found is None:
            # Many long texts may not be embedded within the time a request is given.
            self._batch = max(1, self._batch // 4)
            return False
        self._batch = min(_BATCH, 2 * self._batch)
        return found > 0

    def settle(self, limit: int = _BATCH, seconds: float = 3.0) -> int:
        """Settles pending elements, oldest first, as far as `limit`, `seconds` and the embedding server allow.

        Returns:
            How many are still pending.
        """
        deadline = time.monotonic() + seconds
        left = limit
        while left > 0 and time.monotonic() < deadline:
            found = self._once(min(_SMALL, left), deadline - time.monotonic())
            if not found:
                break
            left -= found
        return self.pending()

    def settles(self, index: int) -> bool:
        """Whether `index` is pending, and not left so for now because the embedding server cannot be asked."""
        if self._guard.resting:
            return False
        try:
            return self._store.read(lambda session: tree.facts_of(session, index)).pending
        except NotFoundError:
            return False

    def adopt(self, model: str) -> bool:
        """Vectors of two models are not comparable: where those that are stored are of another than the embedder's,
        every element is embedded again, before anything is compared. Whether that is so."""
        known = self._store.read(lambda session: session.vector_state().model)
        if known in (None, model):
            return False
        self._store.write(lambda session: session.use_model(model))
        return True

    def pending(self) -> int:
        return self._store.read(lambda session: session.count(Where(pending=True)))

    def _once(self, limit: int, patience: float) -> int | None:
        """Settles at most `limit` elements; returns how many, or 1 where more are to be settled than before; None when
        they cannot be embedded now: somebody else does so for longer than `patience` seconds (the first batch waits for
        the embedding server to start)."""
        if self._guard.resting or not self._turn.acquire(timeout=max(0.0, patience)):
            return None
        try:
            waiting = self._store.read(lambda session: _pending(session, limit))
            if not waiting:
                return 0
            answer = self._guard.windows([element.motivation[:LONGEST_MOTIVATION] for element in waiting])
            if answer is None:
                return None
            model, found = answer
            if self.adopt(model):
                # What came before these is pending again, and comes first.
                return 1
            embedded = [
                _Embedded(element, shingles(element.program), model, windows)
                for element, windows in zip(waiting, found, strict=True)
            ]
            novelties = self._store.read(lambda session: [self._novelty(session, item, embedded) for item in embedded])
            self._store.write(lambda session: self._keep(session, embedded, novelties))
            return len(embedded)
        finally:
            self._turn.release()

    def _novelty(self, session: Session, item: _Embedded, batch: Sequence[_Embedded]) -> Novelty:
        """Distance to the nearest earlier motivation and program, among those stored and those of the same batch."""
        earlier = [other for other in batch if other.index < item.index]
        motivations = self._index.search(session, item.windows, 1, before=item.index)
        motivations += [(other.index, best_pair(item.windows, other.windows)) for other in earlier]
        motivation = max(motivations, key=lambda pair: (pair[1], -pair[0]), default=None)
        programs = [(distance(item.hashes, other.hashes), other.index) for other in earlier]
        stored = self._sketches.nearest(session, item.hashes, before=item.index)
        if stored is not None:
            programs.append((stored[1], stored[0]))
        program = min(programs, default=None)
        return Novelty(
            motivation=None if motivation is None else min(1.0, max(0.0, 1 - motivation[1])),
            motivation_index=None if motivation is None else motivation[0],
            program=None if program is None else program[0],
            program_index=None if program is None else program[1],
        )

    def _keep(self, session: Session, embedded: Sequence[_Embedded], novelties: Sequence[Novelty]) -> None:
        kept = []
        now = {element.index: element for element in session.elements([item.index for item in embedded])}
        for item, novelty in zip(embedded, novelties, strict=True):
            known, element = session.evidence(item.index), now.get(item.index)
            # While it was being embedded here another process may have settled or removed it; or the store was
            # emptied, and its index given to another design.
            if known is None or element is None or not tree.facts_of(session, item.index).pending:
                continue
            if (element.motivation, element.program) != (item.element.motivation, item.element.program):
                continue
            evidence = known[0] if known[0].novelty is not None else known[0].model_copy(update={"novelty": novelty})
            session.put_sketch(item.index, sketch(item.hashes))
            session.put_windows(item.index, item.model, item.windows)
            session.set_evaluation(item.index, evidence, self._scores.evaluate(session, evidence))
            kept.append(item.index)
        self._candidates.reconsider(session, kept)


def _pending(session: Session, limit: int) -> list[Element]:
    """The oldest that are pending, as many as `limit` and `_BATCH_BYTES` allow, and at least one."""
    indices = [facts.index for facts in session.facts(Where(pending=True), limit=limit)]
    sizes = session.bytes_of(indices)
    held = itertools.accumulate(sizes.get(index, 0) for index in indices)
    many = sum(size <= _BATCH_BYTES for size in held)
    return session.elements(indices[: max(1, many)])
