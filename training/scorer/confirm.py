"""What an audit's suspects mean: the same questions again, asked of processes that hold the same weights.

A difference between answers to unlike questions can have an honest reason: a step counter, a cache, rounding at another
shape. So fresh processes are asked exactly what the scored process was asked, in the same order, of the same shapes,
but with random tokens after audited places. There an honest program says the same to the last bit, counters included.

`replayed` does so for a process that was scored with restored weights, and is an audit as sharp as the first: every
drawn place is asked once, one a row and process, as many processes as that takes. Where two differ, they are asked once
more as they were, and again in another fresh process with other futures. Differing here and not there, the answers
depend on the future: forged. Otherwise they cannot be repeated at all, and what cannot be repeated is no score.

`caught` asks the trained process itself, once it is scored, about some rows, and finds a program that sees the future
only in the process in which it was trained. What escapes it there gains nothing: its answers are audited as all are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from training.scorer.audit import FEWEST, changed_futures
from training.scorer.client import Worker
from training.scorer.heldout import Call, ForgedError, LogitServer, picked_log_p
from training.scorer.scored import Places, Scored

__all__ = ["EQUAL", "UnrepeatableError", "caught", "replayed"]

EQUAL = {"float32": 1e-4, "bfloat16": 5e-3}
"""Change of a log-probability, in nats, that is none where shapes and call numbers are equal. On a CPU there is no
change at all; the rest is for kernels that add in no fixed order."""
_NOISE, _TRIES = 4.0, 3
_FEW_ROWS = 16
_MOST_FOUND = 64
"""Differing places that are asked again."""


class UnrepeatableError(Exception):
    """The answers are no function of weights, tokens and the questions before."""


def caught(server: LogitServer, scored: Scored, tolerance: float, random: np.random.Generator) -> str | None:
    """Asks a process that was scored some of its questions again, with other futures; what it found, or None.

    Where a first try differs from what was scored, the question is asked _TRIES times as it was and as often with other
    futures, in random order, so that no counter alternates with it. A row counts whose answers with other futures all
    differ from all of its own, by over the tolerance and four times what any row's own answers differ.
    """
    found: list[tuple[Places, np.ndarray]] = []
    for chosen in (*_few(scored.heldout, random), *_few(scored.choices, random)):
        call = scored.calls[int(chosen.call[0])]
        cuts = dict(zip(chosen.row.tolist(), chosen.place.tolist(), strict=True))

        def said(changed: bool, call: Call = call, cuts: dict[int, int] = cuts, chosen: Places = chosen) -> np.ndarray:
            tokens = changed_futures(call.tokens, cuts, server.vocab, random) if changed else call.tokens
            return _said(server.ask(Call(tokens, call.places)), call, chosen)

        if (np.abs(said(changed=True) - chosen.said) <= tolerance).all():
            continue
        order = random.permutation([True, False] * _TRIES)
        answers = np.stack([said(changed=bool(changed)) for changed in order])
        other, own = answers[order], answers[~order]
        moved = np.abs(other[:, None] - own[None]).min(axis=(0, 1))
        guilty = moved > tolerance + _NOISE * np.ptp(own, axis=0).max()
        found.append((chosen.take(np.flatnonzero(guilty)), moved[guilty]))
    places, moved = Places.joined([one for one, _ in found]), np.concatenate([np.zeros(0), *(two for _, two in found)])
    where = "again and again in the process that was trained"
    return _evidence(places, moved, where) if len(places) >= FEWEST else None


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

    def changed(numbers: Sequence[int]) -> dict[int, float]:
        moved: dict[int, float] = {}
        for chosen in _passes(places, numbers):
            with fresh() as worker:
                moved |= _replay(serve(worker), scored, places, chosen, random)
            if sum(change > equal for change in moved.values()) >= FEWEST:
                break
        return moved

    found = [number for number, change in changed(order).items() if change > equal][:_MOST_FOUND]
    if len(found) < FEWEST:
        return
    with fresh() as worker:
        same = _replay(serve(worker), scored, places, found, None)
    again = {number: change for number, change in changed(found).items() if change > equal >= same[number]}
    if len(again) >= FEWEST:
        where = "in two fresh processes with the trained weights"
        raise ForgedError(_evidence(places.take(np.array(list(again))), np.array(list(again.values())), where))
    raise UnrepeatableError(
        f"its answers cannot be repeated: fresh processes with the same weights, asked the same in the same order, "
        f"differed at {len(found)} places (by up to {max(same.values()):.3g} nats at the very same tokens), so no "
        "score can be audited; a mixer must be a function of its weights and its input"
    )


def _passes(places: Places, order: Sequence[int]) -> list[list[int]]:
    """Numbers of places, one a row in each pass, the first of `order` in the first."""
    passes: list[list[int]] = []
    seen: Counter[int] = Counter()
    for number in order:
        owner = int(places.owner[number])
        if seen[owner] == len(passes):
            passes.append([])
        passes[seen[owner]].append(number)
        seen[owner] += 1
    return passes


def _replay(
    server: LogitServer, scored: Scored, places: Places, numbers: Sequence[int], random: np.random.Generator | None
) -> dict[int, float]:
    """Number of a place -> how much the answer there differs from the scored one, in nats.

    With `random`, every row gets another future after its one place; without, all is asked as it was.
    """
    changes: dict[int, float] = {}
    asked = np.array(numbers)
    cuts = dict(zip(places.owner[asked].tolist(), places.place[asked].tolist(), strict=True))
    for at, call in enumerate(scored.calls[: int(places.call[asked].max()) + 1]):
        tokens = call.tokens
        if random is not None and at in scored.owners:
            owners = enumerate(scored.owners[at].tolist())
            tokens = changed_futures(
                tokens, {row: cuts[owner] for row, owner in owners if owner in cuts}, server.vocab, random
            )
        answer = server.ask(Call(tokens, call.places))
        here = asked[places.call[asked] == at]
        if len(here):
            chosen = places.take(here)
            changes.update(zip(here.tolist(), np.abs(_said(answer, call, chosen) - chosen.said).tolist(), strict=True))
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
        f"the trained model sees the future: at {len(places)} places what it said of the next token changed when only "
        f"later tokens did, {where}; for example at position {int(places.place[worst])}, by {changes[worst]:.3g} nats"
    )
