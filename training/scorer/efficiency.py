"""How fast the trained model reads and writes: tokens a second of a prefill at three lengths, and of decoding where the
program offers `step`, by the clock of this process.

Measured between training and scoring, on random tokens: nothing that is scored is shown. One sequence at a time, since
that shows what a length costs. The pipe and the logits of one place are in the time, a few tenths of a millisecond.
"""

from __future__ import annotations

import math
import statistics
import time

import numpy as np

from training.profiles import Profile
from training.scorer.client import OperationFailed, Worker

__all__ = ["decode_speed", "prefill_speed"]

MULTIPLES = (1, 2, 4)
"""Of the training length."""
REPEATS = 3
DECODED = 32
"""Tokens of one continuation."""


def prefill_speed(worker: Worker, profile: Profile) -> dict[str, dict[str, float | int | None]]:
    """Length in tokens (as text) -> {value: tokens a second, n: repeats, se}; a length at which the program raises is
    left out.

    Raises:
        WorkerDied: the worker does not live through it.
    """
    found: dict[str, dict[str, float | int | None]] = {}
    for multiple in MULTIPLES:
        length = multiple * profile.train.seq_len
        try:
            rates = _rates(worker, length, profile.model.vocab)
        except OperationFailed:
            continue
        se = statistics.stdev(rates) / math.sqrt(len(rates))
        found[str(length)] = {"value": statistics.fmean(rates), "n": len(rates), "se": se}
    return found


def decode_speed(worker: Worker) -> dict[str, float | int | None] | None:
    """{value: tokens a second of one sequence written token by token, n: repeats, se}; None where the program has no
    step, or it raises.

    Raises:
        WorkerDied: the worker does not live through it.
    """
    rates = []
    try:
        for repeat in range(1 + REPEATS):
            begun = time.perf_counter()
            answer, _ = worker.call("train.decode", {"tokens": DECODED})
            if "absent" in answer:
                return None
            if repeat:
                rates.append(DECODED / (time.perf_counter() - begun))
    except OperationFailed:
        return None
    return {"value": statistics.fmean(rates), "n": REPEATS, "se": statistics.stdev(rates) / math.sqrt(REPEATS)}


def _rates(worker: Worker, length: int, vocab: int) -> list[float]:
    """Tokens a second of each repeat, after one that warms up."""
    random, rates = np.random.default_rng(length), []
    for repeat in range(1 + REPEATS):
        tokens = random.integers(0, vocab, (1, length)).astype(np.int32)
        begun = time.perf_counter()
        worker.call("train.logits", arrays=[tokens, np.array([[0, length - 1]], dtype=np.int32)])
        if repeat:
            rates.append(length / (time.perf_counter() - begun))
    return rates
