"""Gradients: finite, and they reach the input and the parameters.

Refuses: a gradient that is NaN or infinite, an output that ignores its input (judged after all parameters were moved,
since an output projection may start at zero), a learnt tensor that is no registered parameter, more than a quarter of
all parameters never getting a gradient. Warns: a smaller share, by name (a fifth of published programs have some: what
starts behind a zero gate is one reason). A parameter counts as reached when any run gives it a gradient other than
zero: at initialisation and after all parameters were moved; in one run each token stands twice, as equal tokens do in
text, where distances and ranks have no gradient. How: inside the worker, with functions of torch captured before the
program; the gradient of the input comes back and is judged here. Exact comparisons with zero, so no tolerance. Cannot
see: gradients that vanish or explode only during training.
"""

from __future__ import annotations

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, failed, not_finite, passed, warned

__all__ = ["NAME", "run"]

NAME = "gradients"
RUNS = ((80, 65, False, True, 1), (81, 100, True, True, 1), (82, 65, True, False, 1), (83, 64, False, True, 2))
"""(seed, length, moved, in train mode, how often each token stands in a row)."""


def run(context: Context) -> list[CheckOutcome]:
    """One outcome, or a pass and a warning that names the parameters."""
    reached: dict[str, bool] = {}
    sizes: dict[str, int] = {}
    for seed, length, jitter, train, times in RUNS:
        spec = context.spec(seed, dtype=context.dtype, jitter=jitter, train=train)
        x, weight = context.inputs(seed, 2, length), context.inputs(seed + 1, 2, length)
        x = np.repeat(x, times, axis=1)[:, :length]
        reply, (gradient,) = context.worker.call("parameter_gradients", {"spec": spec}, [x, weight])
        place = {
            "seed": seed,
            "batch": 2,
            "length": length,
            "dtype": spec["dtype"],
            "mode": "train" if train else "eval",
            **({"each_token_stands": times} if times > 1 else {}),
        }
        place["parameters"] = "moved by N(0, 0.1)" if jitter else "as initialised"
        if not np.isfinite(gradient).all():
            return [failed(NAME, "the gradient of the input is not finite", {**place, **not_finite(gradient)})]
        wrong = [row[0] for row in reply["parameters"] if not row[3]]
        if wrong:
            return [failed(NAME, f"the gradient of {wrong[0]} is not finite", {**place, "names": wrong[:20]})]
        if jitter and not gradient.any():  # behind a projection that starts at zero nothing arrives at first
            return [failed(NAME, "the output ignores its input: no gradient reaches it", place)]
        if reply["unregistered"]:
            shapes = reply["unregistered"][:8]
            what = f"tensors of shapes {shapes} are learnt, but no registered parameters: no optimizer would see them"
            return [failed(NAME, what, {**place, "shapes": shapes})]
        for name, size, got, _ in reply["parameters"]:
            reached[name] = reached.get(name, False) or got
            sizes[name] = size
    return _unreached(context, reached, sizes)


def _unreached(context: Context, reached: dict[str, bool], sizes: dict[str, int]) -> list[CheckOutcome]:
    names = [name for name, got in reached.items() if not got]
    total = sum(sizes.values())
    if not names:
        return [passed(NAME, f"finite; all {total} parameters are reached")]
    share = sum(sizes[name] for name in names) / max(1, total)
    found = {"names": names[:20], "share": share, "largest_allowed": context.options.unused}
    count = sum(sizes[name] for name in names)
    what = f"{count} of {total} parameters ({share:.2%}) never get a gradient: {', '.join(names[:4])}"
    if share > context.options.unused:
        return [failed(NAME, what, found)]
    return [passed(NAME, "finite; they reach the input"), warned(NAME, what, found)]
