"""What an audit's suspects mean: the same questions again, in fresh processes that hold the same weights.

A difference between two answers of one process can have an honest reason: a step counter, a cache, rounding at another
shape. So the weights are read out, and fresh processes of the same program get them and the same calls in the same
order: one with the rows as they were, two with random tokens after the suspected places. All three are at the same
call number, the same shapes, the same batch positions. Where two or more rows differ from the first process in both of
the others, the model uses tokens that come after: forged. Before that the trained process itself is asked once more
both ways, which finds a program that sees the future only in the process in which it was trained.

Where nothing of that holds, the trained process answered otherwise than its weights do: then the run is scored anew
from the weights alone, and the record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.scorer.audit import Suspect, changed_futures
from training.scorer.client import Worker
from training.scorer.heldout import Call, ForgedError, LogitServer

__all__ = ["FEWEST", "confirm", "leaks_in_place", "read_weights", "write_weights"]

FEWEST = 2
"""Rows that must differ: one may be an accident."""
_ROWS = 16
"""Suspect rows that are asked again."""
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class _Cuts:
    """Call -> row -> the place after which its tokens are changed; one place a row, the most suspicious."""

    cuts: dict[int, dict[int, int]]
    bounds: dict[tuple[int, int], float]


def read_weights(worker: Worker, parameters: int) -> list[np.ndarray]:
    """Every parameter and buffer of the trained model, in the order of registration.

    Raises:
        ForgedError: they are not what a model of so many parameters has.
    """
    arrays: list[np.ndarray] = []
    left = 16 * parameters + _SPARE_BYTES
    while True:
        meta, part = worker.call("train.read", {"from": len(arrays)})
        left -= sum(array.nbytes for array in part)
        arrays += part
        total = meta.get("total")
        if not isinstance(total, int) or left < 0 or (not part and len(arrays) != total):
            raise ForgedError(f"expected the weights of a model with {parameters:,} parameters, got something else")
        if len(arrays) >= total:
            return arrays


def write_weights(worker: Worker, arrays: Sequence[np.ndarray]) -> None:
    """Gives a freshly built model these weights.

    Raises:
        ForgedError: it has other shapes, so the program built another model than before.
    """
    at = 0
    while at < len(arrays):
        size, stop = 0, at
        while stop < len(arrays) and (stop == at or size + arrays[stop].nbytes < 1 << 28):
            size += arrays[stop].nbytes
            stop += 1
        meta, _ = worker.call("train.write", {"from": at, "total": len(arrays)}, arrays[at:stop])
        if meta.get("refused"):
            raise ForgedError(f"a fresh process builds another model: {str(meta['refused'])[:300]}")
        at = stop


def leaks_in_place(server: LogitServer, suspects: Sequence[Suspect], random: np.random.Generator) -> str | None:
    """Asks the trained process the suspected calls again, as they were and with other futures; what it found, or None.

    A difference counts over four times the change between two equal questions.
    """
    chosen = _chosen(suspects)
    caught: list[str] = []
    for number, cuts in chosen.cuts.items():
        call = server.calls[number]
        changed = Call(changed_futures(call.tokens, cuts, server.vocab, random), call.places)
        first, other, second = server.ask(call), server.ask(changed), server.ask(call)
        for row, place in cuts.items():
            noise = _change(call, first, second, row, place)
            moved = _change(call, first, other, row, place)
            if moved > chosen.bounds[number, row] + 4 * noise:
                caught.append(_said(call, row, place, moved, chosen.bounds[number, row]))
    return _verdict(caught, "in the process that was trained")


def confirm(
    calls: Sequence[Call],
    suspects: Sequence[Suspect],
    fresh: Callable[[], Worker],
    serve: Callable[[Worker], LogitServer],
    random: np.random.Generator,
) -> str | None:
    """Asks fresh processes; what they found, or None.

    Args:
        calls: every question of the trained process, in order.
        fresh: makes a worker with the trained weights; it is closed here.
        serve: wraps such a worker.
    """
    chosen = _chosen(suspects)
    with fresh() as worker:
        before = _replay(serve(worker), calls, chosen, None)
    caught: list[list[str]] = []
    for _ in range(2):
        with fresh() as worker:
            after = _replay(serve(worker), calls, chosen, random)
        rows = []
        for number, cuts in chosen.cuts.items():
            for row, place in cuts.items():
                moved = _change(calls[number], before[number], after[number], row, place)
                if moved > chosen.bounds[number, row]:
                    rows.append(_said(calls[number], row, place, moved, chosen.bounds[number, row]))
        caught.append(rows)
    return _verdict(min(caught, key=len), "in two fresh processes with the trained weights")


def _chosen(suspects: Sequence[Suspect]) -> _Cuts:
    cuts: dict[int, dict[int, int]] = {}
    bounds: dict[tuple[int, int], float] = {}
    for suspect in suspects:
        rows = cuts.setdefault(suspect.call, {})
        if suspect.row not in rows and len(bounds) < _ROWS:
            rows[suspect.row] = suspect.place
            # Questions of one shape round alike, so what was seen at two shapes may be halved here.
            bounds[suspect.call, suspect.row] = min(suspect.bound, suspect.change / 2)
    return _Cuts({call: rows for call, rows in cuts.items() if rows}, bounds)


def _replay(
    server: LogitServer, calls: Sequence[Call], chosen: _Cuts, random: np.random.Generator | None
) -> dict[int, np.ndarray]:
    """Answers to the chosen calls, each asked at its number; with `random` their futures are changed."""
    answers: dict[int, np.ndarray] = {}
    for number, call in enumerate(calls[: max(chosen.cuts) + 1]):
        cuts = chosen.cuts.get(number, {})
        tokens = changed_futures(call.tokens, cuts, server.vocab, random) if random is not None else call.tokens
        answer = server.ask(Call(tokens, call.places))
        if cuts:
            answers[number] = answer
    return answers


def _change(call: Call, one: np.ndarray, two: np.ndarray, row: int, place: int) -> float:
    """Largest change of a logit of `row` at or before `place`."""
    if call.places is None:
        return float(np.abs(one[row, : place + 1] - two[row, : place + 1]).max())
    kept = (call.places[:, 0] == row) & (call.places[:, 1] <= place)
    return float(np.abs(one[kept] - two[kept]).max(initial=0.0))


def _said(call: Call, row: int, place: int, moved: float, bound: float) -> str:
    return f"position {place} of {call.tokens.shape[1]}, by {moved:.3g} (tolerance {bound:.3g})"


def _verdict(caught: Sequence[str], where: str) -> str | None:
    if len(caught) < FEWEST:
        return None
    return (
        f"the trained model sees the future: in {len(caught)} rows its logits changed when only later tokens did, "
        f"{where}; for example at {caught[0]}"
    )
