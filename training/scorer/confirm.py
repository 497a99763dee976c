"""What an audit's suspects mean: the same questions again, asked of processes that hold the same weights.

A difference between answers to unlike questions can have an honest reason: a step counter, a cache, rounding at another
shape. So fresh processes are asked exactly what the scored process was asked, in the same order, of the same shapes,
but with random tokens after audited places. There an honest program says the same to the last bit, counters included.

`replayed` does so for a process that was scored with restored weights, and is an audit as sharp as the first: every
drawn place is asked once, one a row and process, as many processes as that takes. Two rows that differ are asked again
in another fresh process with other futures, and once more as they were. Differing there and not here, the answers
depend on the future: forged. Otherwise they cannot be repeated at all, and what cannot be repeated is no score.

`caught` asks the trained process itself, once it is scored, about some rows, and finds a program that sees the future
only in the process in which it was trained. What escapes it there gains nothing: its answers are audited as all are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from training.scorer.audit import FEWEST, changed_futures
from training.scorer.client import Worker
from training.scorer.heldout import Call, ForgedError, LogitServer, picked_log_p
from training.scorer.scored import Places, Scored

__all__ = ["EQUAL", "UnrepeatableError", "caught", "replayed"]

EQUAL = {"float32": 1e-4, "bfloat16": 5e-3}
"""Change of a log-probability, in nats, that is none where shapes and call numbers are equal. On a CPU there is no
change at all; the rest is for kernels that add in no fixed order."""
_NOISE = 4.0
_FEW_ROWS = 16
Cuts = Mapping[int, int]
"""Owner of a row -> number of the place after which it gets another future."""


class UnrepeatableError(Exception):
    """The answers are no function of weights, tokens and the questions before."""


def caught(server: LogitServer, scored: Scored, tolerance: float, random: np.random.Generator) -> str | None:
    """Asks a process that was scored some of its questions again, with other futures; what it found, or None.

    A difference counts in both of two tries, over the tolerance and four times what any row of the question changes
    when it is asked twice as it was.
    """
    found: list[tuple[Places, np.ndarray]] = []
    for chosen in (*_few(scored.heldout, random), *_few(scored.choices, random)):
        call = scored.calls[int(chosen.call[0])]
        cuts = dict(zip(chosen.row.tolist(), chosen.place.tolist(), strict=True))

        def said(changed: bool, call: Call = call, cuts: Cuts = cuts, chosen: Places = chosen) -> np.ndarray:
            tokens = changed_futures(call.tokens, cuts, server.vocab, random) if changed else call.tokens
            return _said(server.ask(Call(tokens, call.places)), call, chosen)

        other = said(changed=True)
        if (np.abs(other - chosen.said) <= tolerance).all():
            continue
        one, another, two = said(changed=False), said(changed=True), said(changed=False)
        moved = np.minimum(np.abs(other - one), np.abs(another - two))
        guilty = moved > tolerance + _NOISE * np.abs(one - two).max()
        found.append((chosen.take(np.flatnonzero(guilty)), moved[guilty]))
    places, moved = Places.joined([one for one, _ in found]), np.concatenate([np.zeros(0), *(two for _, two in found)])
    return _evidence(places, moved, "twice in the process that was trained") if len(places) >= FEWEST else None


def _few(places: Places, random: np.random.Generator) -> Iterator[Places]:
    """One place a row of random questions, until there are a few rows."""
    rows: set[int] = set()
    for number in random.permutation(np.unique(places.call)):
        here = places.take(random.permutation(np.flatnonzero(places.call == number)))
        _, first = np.unique(here.row, return_index=True)
        new = here.take(np.array([at for at in first if int(here.owner[at]) not in rows], dtype=np.int64))
        if len(new):
            rows.update(new.owner.tolist())
            yield new
        if len(rows) >= _FEW_ROWS:
            return


def replayed(
    scored: Scored,
    places: Places,
    order: Sequence[int],
    fresh: Callable[[], Worker],
    serve: Callable[[Worker], LogitServer],
    equal: float,
    random: np.random.Generator,
) -> None:
    """Asks fresh processes all that a fresh process was asked when it was scored, with other futures.

    Args:
        scored: by a process with the same weights that was asked nothing before.
        places: which it answered; all of them are audited, in this `order`, the most suspicious first.
        fresh: makes a worker with these weights; it is closed here.
        serve: wraps such a worker.
        equal: change in nats that is none.

    Raises:
        ForgedError: what was scored depends on what comes after.
        UnrepeatableError: it depends on what no equal process repeats.
    """

    def changes(cuts: Cuts, *, changed: bool) -> dict[int, float]:
        with fresh() as worker:
            return _replay(serve(worker), scored, places, cuts, random if changed else None)

    found: dict[int, int] = {}
    for cuts in _passes(places, order):
        for owner, change in changes(cuts, changed=True).items():
            if change > equal:
                found.setdefault(owner, cuts[owner])
        if len(found) >= FEWEST:
            break
    else:
        return
    again, same = changes(found, changed=True), changes(found, changed=False)
    forged = [owner for owner in found if again[owner] > equal and same[owner] <= equal]
    if len(forged) >= FEWEST:
        kept = places.take(np.array([found[owner] for owner in forged]))
        where = "in two fresh processes with the trained weights"
        raise ForgedError(_evidence(kept, np.array([again[owner] for owner in forged]), where))
    raise UnrepeatableError(
        f"its answers cannot be repeated: fresh processes with the same weights, asked the same in the same order, "
        f"differed in {len(found)} rows (by up to {max(same.values()):.3g} nats at the very same tokens), so no score "
        "can be audited; a mixer must be a function of its weights and its input"
    )


def _passes(places: Places, order: Sequence[int]) -> list[dict[int, int]]:
    """All places, one a row in each pass, the first of `order` in the first."""
    passes: list[dict[int, int]] = []
    seen: dict[int, int] = {}
    for number in order:
        owner = int(places.owner[number])
        rank = seen.get(owner, 0)
        seen[owner] = rank + 1
        if rank == len(passes):
            passes.append({})
        passes[rank][owner] = int(number)
    return passes


def _replay(
    server: LogitServer, scored: Scored, places: Places, cuts: Cuts, random: np.random.Generator | None
) -> dict[int, float]:
    """Owner -> how much the answer at its place differs from the scored one, in nats."""
    changes: dict[int, float] = {}
    numbers = np.array(list(cuts.values()))
    for at, call in enumerate(scored.calls[: int(places.call[numbers].max()) + 1]):
        tokens = call.tokens
        if random is not None and at in scored.owners:
            rows = {
                row: int(places.place[cuts[owner]])
                for row, owner in enumerate(scored.owners[at].tolist())
                if owner in cuts
            }
            tokens = changed_futures(tokens, rows, server.vocab, random)
        answer = server.ask(Call(tokens, call.places))
        here = places.take(numbers[places.call[numbers] == at])
        if len(here):
            moved = np.abs(_said(answer, call, here) - here.said)
            changes.update(zip(here.owner.tolist(), moved.tolist(), strict=True))
    return changes


def _said(answer: np.ndarray, call: Call, places: Places) -> np.ndarray:
    """What `answer` says of the targets at `places` of one call: log-probabilities in nats."""
    if call.places is None:
        logits = answer[places.row, places.place]
    else:
        number = {(row, place): at for at, (row, place) in enumerate(call.places.tolist())}
        logits = answer[[number[key] for key in zip(places.row.tolist(), places.place.tolist(), strict=True)]]
    return picked_log_p(logits, places.target).astype(np.float64)


def _evidence(places: Places, changes: np.ndarray, where: str) -> str:
    worst = int(changes.argmax())
    return (
        f"the trained model sees the future: in {len(places)} rows what it said of the next token changed when only "
        f"later tokens did, {where}; for example at position {int(places.place[worst])}, by {changes[worst]:.3g} nats"
    )
