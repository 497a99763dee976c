"""The prefill's speed: what is asked, by whose clock, and a length that the program cannot do."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from common.process import REPOSITORY
from training.profiles import load_profile
from training.scorer.client import OperationFailed, Worker
from training.scorer.efficiency import decode_speed, prefill_speed

TINY = load_profile(REPOSITORY / "tests" / "assets" / "tiny.toml")


class Reader(Worker):
    """Takes a millisecond for 64 tokens, and none that are longer than it can."""

    def __init__(self, longest: int) -> None:
        self.longest, self.asked = longest, list[tuple[tuple[int, ...], list[list[int]]]]()

    def call(self, op: str, meta: Any = None, arrays: Any = (), **_: Any) -> Any:
        if op == "train.decode":
            time.sleep(0.001)
            return {"absent": True} if self.longest < 100 else {}, []
        tokens, places = arrays
        assert op == "train.logits" and tokens.max() < TINY.model.vocab
        self.asked.append((tokens.shape, places.tolist()))
        if tokens.shape[1] > self.longest:
            raise OperationFailed({"type": "RuntimeError", "message": "too long"})
        time.sleep(tokens.shape[1] / 64000)
        return {}, [np.zeros((1, TINY.model.vocab), np.float32)]


def test_three_lengths_of_one_sequence_are_timed_here() -> None:
    reader = Reader(10_000)
    speed = prefill_speed(reader, TINY)
    assert list(speed) == ["64", "128", "256"]
    assert reader.asked == [((1, length), [[0, length - 1]]) for length in (64, 128, 256) for _ in range(4)]
    for one in speed.values():
        assert one["n"] == 3 and one["se"] is not None
        assert one["value"] is not None and 0 < one["value"] <= 64000, "no faster than it was"


def test_a_length_that_the_program_cannot_do_is_left_out() -> None:
    assert list(prefill_speed(Reader(128), TINY)) == ["64", "128"]
    assert prefill_speed(Reader(10), TINY) == {}


def test_decoding_is_timed_where_there_is_a_step() -> None:
    speed = decode_speed(Reader(200))
    assert speed is not None and speed["n"] == 3 and speed["value"] is not None and 0 < speed["value"] <= 32_000
    assert decode_speed(Reader(50)) is None
