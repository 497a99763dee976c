"""Learns: a few dozen steps on a tiny associative task lower the loss, with finite gradients.

Proves: the mixer's own parameters can be trained by gradients: between a fixed random embedding and a fixed random
head, 32 steps of Adam lower the loss on pairs of keys and values that come again. How: sequences are drawn here, from
one seed; the worker trains with functions taken before the program was imported and returns losses and gradient norms
(inside), which are judged here. Refuses: an output that no earlier token reaches; a loss or gradient norm that is not
finite; a last fifth of the losses that is not at least 2 % below the first two. Both seeds and the mechanisms of our
designer fall by 20 to 50 %; the threshold only tells learning from not learning. Cannot see: how well it learns; that
is what training measures.
"""

from __future__ import annotations

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, failed, passed

__all__ = ["NAME", "run"]

NAME = "learns"
STEPS, BATCH, PAIRS, KEYS = 32, 4, 16, 8
RATE, CLIP, LEAST = 1e-2, 1.0, 0.02


def run(context: Context) -> list[CheckOutcome]:
    """Sets facts.learns: the relative fall of the loss."""
    alone = _alone(context)
    if alone is not None:
        return [alone]
    generator = np.random.default_rng(130)
    width = context.options.width
    tokens, targets = _task(generator)
    arrays = [
        generator.standard_normal((2 * KEYS, width)),
        generator.standard_normal((width, 2 * KEYS)) / np.sqrt(width),
        tokens,
        targets,
    ]
    spec = context.spec(130, dtype=context.dtype, train=True)
    reply, _ = context.worker.call("learn", {"spec": spec, "rate": RATE, "clip": CLIP}, arrays)
    losses, norms = list(reply["losses"]), list(reply["norms"])
    place = {"seed": 130, "batch": BATCH, "length": tokens.shape[2], "dtype": spec["dtype"], "mode": "train"}
    for kind, values in (("loss", losses), ("gradient norm", norms)):
        if not values or any(value is None or not np.isfinite(value) for value in values):
            step = next((index for index, value in enumerate(values) if value is None), len(values))
            what = f"the {kind} is not finite at training step {step + 1}"
            return [failed(NAME, what, {**place, "losses": losses[-5:], "gradient_norms": norms[-5:]})]
    first, last = float(np.mean(losses[:2])), float(np.mean(losses[-6:]))
    fall = 1 - last / first if first > 0 else 0.0
    context.facts["learns"] = round(fall, 4)
    if len(losses) < STEPS or fall < LEAST:
        what = f"the loss does not fall in {len(losses)} steps on a small associative task: {first:.3f} to {last:.3f}"
        shown = {**place, "losses": losses[::4], "gradient_norms": norms[::4]}
        return [failed(NAME, what, shown)]
    return [passed(NAME, f"loss {first:.2f} to {last:.2f} in {STEPS} steps; gradient norms at most {max(norms):.2g}")]


def _alone(context: Context) -> CheckOutcome | None:
    """A refusal where the last output gets no gradient from any token but its own."""
    spec, length = context.spec(131, dtype=context.dtype, jitter=True), 24
    x, weight = context.inputs(131, 1, length), context.inputs(132, 1, length)
    weight[:, :-1] = 0.0
    _, (gradient,) = context.worker.call("parameter_gradients", {"spec": spec}, [x, weight])
    if gradient[:, :-1].any():
        return None
    place = {"seed": 131, "batch": 1, "length": length, "dtype": spec["dtype"], "mode": "eval"}
    what = "an output depends on its own token alone: no gradient reaches an earlier one, so nothing is remembered"
    return failed(NAME, what, place)


def _task(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, int64 [steps, batch, length]: key, value, key, value ... under one table a sequence. A
    value is scored once its key was seen before."""
    tables = np.stack([generator.permutation(KEYS) for _ in range(STEPS * BATCH)])
    keys = generator.integers(0, KEYS, (STEPS * BATCH, PAIRS))
    values = KEYS + np.take_along_axis(tables, keys, axis=1)
    tokens = np.stack([keys, values], axis=2).reshape(STEPS * BATCH, -1)
    again = np.array([[key in row[:at] for at, key in enumerate(row)] for row in keys])
    targets = np.full(tokens.shape, -1)
    targets[:, 0::2] = np.where(again, values, -1)
    shape = (STEPS, BATCH, tokens.shape[1])
    return tokens.reshape(shape).astype(np.int64), targets.reshape(shape).astype(np.int64)
