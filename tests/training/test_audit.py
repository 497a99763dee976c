"""The audit finds models that see the future, however seldom, and what looks like it for an honest reason is none."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import pytest

from tests.training.models import Hashed
from training.scorer.audit import TOLERANCE, BenchmarkAudit, HeldoutAudit, Suspect, draws_needed, surprisal
from training.scorer.confirm import confirm, leaks_in_place
from training.scorer.heldout import LogitServer, heldout_loss

VOCAB = 50
BOUND = TOLERANCE["float32"]


class Peeking(Hashed):
    """Sees the next token wherever `when(calls so far, row)` holds."""

    def __init__(self, when: Any = lambda number, row: True) -> None:
        super().__init__(VOCAB)
        self.when = when

    def all(self, tokens: np.ndarray) -> np.ndarray:
        super().all(tokens)
        return np.stack([[self.seen(row, at) for at in range(len(row))] for row in tokens])

    def at(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        super().at(tokens, places)
        return np.stack([self.seen(tokens[row], at) for row, at in places])

    def seen(self, row: np.ndarray, at: int) -> np.ndarray:
        ahead = 2 if self.when(len(self.calls), row) else 1
        return self.next(row[: at + ahead])


class Counting(Hashed):
    """Its answers drift with every call, whatever it is asked: a step counter in the model."""

    def __init__(self, start: int = 0) -> None:
        super().__init__(VOCAB)
        self.start = start

    def next(self, seen: np.ndarray) -> np.ndarray:
        return super().next(seen) * (1 + 0.01 * (self.start + len(self.calls)))


class Remembering(Hashed):
    """Keeps the prefixes that it was asked for, is honest there, and knows every other next token."""

    def __init__(self) -> None:
        super().__init__(VOCAB)
        self.asked: set[bytes] = set()

    def at(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        self.asked |= {tokens[row, : place + 1].tobytes() for row, place in places}
        return super().at(tokens, places)

    def all(self, tokens: np.ndarray) -> np.ndarray:
        answer = np.stack([[self.next(row[: at + 1]) for at in range(len(row))] for row in tokens])
        for number, row in enumerate(tokens):
            for at in range(len(row) - 1):
                if row[: at + 1].tobytes() not in self.asked:
                    answer[number, at, row[at + 1]] += 10.0
        return answer


class Fresh:
    """A started process as `confirm` uses it: opened, served, closed."""

    def __init__(self, model: LogitServer) -> None:
        self.model, self.closed = model, False

    def __enter__(self) -> Fresh:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, t: TracebackType | None) -> None:
        self.closed = True


def rows(count: int = 12, length: int = 33, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (count, length)).astype(np.int32)


def audited(model: LogitServer, data: np.ndarray, gain: float = 0.3) -> tuple[HeldoutAudit, dict[str, Any]]:
    audit = HeldoutAudit(data, b"secret", gain, BOUND)
    audit.ask(model)
    return audit, dict(heldout_loss(model, data, audit.see))


def asked_again(model: LogitServer, suspects: list[Suspect], again: Any) -> tuple[str | None, str | None]:
    calls = list(model.calls)
    random = np.random.default_rng(1)
    made: list[Fresh] = []

    def fresh() -> Any:
        made.append(Fresh(again()))
        return made[-1]

    found = confirm(calls, suspects, fresh, lambda process: process.model, random)  # type: ignore[attr-defined]
    assert len(made) == 3 and all(process.closed for process in made)
    return leaks_in_place(model, suspects, random), found


def test_a_model_that_is_honest_only_where_it_was_asked_is_found() -> None:
    audit, _ = audited(Remembering(), rows(40))
    assert not audit.suspects() and audit.compared == len(audit.places)
    preferred = audit.preference()
    assert preferred is not None and preferred[0] > preferred[1] + 1
    for seed in range(20):
        honest, _ = audited(Hashed(VOCAB), rows(8, seed=seed))
        assert honest.preference() is None


def test_a_causal_model_has_no_suspects_and_its_loss_is_unchanged() -> None:
    audit, loss = audited(Hashed(VOCAB), rows())
    assert audit.suspects() == [] and audit.compared == len(audit.places) > 50
    assert loss == heldout_loss(Hashed(VOCAB), rows())


@pytest.mark.parametrize("pieces", [False, True])
def test_a_model_that_sees_the_next_token_is_found_and_confirmed(pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pieces:  # as with a large vocabulary
        monkeypatch.setattr("training.scorer.heldout.MOST_BYTES", 4 * VOCAB * 12)
    model = Peeking()
    suspects = audited(model, rows())[0].suspects()
    assert len(suspects) > 50
    in_place, fresh = asked_again(model, suspects, Peeking)
    assert in_place and "sees the future" in in_place
    assert fresh and "two fresh processes" in fresh


def test_the_future_is_never_shown_before_it_is_asked_for() -> None:
    """A program that remembers every prefix it saw knows no audited place's successor when it is asked."""
    data = rows(30, 65)
    data[:, 0] = np.arange(30)  # so that a prefix names its row
    model = Hashed(VOCAB)
    audit = HeldoutAudit(data, b"secret", 0.05, BOUND)
    audit.ask(model)
    shown = np.zeros(len(data), dtype=int)
    for call in model.calls:
        owners = [int(np.flatnonzero((data[:, : at + 1] == row[: at + 1]).all(1))[0]) for row, (_, at) in
                  zip(call.tokens, call.places, strict=True)]  # fmt: skip
        assert len(set(owners)) == len(owners)
        for owner, (_, at) in zip(owners, call.places.tolist(), strict=True):
            assert at + 1 > shown[owner]  # nothing beyond the place was seen earlier
            shown[owner] = at + 1


def test_rare_cheating_is_found_with_99_percent() -> None:
    """The cheapest forgery of a given gain takes the tokens that are worth most; two draws hit it nearly always."""
    data = np.minimum(np.random.default_rng(5).zipf(1.3, (256, 65)) - 1, VOCAB - 1).astype(np.int32)
    gain, missed, trials = 0.1, 0, 300
    worth = surprisal(data[:, 1:])[:, :-1] + 2.0
    order = np.argsort(-worth.ravel())
    cheated = order[: int(np.searchsorted(np.cumsum(worth.ravel()[order]), gain * worth.size)) + 1]
    chosen = np.zeros(worth.size, dtype=bool)
    chosen[cheated] = True
    for trial in range(trials):
        places = HeldoutAudit(data, f"{trial}".encode(), gain, BOUND).places
        hits = chosen[places[:, 0] * worth.shape[1] + places[:, 1]].sum()
        missed += hits < 2
    assert missed <= 12  # 3 are expected at 1 %; more than 12 would happen once in 10,000
    assert draws_needed(8.0, 0.02) == pytest.approx(2656, abs=1)


def test_a_gain_below_the_tolerance_is_found_where_it_adds_up() -> None:
    """In bfloat16 a tenth of the spread counts as rounding, which is much if it always helps the next token."""

    class Nudging(Peeking):
        def seen(self, row: np.ndarray, at: int) -> np.ndarray:
            logits = self.next(row[: at + 1])
            if at + 1 < len(row):
                logits[row[at + 1]] += 0.09
            return logits

    data, model = rows(40), Nudging()
    audit = HeldoutAudit(data, b"secret", 0.05, TOLERANCE["bfloat16"])
    audit.ask(model)
    heldout_loss(model, data, audit.see)
    suspects = audit.suspects()
    assert len(suspects) >= 2
    assert asked_again(model, suspects, Nudging)[1]
    honest = HeldoutAudit(data, b"secret", 0.05, TOLERANCE["bfloat16"])
    noise = np.random.default_rng(3)

    class Rounding(Hashed):
        def next(self, seen: np.ndarray) -> np.ndarray:
            return super().next(seen) + noise.normal(0, 0.01, VOCAB).astype(np.float32)

    honest.ask(rounding := Rounding(VOCAB))
    heldout_loss(rounding, data, honest.see)
    assert honest.suspects() == []


def test_a_counter_is_no_forgery() -> None:
    """Every answer changes with the number of calls: suspects at first, but not in fresh processes at equal calls."""
    model = Counting(start=500)  # it counted while it was trained
    suspects = audited(model, rows())[0].suspects()
    assert suspects
    assert asked_again(model, suspects, Counting) == (None, None)


def test_a_leak_of_the_trained_process_alone_is_found_in_place() -> None:
    model = Peeking()
    suspects = audited(model, rows())[0].suspects()
    in_place, fresh = asked_again(model, suspects, lambda: Hashed(VOCAB))
    assert in_place and fresh is None


def test_a_leak_that_waits_for_a_number_of_calls_is_found() -> None:
    probe = HeldoutAudit(rows(), b"secret", 0.3, BOUND)
    probe.ask(asked := Hashed(VOCAB))

    def waits() -> Peeking:
        return Peeking(lambda number, row: number > len(asked.calls))

    model = waits()
    suspects = audited(model, rows())[0].suspects()
    assert suspects and asked_again(model, suspects, waits)[1]


def test_benchmark_questions_with_a_future_are_audited() -> None:
    tokens = rows(8, 12) % (VOCAB - 1) + 1  # 0 is padding
    open_places = np.array([(row, at) for row in range(8) for at in (9, 10)], dtype=np.int32)
    last = np.array([(row, 11) for row in range(8)], dtype=np.int32)
    for model, guilty in ((Hashed(VOCAB), False), (Peeking(), True)):
        audit = BenchmarkAudit(model, b"secret", BOUND, share=1.0)
        answer = audit.at(tokens, open_places)
        assert audit.compared == 8 and bool(audit.found) is guilty
        assert (answer == type(model)(*(() if guilty else (VOCAB,))).at(tokens, open_places)).all()
        before = len(model.calls)
        audit.at(tokens, last)
        assert len(model.calls) == before + 1  # nothing follows the last token: one question is enough
        if guilty:
            assert asked_again(model, audit.found, Peeking)[1]
