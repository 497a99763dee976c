"""Scores with a revision: which are out of date, and how one is computed again.

A revision is a number that grows whenever something that scores follow from changes: the rules of this release, or the
baseline of a key. A score is out of date when its own revision is below that of its baseline or of the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from database.evaluate_agent.score import SCORE_VERSION, Evaluation, Evidence, evaluate
from database.store import Facts, Session, Where

__all__ = ["BASELINES", "Scores"]

BASELINES = "baselines"
"""State: keys of the baselines in the order in which they were put."""
_RULES = "rules"


class Scores:
    """Computes scores from the stored evidence, inside the transaction of whoever calls."""

    def begin(self, session: Session) -> None:
        """Makes every score out of date that was computed by other rules than this release's."""
        if self._rules(session).get("version") != SCORE_VERSION:
            self.outdate(session)

    def choose(self, session: Session, model: str | None) -> None:
        """Makes this language model the judge, None the rubric; every score is out of date when it was another."""
        if self.judge(session) != model:
            self.outdate(session, {"judge": model})

    def judge(self, session: Session) -> str | None:
        """The language model that judges in this store; None for the rubric."""
        model = self._rules(session).get("judge")
        return None if model is None else str(model)

    def outdate(self, session: Session, changed: Mapping[str, Any] | None = None) -> None:
        """Makes every score out of date, by rules of which `changed` are others."""
        revision = session.next_revision()
        rules = self._rules(session) | {"version": SCORE_VERSION, "revision": revision} | dict(changed or {})
        session.put_state(_RULES, rules)

    def revision(self, session: Session, key: str | None) -> int:
        """What a score against this baseline has to be computed from; None names the published constants."""
        rules = int(self._rules(session).get("revision", 0))
        return rules if key is None else max(rules, session.baseline_revision(key))

    def evaluate(self, session: Session, evidence: Evidence) -> Evaluation:
        key = evidence.baseline_key
        found = evaluate(evidence, None if key is None else session.baseline(key), self.judge(session))
        return found.model_copy(update={"revision": self.revision(session, key)})

    def rescore(self, session: Session, index: int) -> float | None:
        """Computes the score and keeps it."""
        known = session.evidence(index)
        if known is None:
            return None
        evidence, before = known
        evaluation = self.evaluate(session, evidence)
        if evaluation != before:
            session.set_evaluation(index, evidence, evaluation)
        return evaluation.score

    def fresh(self, session: Session, facts: Facts) -> float | None:
        """The stored score when it is up to date, else the one computed now; None while it waits to be embedded."""
        if facts.revision is None and facts.pending:
            return None
        if facts.revision == self.revision(session, facts.baseline_key):
            return facts.score
        return self.rescore(session, facts.index)

    def stale(self, session: Session, limit: int) -> list[Facts]:
        """Elements whose score is out of date, the oldest revision first; those that were never scored wait for their
        embedding instead."""
        found: list[Facts] = []
        for where in self._stale(session):
            if len(found) < limit:
                found += session.facts(where, "revision", limit=limit - len(found))
        return found

    def stale_count(self, session: Session) -> int:
        return sum(session.count(where) for where in self._stale(session))

    def _rules(self, session: Session) -> dict[str, Any]:
        return session.state(_RULES) or {}

    def _stale(self, session: Session) -> list[Where]:
        keys: list[str | None] = [None, *(session.state(BASELINES) or [])]
        return [
            Where(baseline_key=key, published=key is None, before_revision=self.revision(session, key)) for key in keys
        ]
