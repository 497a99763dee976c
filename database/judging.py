"""Verdicts of a language model, asked for in the background: no request, no lock and no transaction waits for one.

An element is asked about once for the numbers it has: its verdict is kept with its evidence. What fails leaves the
element without a score, is told in /v2/stats, and is tried again later: the element after minutes, the endpoint after
seconds. What was said while the store refuses writes waits in memory until it takes them, and nothing more is asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent import futures
from dataclasses import dataclass

from common.errors import AsiError, StoreError
from common.llm import Call, NoUsableAnswerError, metered, usage_of
from common.records import Baseline
from database.candidate_manager import Candidates
from database.evaluate_agent.model_judger import ModelJudger, Subject
from database.evaluate_agent.score import Evaluation, Evidence, baseline_of
from database.evaluate_agent.verdict import Verdict
from database.scores import Scores
from database.store import Facts, Session, Store, Where

__all__ = ["Judging"]

_LOG = logging.getLogger(__name__)
_AT_ONCE = 4
_PAGE = 200
_ELEMENT_REST = 60.0
_LONGEST_REST = 3600.0
_DOUBLINGS = 32
"""Of a rest, after which any is the longest; a float holds no more than 1,024."""


@dataclass
class _Rest:
    """How often something failed in a row, and when it may be tried again (time.monotonic)."""

    failures: int = 0
    until: float = 0.0

    def fail(self, first: float) -> None:
        self.failures += 1
        self.until = time.monotonic() + min(_LONGEST_REST, first * 2.0 ** min(_DOUBLINGS, self.failures - 1))


@dataclass(frozen=True)
class _Said:
    """What was paid for: the calls, and their verdict where one came."""

    subject: Subject
    verdict: Verdict | None
    calls: list[Call]


class Judging:
    """Gives every element that lacks only its judgement one. Thread-safe.

    Two servers over one store may ask about the same element at the same time; the first verdict is kept.

    Args:
        rest: seconds until an endpoint that failed is asked again; twice as many each time that it fails again.
    """

    def __init__(
        self, store: Store, judger: ModelJudger, scores: Scores, candidates: Candidates, rest: float = 2.0
    ) -> None:
        self._store = store
        self._rest = rest
        self._judger = judger
        self._scores = scores
        self._candidates = candidates
        self._pool = futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="judging")
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._failed: dict[int, _Rest] = {}
        self._unanswered: set[int] = set()
        """Elements whose last question the endpoint did not answer. They are asked about again with the others."""
        self._endpoint = _Rest()
        self._untaken: deque[_Said] = deque()
        self.last_error: str | None = None

    @property
    def model(self) -> str:
        return self._judger.model

    @property
    def failed(self) -> int:
        """Elements that were asked about in vain so far: no usable answer came, or none at all."""
        with self._lock:
            return len(self._failed.keys() | self._unanswered)

    def step(self) -> bool:
        """Asks about some elements at the same time; whether more can be asked about at once."""
        if self._closed.is_set() or not self._taken() or time.monotonic() < self._endpoint.until:
            return False
        waiting = self._store.read(lambda session: self._waiting(session, _AT_ONCE))
        try:
            asked = [self._pool.submit(self._judge, index) for index in waiting]
        except RuntimeError:
            if not self._closed.is_set():
                raise
            # While it was looked who waits.
            return False
        # Where one fails the others still end first: the next step would ask the same again.
        futures.wait(asked)
        judged = [not each.cancelled() and each.result() for each in asked]
        return any(judged)

    def judges(self, index: int) -> bool:
        """Whether a verdict is all that the element's score lacks, and it will be asked for soon."""
        if self._closed.is_set():
            return False
        with self._lock:
            untaken = any(said.subject.element.index == index for said in self._untaken)
            resting = untaken or index in self._failed or time.monotonic() < self._endpoint.until
        return not resting and self._store.read(lambda session: _measured(session, index)) is not None

    def hurry(self) -> None:
        """Asks nothing more, and lets nobody wait."""
        self._closed.set()

    def close(self) -> None:
        """Ends the questions under way."""
        self.hurry()
        self._judger.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _waiting(self, session: Session, limit: int) -> list[int]:
        if self._scores.judge(session) != self.model:
            # Another server over this store was started with another judge.
            return []
        with self._lock:
            known = self._failed.keys() | self._unanswered
        # Read without the lock, for which requests wait. Nobody is asked about meanwhile: that is done by this thread.
        settled = [index for index in known if self._subject(session, index) is None]
        now = time.monotonic()
        with self._lock:
            for index in settled:
                self._failed.pop(index, None)
                self._unanswered.discard(index)
            resting = {index for index, rest in self._failed.items() if now < rest.until}
        found: list[int] = []
        after = 0
        while len(found) < limit:
            page = session.facts(Where(unscored=True, after=after), limit=_PAGE)
            for facts in page:
                if len(found) < limit and facts.index not in resting and self._unjudged(session, facts):
                    found.append(facts.index)
            if len(page) < _PAGE:
                break
            after = page[-1].index
        return found

    def _unjudged(self, session: Session, facts: Facts) -> bool:
        if facts.pending or facts.loss is None or facts.benchmark is None:
            return False
        return self._subject(session, facts.index) is not None

    def _subject(self, session: Session, index: int) -> Subject | None:
        """What to ask about an element; None where it is gone, or a verdict is not what its score lacks."""
        measured = _measured(session, index)
        found = [] if measured is None else session.elements([index])
        return Subject(found[0], *measured) if found and measured is not None else None

    def _judge(self, index: int) -> bool:
        """Whether the element got its verdict."""
        subject = self._store.read(lambda session: self._subject(session, index))
        if subject is None or self._closed.is_set():
            return False
        calls: list[Call] = []
        verdict: Verdict | None = None
        try:
            with metered(calls.append):
                verdict = self._judger.judge(subject)
        except NoUsableAnswerError as error:
            self._told(error, index)
        except AsiError as error:
            self._told(error, index, endpoint=True)
        return self._take(_Said(subject, verdict, calls)) and verdict is not None

    def _taken(self) -> bool:
        """Whether the store now holds all that was said; it is offered what it refused before."""
        while True:
            with self._lock:
                if not self._untaken:
                    return True
                said = self._untaken.popleft()
            if not self._take(said):
                return False

    def _take(self, said: _Said) -> bool:
        """Whether the store took it; where not, it waits."""
        index = said.subject.element.index
        try:
            self._store.write(lambda session: self._keep(session, said))
        except StoreError as error:
            with self._lock:
                self._untaken.append(said)
                self.last_error = error.message
            _LOG.warning("what was said of element %d waits for the store: %s", index, error)
            return False
        if said.verdict is not None:
            with self._lock:
                self._failed.pop(index, None)
                self._unanswered.discard(index)
                self._endpoint = _Rest()
                self.last_error = None if not (self._failed or self._unanswered) else self.last_error
        return True

    def _keep(self, session: Session, said: _Said) -> None:
        verdict, asked = said.verdict, said.subject.element
        index = asked.index
        found = session.elements([index])
        # The store may have been emptied meanwhile, and the index given to another design.
        same = bool(found) and found[0].program == asked.program
        usage = usage_of(said.calls, index if same else None)
        if usage:
            session.ledger.put_usage(usage)
        known = session.evidence(index)
        if verdict is None or not same or known is None or not _lacks_judgement(known[1]):
            return
        evidence = known[0].model_copy(update={"verdict": verdict})
        session.set_evaluation(index, evidence, self._scores.evaluate(session, evidence))
        self._candidates.reconsider(session, [index])

    def _told(self, error: AsiError, index: int, endpoint: bool = False) -> None:
        """Notes a failure: the answer about one element, or the whole `endpoint`."""
        if self._closed.is_set():
            return
        with self._lock:
            if endpoint:
                self._unanswered.add(index)
                # Those asked at the same time fail together.
                if time.monotonic() >= self._endpoint.until:
                    self._endpoint.fail(self._rest)
            else:
                self._unanswered.discard(index)
                self._failed.setdefault(index, _Rest()).fail(_ELEMENT_REST)
            self.last_error = error.message
        _LOG.warning("element %d is not judged%s: %s", index, ", the judge rests" if endpoint else "", error)


def _measured(session: Session, index: int) -> tuple[Evidence, Baseline] | None:
    """What an element is judged by; None where it is gone, or a verdict is not what its score lacks."""
    known = session.evidence(index)
    if known is None or known[0].novelty is None or not _lacks_judgement(known[1]):
        return None
    key = known[0].baseline_key
    baseline = baseline_of(known[0], None if key is None else session.baseline(key))
    return None if baseline is None else (known[0], baseline)


def _lacks_judgement(evaluation: Evaluation | None) -> bool:
    """Whether a verdict is all that the score waits for."""
    return (
        evaluation is not None
        and evaluation.judgement is None
        and evaluation.loss_term is not None
        and evaluation.benchmark_term is not None
    )
