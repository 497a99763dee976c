"""Which scores of a trained program count: those that processes without the futures agree with.

    trained process        was scored; is asked some of it again (`caught`); ends
    fresh process          is asked for audited places without their future; ends
    where they differ:
    another fresh process  is scored, from the weights alone; ends
    another                is asked for places of these scores, drawn anew; ends
    where they differ:
    several more           are asked the very same with other futures (`replayed`)

No process of the program lives while another one knows what it must not. Every score that leaves here was audited, and
a program of which no process repeats another's answers gets none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.scorer.audit import TOLERANCE, Audit
from training.scorer.client import Worker
from training.scorer.confirm import EQUAL, caught, replayed
from training.scorer.heldout import ForgedError, LogitServer
from training.scorer.scored import Scored

__all__ = ["Bench", "Verdict", "verdict"]


@dataclass(frozen=True)
class Bench:
    """What an audit works with.

    Attributes:
        fresh: makes a process of the program with the trained weights, which the caller closes.
        serve: wraps such a process.
        score: scores what is served.
        random: draws what is audited; not to be guessed by the program.
        gain: in nats a token, to be found with 99 % probability.
        dtype: in which the model computes.
    """

    fresh: Callable[[], Worker]
    serve: Callable[[Worker], LogitServer]
    score: Callable[[LogitServer], Scored]
    random: np.random.Generator
    gain: float
    dtype: str

    def audit(self, scored: Scored) -> Audit:
        """The finished audit of what a process, which has ended, was scored on."""
        audit = Audit(scored, self.random, self.gain, TOLERANCE[self.dtype])
        with self.fresh() as worker:
            audit.ask(self.serve(worker))
        return audit


@dataclass(frozen=True)
class Verdict:
    """Scores that were audited; `passed`: they are the trained process's own; `detail`: how it went, for a person."""

    scored: Scored
    passed: bool
    detail: str


def verdict(trained: Worker, server: LogitServer, scored: Scored, bench: Bench) -> Verdict:
    """Audits what the `trained` process was `scored` on through `server`, and ends that process.

    Raises:
        ForgedError: what is scored depends on what comes after. UnrepeatableError: no score can be audited.
    """
    found = caught(server, scored, TOLERANCE[bench.dtype], bench.random)
    trained.close()
    if found is not None:
        raise ForgedError(found)
    audit = bench.audit(scored)
    if not audit.suspects():
        return Verdict(scored, True, audit.said())
    with bench.fresh() as worker:
        restored = bench.score(bench.serve(worker))
    detail = f"{audit.said()}: the trained process keeps state beside its weights; the scores are the weights' own"
    return Verdict(restored, False, f"{detail}, {_vouched(restored, bench)}")


def _vouched(restored: Scored, bench: Bench) -> str:
    """Why these scores, of a process that has ended, count."""
    audit = bench.audit(restored)
    suspects = audit.suspects()
    if not suspects:
        return f"and of these, {audit.said()}"
    order = [suspect.number for suspect in suspects]
    replayed(restored, audit.places, order, bench.fresh, bench.serve, EQUAL[bench.dtype], bench.random)
    return (
        f"which depend on shapes or on how many questions went before, but at {len(order):,} audited places on no "
        "later token"
    )
