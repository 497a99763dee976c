"""No score counts that processes without the future disagree with, and what looks like forgery for an honest reason is
none."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.training.audit_models import VOCAB, Counting, Judged, Noisy, Peeking, When, judge, rows, score
from tests.training.models import Hashed
from training.scorer.audit import TOLERANCE, Audit, draws_needed
from training.scorer.confirm import UnrepeatableError
from training.scorer.heldout import ForgedError, heldout_loss
from training.scorer.scored import Places, Recorder, Scored, surprisal

BOUND = TOLERANCE["float32"]


def honest() -> Hashed:
    return Hashed(VOCAB)


def audited(scored: Scored, fresh: Hashed, seed: int = 0, gain: float = 0.3, dtype: str = "float32") -> Audit:
    audit = Audit(scored, np.random.default_rng(seed), gain, TOLERANCE[dtype])
    audit.ask(fresh)
    return audit


def test_a_causal_model_keeps_its_own_scores_and_one_process_is_asked() -> None:
    done = judge(honest)
    assert done.verdict.passed and done.verdict.scored is done.trained and len(done.asked) == 1
    assert done.trained.loss == heldout_loss(honest(), rows())


def test_no_two_processes_live_at_once() -> None:
    """One that knows the text, or what is audited, could tell another."""
    done = Judged(Counting(start=500), Counting, rows())
    assert len(done.asked) > 3
    for one, two in pairwise(done.log):
        assert one.endswith("starts") != two.endswith("starts")
    assert done.log[-1].endswith("ends")


@pytest.mark.parametrize("pieces", [False, True])
def test_a_model_that_sees_the_next_token_is_caught_in_the_act(pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pieces:  # as with a large vocabulary
        monkeypatch.setattr("training.scorer.heldout.MOST_BYTES", 4 * VOCAB * 12)
    with pytest.raises(ForgedError, match="again and again in the process that was trained"):
        judge(Peeking)


@pytest.mark.parametrize("pieces", [False, True])
def test_a_model_that_is_honest_after_it_was_scored_is_found_by_others(
    pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr("training.scorer.heldout.MOST_BYTES", 4 * VOCAB * 12)
    score(probe := honest(), rows())
    with pytest.raises(ForgedError, match="two fresh processes"):
        judge(lambda: Peeking(lambda number, *_: number <= len(probe.calls)))


@pytest.mark.parametrize(
    "when",
    [
        lambda number, row, shape, seen: row % 8 == 7,
        lambda number, row, shape, seen: shape[0] == 16,
        lambda number, row, shape, seen: len(seen) > 28,
        lambda number, row, shape, seen: number == 1,
        lambda number, row, shape, seen: row == 5,
        lambda number, row, shape, seen: bool((seen[-1] + len(seen)) % 5 == 0),
    ],
    ids=[
        "one row in eight",
        "batches as scored",
        "the last places",
        "the first question",
        "one row",
        "a fifth of the places",
    ],
)
def test_seldom_is_often_enough(when: When) -> None:
    with pytest.raises(ForgedError, match="sees the future"):
        judge(lambda: Peeking(when, by=6.0), rows(16), gain=0.1)


def test_a_leak_of_the_trained_process_alone_gains_nothing() -> None:
    score(probe := honest(), rows())
    done = Judged(Peeking(lambda number, *_: number <= len(probe.calls)), honest, rows())
    assert not done.verdict.passed and "beside its weights" in done.verdict.detail
    assert done.verdict.scored.loss == score(honest(), rows()).loss
    assert done.verdict.scored.loss["value"] > done.trained.loss["value"] + 0.1  # type: ignore[operator]


def test_bait_in_the_trained_process_and_a_leak_in_the_restored_one() -> None:
    for bait in (Counting(start=500), Noisy(1.0, steady=True)):
        with pytest.raises(ForgedError, match="two fresh processes"):
            Judged(bait, Peeking, rows())


def test_a_leak_behind_honest_drift_is_found() -> None:
    """All audited places differ by the drift, and few by the leak: those are asked too."""
    rare = lambda number, row, shape, seen: bool(seen[-1] % 10 == 3)  # noqa: E731
    with pytest.raises(ForgedError, match="two fresh processes"):
        Judged(Counting(500, rare), lambda: Counting(0, rare), rows(), gain=0.1)


def test_answers_that_alternate_are_no_forgery() -> None:
    class Alternating(Peeking):
        def plain(self, tokens: np.ndarray, row: int, at: int) -> np.ndarray:
            return super().plain(tokens, row, at) * (1 + len(self.calls) % 2)

    done = Judged(Alternating(lambda *_: False), lambda: Alternating(lambda *_: False), rows())
    assert "on no later token" in done.verdict.detail


def test_a_counter_is_no_forgery() -> None:
    """Every answer changes with the number of questions: what counts is said at equal numbers."""
    done = Judged(Counting(start=500), Counting, rows())  # it counted while it was trained
    assert not done.verdict.passed and "how many questions went before" in done.verdict.detail
    assert done.verdict.scored.loss == score(Counting(), rows()).loss


def test_rounding_that_large_logits_make_large_is_no_forgery() -> None:
    done = judge(lambda: Noisy(0.3, steady=True))
    assert "on no later token" in done.verdict.detail


def test_what_no_process_repeats_has_no_score() -> None:
    with pytest.raises(UnrepeatableError, match="cannot be repeated"):
        judge(lambda: Noisy(0.3, steady=False))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_large_logits_widen_no_tolerance(scale: float) -> None:
    """The gain is 0.05 nats a token, however large the logits are."""

    class Inflated(Peeking):
        def plain(self, tokens: np.ndarray, row: int, at: int) -> np.ndarray:
            logits = super().plain(tokens, row, at)
            logits[int(tokens[row, at]) % VOCAB] = scale
            return logits

    with pytest.raises(ForgedError, match="sees the future"):
        judge(lambda: Inflated(by=0.05), gain=0.05)


def test_the_future_is_never_shown_before_it_is_asked_for() -> None:
    """A program that remembers every prefix it saw knows no audited place's successor when it is asked."""
    data = rows(30, 65)
    data[:, 0] = np.arange(30)  # so that a prefix names its row
    audit = audited(score(honest(), data), model := honest(), gain=0.05)
    asked, shown = 0, np.zeros(len(data), dtype=int)
    for call in model.calls:
        assert call.places is not None
        owners = [int(np.flatnonzero((data[:, : at + 1] == row[: at + 1]).all(1))[0]) for row, (_, at) in
                  zip(call.tokens, call.places, strict=True)]  # fmt: skip
        assert len(set(owners)) == len(owners)
        for owner, (row, at) in zip(owners, call.places.tolist(), strict=True):
            assert at + 1 > shown[owner]  # nothing beyond the place was seen earlier
            assert call.tokens.shape[1] > at + 1 and (call.tokens[row, : at + 1] == data[owner, : at + 1]).all()
            shown[owner] = at + 1
            asked += 1
    assert asked == len(audit.places) > 150


def text(seed: int = 5) -> np.ndarray:
    """Rows whose tokens are as unlike in frequency as those of text."""
    return np.minimum(np.random.default_rng(seed).zipf(1.3, (256, 65)) - 1, VOCAB - 1).astype(np.int32)


class Drawn:
    """Audits of what was scored of `text`, by arithmetic alone: a program with the unigram loss that gains `gained`."""

    def __init__(self, gained: np.ndarray, gain: float, dtype: str, noise: float = 0.0) -> None:
        data = text()
        self.random = np.random.default_rng(7)
        plain = -surprisal(data[:, 1:])[:, :-1]
        self.early = plain + self.random.normal(0, noise, plain.shape) if noise else plain
        said = plain + gained
        worth = np.maximum(2.0 - plain + said, 0.25)
        owner, place = (axis.ravel() for axis in np.indices(plain.shape))
        zeros = np.zeros(plain.size, dtype=np.int64)
        places = Places(zeros, owner, place, owner, zeros, said.ravel(), worth.ravel())
        self.scored = Scored({}, {}, [], places, Places.joined([]), {})
        self.gain, self.tolerance = gain, TOLERANCE[dtype]

    def misses(self, trials: int) -> int:
        return sum(not self.audit().suspects() for _ in range(trials))

    def audit(self) -> Audit:
        audit = Audit(self.scored, self.random, self.gain, self.tolerance)
        audit._gained = audit.places.said - self.early[audit.places.owner, audit.places.place]
        return audit


def cheapest(gain: float) -> np.ndarray:
    """The forgery of this mean gain that touches the fewest places: it says the dearest tokens for certain."""
    plain = surprisal(text()[:, 1:])[:, :-1]
    gained, order = np.zeros(plain.size), np.argsort(-plain.ravel())
    cheated = order[: int(np.searchsorted(np.cumsum(plain.ravel()[order]), gain * plain.size)) + 1]
    gained[cheated] = plain.ravel()[cheated]
    return gained.reshape(plain.shape)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_forged_gain_is_found_with_99_percent(dtype: str) -> None:
    gain, trials = 0.1, 300
    shape = text()[:, 2:].shape
    random = np.random.default_rng(3)
    below = np.where(random.random(shape) < gain / 0.2, 0.2, 0.0)  # each gain is below the tolerance of bfloat16
    for gained in (cheapest(gain), np.full(shape, gain), below, (cheapest(gain) + below) / 2):
        assert gained.mean() == pytest.approx(gain, rel=0.05)
        missed = Drawn(gained, gain, dtype, noise=0.03 if dtype == "bfloat16" else 1e-6).misses(trials)
        assert missed <= 12  # 3 are expected at 1 %; more than 12 would happen once in 10,000
    assert draws_needed(8.0, 0.02) == pytest.approx(2656, abs=1)


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_rounding_is_no_suspicion(dtype: str, noise: float) -> None:
    none = np.zeros(text()[:, 2:].shape)
    assert Drawn(none, 0.02, dtype, noise).misses(50) == 50


def test_the_mean_gain_is_estimated_without_bias() -> None:
    gained = np.random.default_rng(2).normal(0.03, 0.1, text()[:, 2:].shape)
    drawn = Drawn(gained, 0.05, "bfloat16")
    assert np.mean([drawn.audit().mean_gain()[0] for _ in range(40)]) == pytest.approx(gained.mean(), abs=0.003)


def test_benchmark_questions_with_a_future_are_audited() -> None:
    tokens = rows(8, 12) % (VOCAB - 1) + 1  # 0 is padding
    tokens[4:, :9] = tokens[:4, :9]  # choices of one item begin alike
    open_places = np.array([(row, at) for row in range(8) for at in (9, 10)], dtype=np.int32)
    last = np.array([(row, 11) for row in range(8)], dtype=np.int32)
    for model, guilty in ((honest(), False), (Peeking(), True)):
        recorder = Recorder(model, first=100)
        answer = recorder.at(tokens, open_places)
        recorder.at(tokens, last)  # nothing follows the last token
        assert (answer == type(model)(*(() if guilty else (VOCAB,))).at(tokens, open_places)).all()
        scored = Scored({}, {}, list(model.calls), Places.joined([]), recorder.places(), recorder.owners)
        audit = audited(scored, honest())
        assert len(recorder.places()) == 16 and len(audit.places) == 8 and bool(audit.suspects()) is guilty


@pytest.mark.parametrize("seed", range(4))
def test_no_question_shows_what_follows_a_place_that_is_still_to_be_asked(seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = random.integers(1, VOCAB, (40, 24)).astype(np.int32)
    for first in range(0, 40, 4):  # the choices of an item: one beginning, of any length, and some go on alike
        shared = int(random.integers(2, 20))
        tokens[first : first + 4, :shared] = tokens[first, :shared]
        tokens[first + 1, : shared + 2] = tokens[first, : shared + 2]
    places = np.array([(row, at) for row in range(40) for at in range(2 + row // 4, 23)], dtype=np.int32)
    recorder = Recorder(model := honest(), first=0)
    recorder.at(tokens, places)
    scored = Scored({}, {}, list(model.calls), Places.joined([]), recorder.places(), recorder.owners)
    audit = audited(scored, fresh := honest(), seed)
    follows = {
        tuple(tokens[row, : at + 1].tolist()): set(tokens[tokens_alike(tokens, row, at), at + 1].tolist())
        for row, at in zip(audit.places.row.tolist(), audit.places.place.tolist(), strict=True)
    }
    shown: set[tuple[int, ...]] = set()
    for call in fresh.calls:
        assert call.places is not None
        asked = [tuple(call.tokens[row, : at + 1].tolist()) for row, at in call.places.tolist()]
        shown.update(row[:length] for row in asked for length in range(1, len(row) + 1))
        assert not any((*row, token) in shown for row in asked for token in follows[row])
    assert len(fresh.calls) <= 8 < len(set(audit.places.place.tolist()))


def tokens_alike(tokens: np.ndarray, row: int, at: int) -> np.ndarray:
    """Rows that are equal to `row` as far as `at`."""
    alike: np.ndarray = (tokens[:, : at + 1] == tokens[row, : at + 1]).all(axis=1)
    return alike
