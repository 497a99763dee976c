"""Length: it runs at twice and four times the training length, and what it computes stays bounded there.

Refuses: an exception, a wrong shape or a value that is not finite at the profile's length, twice or four times it;
outputs that grow along the sequence as its power 0.75 or more (a sum that nothing decays or normalises grows as 1
where its terms agree, as 0.5 where they do not); outputs thirty times as large beyond the training length as within it
(a power of 0.75 makes that 2.8 times at most); outputs a million times the size of the input; an intermediate value
a thousand times as large at the fourfold length (exponential growth that a later norm hides; a running sum of squares
grows 4 to 16 times). Warns: outputs that grow as a power above 0.35. How: one row of noise at each length, in the
dtype of training; the root mean square of the output over ten windows from an eighth of the training length on is
fitted here against the position; the largest magnitude of what its operations produce is read inside. The thresholds
lie between what bounded programs show (below 0.1) and the square root. Cannot see: growth that needs another input
than noise, or trained weights.
"""

from __future__ import annotations

import itertools

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, failed, passed, warned

__all__ = ["NAME", "run"]

NAME = "length"
REFUSED, WARNED, JUMP, HIDDEN = 0.75, 0.35, 30.0, 1000.0
LONGEST, HUGE = 16384, 1e6


def run(context: Context) -> list[CheckOutcome]:
    """Sets facts.length_exponent, the power of the position as which outputs grow."""
    base = min(context.options.profile_length, LONGEST // 4)
    spec = context.spec(120, dtype=context.dtype, jitter=True)
    lengths = [base, 2 * base, 4 * base]
    largest: list[float] = []
    outputs: list[np.ndarray] = []
    place = {"seed": 120, "batch": 1, "dtype": spec["dtype"], "mode": "eval", "training_length": base}
    for length in lengths:
        x = context.inputs(120, 1, 4 * base)[:, :length]
        reply, (output,) = context.worker.call("forward", {"spec": spec, "largest": length != 2 * base}, [x])
        result = reply["results"][0]
        if not result.get("ok"):
            error = result.get("error", {})
            what = f"at length {length}, {length // base} times the training length, it raises {error.get('type')}"
            found = {**place, "length": length, "message": error.get("message"), "line": error.get("line")}
            return [failed(NAME, f"{what}: {str(error.get('message'))[:200]}", found)]
        if output.shape != x.shape or not np.isfinite(output).all():
            what = "is not finite" if output.shape == x.shape else f"has shape {list(output.shape)}"
            first = int(np.argmax(~np.isfinite(output).all(axis=(0, 2)))) if output.shape == x.shape else None
            where = f"at length {length}, {length // base} times the training length, the output {what}"
            return [failed(NAME, where, {**place, "length": length, "first_position": first})]
        largest.append(float(result.get("largest", 0.0)))
        outputs.append(output.astype(np.float64))
    edges = np.geomspace(max(1, base // 8), 4 * base, 11).astype(int)
    windows = [(int(start), int(end)) for start, end in itertools.pairwise(edges)]
    scales = [float(np.sqrt(np.square(outputs[-1][0, start:end]).mean())) for start, end in windows]
    table = [{"from": start, "to": end, "rms": scale} for (start, end), scale in zip(windows, scales, strict=True)]
    power = _power(edges, scales)
    context.facts["length_exponent"] = round(power, 3)
    what = f"outputs grow as position^{power:.2f} up to four times the training length"
    if power > REFUSED:
        return [failed(NAME, f"{what}, without limit; decay, normalise or average", {**place, "table": table})]
    if max(scales) > HUGE:
        what = f"outputs are of size {max(scales):.3g} for inputs of size 1"
        return [failed(NAME, f"{what}; normalise or scale them", {**place, "table": table})]
    within, beyond = (max(scales[:-4]), max(scales[-4:]))  # the last four windows lie beyond the training length
    if beyond > JUMP * within > 0:
        jump = f"outputs are {beyond / within:.3g} times as large beyond the training length as within it"
        return [failed(NAME, jump, {**place, "table": table})]
    growth = largest[-1] / max(largest[0], 1e-30)
    if growth > HIDDEN:
        hidden = f"an intermediate value is {growth:.3g} times as large at four times the training length"
        return [failed(NAME, f"{hidden}: it grows without limit", {**place, "largest": largest[::2]})]
    outcome = passed(NAME, f"runs and stays bounded at {', '.join(map(str, lengths))} tokens (position^{power:.2f})")
    if power > WARNED:
        return [outcome, warned(NAME, f"{what}; decay or normalise to keep them bounded", {**place, "table": table})]
    return [outcome]


def _power(edges: np.ndarray, scales: list[float]) -> float:
    if min(scales) <= 0:
        return 0.0
    middles = np.sqrt(edges[:-1] * edges[1:].astype(float))
    fitted = float(np.polyfit(np.log(middles), np.log(scales), 1)[0])
    late = float(np.log(scales[-1] / scales[-4]) / np.log(middles[-1] / middles[-4]))
    return min(fitted, late)  # what only rises at first has a limit
