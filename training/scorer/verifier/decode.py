"""Decode: where a cache is kept, feeding one token at a time gives what the parallel form gives. A warning only.

Proves, for a program with a method step(x_t, state) -> (o_t, state): 40 single steps give the outputs of one pass; for
one that returns a cache with use_cache=True: after a prompt of 21 tokens, 19 single steps do. Sets facts.decode (true,
false, or None where no cache is kept, which is no fault) and, only where it holds, facts.state_bytes (batch 1, after
the last token; that it does not grow is part of it). How: with past_key_values=None at first, then with an object like
the one that fla's models pass; outputs are compared here. Tolerance: 4096 roundings of the largest output (16 in a
coarse dtype), since a recurrence sums in another order than a chunked form. Cannot see: longer decoding, more than one
row, a cache that is kept in the module itself.
"""

from __future__ import annotations

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, passed, warned

__all__ = ["NAME", "run"]

NAME = "decode"
PROMPT, LENGTH = 21, 40


def run(context: Context) -> list[CheckOutcome]:
    """Sets facts.decode and facts.state_bytes."""
    spec = context.spec(140, jitter=True)
    context.facts["decode"], context.facts["state_bytes"] = None, None
    x = context.inputs(140, 1, LENGTH)
    reply, (whole, *parts) = context.worker.call("decode", {"spec": spec, "prompt": PROMPT}, [x])
    if not reply["kept"]:
        return [passed(NAME, "keeps no cache")]
    context.facts["decode"] = False
    place = {"seed": 140, "batch": 1, "length": LENGTH, "prompt": PROMPT, "dtype": spec["dtype"]}
    if reply["error"]:
        return [warned(NAME, f"decoding step by step raises {reply['error']}", {**place, "after_calls": reply["at"]})]
    width = whole.shape[2]
    if [part.shape for part in parts] != [(1, PROMPT, width), *[(1, 1, width)] * (LENGTH - PROMPT)]:
        shapes = [list(part.shape) for part in parts[:4]]
        return [warned(NAME, "decoding step by step gives outputs of another shape", {**place, "shapes": shapes})]
    stepped = np.concatenate(parts, axis=1).astype(np.float64)
    difference = np.abs(stepped - whole.astype(np.float64)).max(axis=(0, 2))
    allowed = context.loose_tolerance(whole)
    if not (difference <= allowed).all():
        found = {
            **place,
            "max_difference": float(difference.max()),
            "tolerance": allowed,
            "positions": [int(index) for index in np.flatnonzero(~(difference <= allowed))[:8]],
        }
        what = f"decoding step by step differs from the parallel form: by {difference.max():.3g}"
        return [warned(NAME, f"{what}; leave step out, or return None as the cache, if there is no decoding", found)]
    first, last = (int(size) for size in reply["state_bytes"])
    if last > first:
        what = f"the cache grows while decoding, from {first} to {last} bytes over {LENGTH - PROMPT} tokens"
        return [warned(NAME, what, {**place, "state_bytes": [first, last]})]
    context.facts["decode"], context.facts["state_bytes"] = True, last
    return [passed(NAME, f"decoding equals the parallel form; the state takes {last} bytes")]
