"""The candidate set: the best designs, from which parents and references are drawn. It changes only in batches.

All of it is rows of the store: these functions run inside the transaction of whoever calls them. Ranks are best score
first.

Scores are compared within one baseline only: ranked are the elements that were measured against the newest baseline
that has elements (see `Candidates.key`). Members measured against another one come after all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from common.knobs import Database as DatabaseSettings
from database.answers import CandidateState, Merged, Rebuilt
from database.errors import NotFoundError, RefusedError
from database.evaluate_agent.score import PUBLISHED
from database.scores import BASELINES, Scores
from database.store import Facts, Session, Where

__all__ = ["FORCE_NEWEST", "MERGED", "Candidates"]

FORCE_NEWEST = 300
_WIDTH = 0.1
MERGED = "merged_through"
"""State: the highest index when elements were merged last."""


@dataclass(frozen=True)
class _Standard:
    """Loss and benchmark that elements are held against, and how far off they may be, as shares of these."""

    loss: float
    benchmark: float
    loss_width: float
    benchmark_width: float

    def admits(self, facts: Facts) -> bool:
        """Whether the leak rule lets this element in."""
        if facts.loss is None or facts.benchmark is None:
            return False
        near = abs(facts.loss - self.loss) / self.loss < self.loss_width
        floor = -self.benchmark_width
        return near and (self.benchmark <= 0 or (facts.benchmark - self.benchmark) / self.benchmark > floor)


class Candidates:
    """The rules of the set: capacity, cold start, batch, and which elements may enter.

    An element enters only if it was measured against the baseline of now,
    |loss - standard| / standard < width (lower is suspected leakage) and
    (benchmark - standard) / standard > -width. The standard is element 1 where both were measured against the same
    baseline, else
    the baseline itself; width is 0.1, or the baseline's clip width where that is wider.
    """

    def __init__(self, settings: DatabaseSettings, scores: Scores) -> None:
        self._scores = scores
        self.capacity = settings.candidate_capacity
        self.cold_start = settings.cold_start
        self.batch = settings.update_batch

    def key(self, session: Session) -> str | None:
        """The baseline of now: the most recently put one that has elements; None, the published constants, without
        one."""
        for key in reversed(session.state(BASELINES) or []):
            if session.count(Where(baseline_key=key), limit=1):
                return str(key)
        return None

    def put_newest_key(self, session: Session, key: str) -> None:
        """Records that this baseline was put last. When that makes it the baseline of now, what was measured against
        it takes its places in the set, once the cold start is over."""
        before = self.key(session)
        order = session.state(BASELINES) or []
        if order[-1:] != [key]:
            session.put_state(BASELINES, [*(one for one in order if one != key), key])
        if self.key(session) != before and self.merged_through(session):
            self.merge(session, session.facts(order="newest", limit=FORCE_NEWEST), mark=False)

    def ranked(self, session: Session) -> list[Facts]:
        """The set by rank: those measured against the baseline of now, best score first, then the others."""
        key = self.key(session)
        # The store's order is by score; sorting is stable.
        return sorted(session.candidates(), key=lambda facts: facts.baseline_key != key)

    def new_count(self, session: Session) -> int:
        """Elements stored since the last merge."""
        return session.count(Where(after=self.merged_through(session)))

    def due(self, session: Session, newest: int | None = None) -> bool:
        """Whether the cold start is over and a batch is full.

        Args:
            newest: the highest index stored, where it is known.
        """
        merged = self.merged_through(session)
        if newest is None:
            newest = next(iter(session.ranked("newest", limit=1)), 0)
        # An index is given once, so that no more elements can have come than indices.
        if newest - merged < self.batch:
            return False
        # First what is kept: MongoDB has to be asked for the other, for which all that was gathered is sent.
        if session.count(Where(explored=True), limit=self.cold_start) < self.cold_start:
            return False
        return session.count(Where(after=merged), limit=self.batch) >= self.batch

    def after_insert(self, session: Session, index: int) -> Merged | None:
        """Merges the newest elements when they are due. Part of the transaction that stored `index`, the last one."""
        if not self.due(session, index):
            return None
        return self.merge(session, session.facts(Where(after=self.merged_through(session))))

    def reconsider(self, session: Session, indices: Sequence[int]) -> None:
        """Merges elements that were passed over because they had no score yet, now that they have one."""
        merged = self.merged_through(session)
        late = [facts for index in indices if index <= merged for facts in _one(session, index)]
        if late:
            self.merge(session, late, mark=False)

    def merge(self, session: Session, newest: list[Facts], *, mark: bool = True) -> Merged:
        """Brings the scores of `newest` and of the current set up to date, and keeps the best of those that may enter;
        members measured against another baseline keep only the places that are left.

        Args:
            mark: whether everything stored so far counts as merged from now on.
        """
        key = self.key(session)
        old = {facts.index: facts for facts in session.candidates()}
        fresh = [facts for facts in newest if facts.index not in old]
        pool = list(old.values())
        standard = self.standard(session, key)
        if standard is not None:
            pool += [facts for facts in fresh if facts.baseline_key == key and standard.admits(facts)]
        scores = {facts.index: self._scores.fresh(session, facts) for facts in pool}
        ranked = sorted(pool, key=lambda facts: (facts.baseline_key != key, *_rank(scores[facts.index], facts.index)))
        final = [facts.index for facts in ranked if facts.index in old or scores[facts.index] is not None][
            : self.capacity
        ]
        session.put_candidates(final)
        if mark:
            top = session.facts(order="newest", limit=1)
            session.put_state(MERGED, top[0].index if top else 0)
        comparable = {facts.index for facts in pool if facts.baseline_key == key}
        known = [scores[index] for index in final if index in comparable]
        numbers = [score for score in known if score is not None]
        entries = len(set(final) - set(old))
        return {
            "updated_at": _now(),
            "total_evaluated": len(old) + len(fresh),
            "new_elements_evaluated": len(fresh),
            "old_candidates": len(old),
            "final_candidates": len(final),
            "new_entries": entries,
            "replaced_entries": len(set(old) - set(final)),
            "highest_score": max(numbers, default=None),
            "lowest_score": min(numbers, default=None),
            "average_score": sum(numbers) / len(numbers) if numbers else None,
        }

    def force_update(self, session: Session) -> Merged:
        """Merges the newest 300, whether or not they are due."""
        return self.merge(session, session.facts(order="newest", limit=FORCE_NEWEST))

    def rebuild(self, session: Session) -> Rebuilt:
        """The best stored scores of the baseline of now, unfiltered."""
        old = session.candidates()
        key = self.key(session)
        where = Where(baseline_key=key, published=key is None)
        best = [facts for facts in session.facts(where, order="score", limit=self.capacity) if facts.score is not None]
        session.put_candidates([facts.index for facts in best])
        return {
            "updated_at": _now(),
            "old_candidate_count": len(old),
            "new_candidate_count": len(best),
            "message": f"the candidate set holds the best {len(best)} of the stored scores",
        }

    def standard(self, session: Session, key: str | None) -> _Standard | None:
        """What decides whether an element measured against the baseline `key` may enter; None where none may."""
        baseline = PUBLISHED if key is None else session.baseline(key)
        if baseline is None:
            return None
        loss, benchmark = baseline.loss, baseline.benchmark
        first = session.facts(limit=1)
        if first and first[0].index == 1 and first[0].baseline_key == key:
            loss = loss if first[0].loss is None else first[0].loss
            benchmark = benchmark if first[0].benchmark is None else first[0].benchmark
        if benchmark is None or not loss > 0:
            return None
        return _Standard(loss, benchmark, max(_WIDTH, baseline.loss_clip), max(_WIDTH, baseline.benchmark_clip))

    def adopt(self, session: Session, indices: Sequence[int], new_count: int) -> None:
        """Takes over a set that another service kept, unless this store has had one.

        Args:
            new_count: elements stored since that set was last updated.
        """
        if session.candidates() or session.state(MERGED) is not None:
            return
        known = [facts.index for index in dict.fromkeys(indices) for facts in _one(session, index)]
        session.put_candidates(known[: self.capacity])
        newest = session.ranked("newest", limit=1, offset=max(0, new_count))
        session.put_state(MERGED, newest[0] if newest else 0)

    def take_over(self, session: Session, indices: Sequence[int], merged: int) -> list[int]:
        """Makes the set that of a store which this one is a copy of; returns what is beyond the capacity.

        Args:
            merged: `merged_through` of that store.
        """
        known = list(dict.fromkeys(indices))
        for index in known[: self.capacity]:
            self._scores.rescore(session, index)
        session.put_candidates(known[: self.capacity])
        if merged:
            session.put_state(MERGED, merged)
        return known[self.capacity :]

    def refresh_all(self, session: Session) -> None:
        """Brings the scores of the whole set up to date."""
        for facts in session.candidates():
            self._scores.fresh(session, facts)

    def add(self, session: Session, index: int) -> None:
        """Puts one element into the set by hand; a full set gives up its lowest when that is lower, or when only the
        new one was measured against the baseline of now. Nothing happens to an element that is in the set already.

        Raises:
            NotFoundError: there is no such element.
            RefusedError: the set is full and the element is not above its lowest.
        """
        known = session.evidence(index)
        if known is None:
            raise NotFoundError(f"there is no element {index}")
        current = self.ranked(session)
        kept = [facts.index for facts in current]
        if index in kept:
            return
        # Kept once nothing can be refused any more: a store without transactions does not take back what was changed.
        score = self._scores.evaluate(session, known[0]).score
        if len(kept) >= self.capacity:
            key, last = self.key(session), current[-1]
            ours = _one(session, index)[0].baseline_key
            # A score is held against another one of the same baseline only.
            above = last.score is None or (score is not None and score > last.score)
            if (ours == key) != (last.baseline_key == key):
                above = ours == key
            if score is None or not above:
                said = "has no score" if score is None else f"scores {score:.4f}"
                raise RefusedError(
                    f"the candidate set is full ({self.capacity}); element {index} {said} and is not above its lowest"
                )
            kept = kept[: self.capacity - 1]
        self._scores.rescore(session, index)
        session.put_candidates([*kept, index])

    def refresh(self, session: Session, index: int) -> None:
        """Scores a candidate again.

        Raises:
            NotFoundError: it is not in the set.
        """
        if index not in {facts.index for facts in session.candidates()}:
            raise NotFoundError(f"element {index} is not a candidate")
        self._scores.rescore(session, index)

    def remove(self, session: Session, *, index: int | None = None, name: str | None = None) -> int:
        """Takes candidates out by index or name, all of them without either; returns how many there were."""
        current = session.candidates()
        gone = {
            facts.index
            for facts in current
            if (index is None or facts.index == index) and (name is None or facts.name == name)
        }
        if gone:
            session.put_candidates([facts.index for facts in current if facts.index not in gone])
        return len(gone)

    def stats(self, session: Session) -> CandidateState:
        """The published statistics, without scores for an empty set; and the cold start."""
        key = self.key(session)
        current = session.candidates()
        data: CandidateState = {
            "capacity": self.capacity,
            "current_size": len(current),
            "update_threshold": self.batch,
            "cold_start": self.cold_start,
            "new_data_count": self.new_count(session),
            "needs_update": self.due(session),
        }
        scores = [facts.score for facts in current if facts.score is not None and facts.baseline_key == key]
        if current:
            highest, lowest = max(scores, default=None), min(scores, default=None)
            data["highest_score"], data["lowest_score"] = highest, lowest
            data["average_score"] = sum(scores) / len(scores) if scores else None
            data["score_range"] = None if highest is None or lowest is None else highest - lowest
        return data

    def merged_through(self, session: Session) -> int:
        """The index of the newest element when the set was merged last."""
        return int(session.state(MERGED) or 0)


def _one(session: Session, index: int) -> list[Facts]:
    return session.facts(Where(index=index), limit=1)


def _rank(score: float | None, index: int) -> tuple[bool, float, int]:
    return (score is None, -(score or 0.0), index)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
