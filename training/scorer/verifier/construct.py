"""Construct: the block can build the mixer, in every form it uses, and twice the same under one seed.

Proves: it is built from hidden_size and from d_model, with 2 and 4 heads, with and without a layer index, with the
block's keywords and with one nobody knows; two builds under one seed have equal parameters; what learns is a
registered parameter. How: builds them in the sandbox; the parameter values come back and are compared here, bit by
bit (same seed, same code, same machine: no tolerance). Cannot see: sizes other than these; parameters kept outside
the module, which the gradients check looks for.
"""

from __future__ import annotations

import numpy as np

from common.records import CheckOutcome
from training.scorer.client import OperationFailed
from training.scorer.verifier.context import Context, failed, passed, raised

__all__ = ["NAME", "run"]

NAME = "construct"


def run(context: Context) -> list[CheckOutcome]:
    """Imports the program and builds its mixers. Sets facts.mixer_parameters (at the width of the profile)."""
    try:
        context.worker.load()
    except OperationFailed as error:
        return [raised(NAME, "importing the program raises", error.error)]
    spec = context.spec(dtype="float32")
    options = context.options
    by_d_model = {key: value for key, value in spec["kwargs"].items() if key != "hidden_size"} | {
        "d_model": options.width
    }
    profile = context.spec(dtype="float32", hidden_size=options.profile_width, num_heads=options.profile_heads)
    cases = {
        "the block's keywords": spec,
        "the same again": spec,
        "another seed": {**spec, "seed": 1},
        f"d_model={options.width}": {**spec, "kwargs": by_d_model},
        "num_heads=2": context.spec(dtype="float32", num_heads=2),
        "layer_idx=3": context.spec(dtype="float32", layer_idx=3),
        "layer_idx=None": context.spec(dtype="float32", layer_idx=None),
        "a keyword nobody knows": context.spec(dtype="float32", keyword_nobody_knows=1),
        f"hidden_size={options.profile_width}, num_heads={options.profile_heads}": profile,
    }
    reply, values = context.worker.call("construct", {"specs": list(cases.values())})
    results = dict(zip(cases, reply["results"], strict=True))
    for case, result in results.items():
        if not result["ok"]:
            return [raised(NAME, f"with {case} it raises", result["error"], {"with": case})]
    first, again = results["the block's keywords"], results["the same again"]
    if first["parameters"] != again["parameters"] or not np.array_equal(values[0], values[1], equal_nan=True):
        return [failed(NAME, "two mixers built under one seed differ", _difference(values[0], values[1]))]
    if not values[0].size:
        return [failed(NAME, "it has no parameters")]
    if not np.isfinite(values[0]).all():
        return [
            failed(
                NAME,
                "a parameter is not finite after construction",
                {"not_finite": int((~np.isfinite(values[0])).sum())},
            )
        ]
    other = results[f"d_model={options.width}"]
    if [shape for _, shape in first["parameters"]] != [shape for _, shape in other["parameters"]]:
        return [
            failed(
                NAME, "d_model and hidden_size give parameters of other shapes", {"with": f"d_model={options.width}"}
            )
        ]
    if first["hidden"]:
        names = ", ".join(first["hidden"][:5])
        return [failed(NAME, f"{names}: learnt, but no registered parameter", {"attributes": first["hidden"][:20]})]
    context.facts["mixer_parameters"] = int(values[-1].size)
    return [passed(NAME, f"{len(cases)} forms built; {values[0].size} parameters at width {options.width}")]


def _difference(first: np.ndarray, second: np.ndarray) -> dict[str, object]:
    if first.size != second.size:
        return {"seed": 0, "sizes": [int(first.size), int(second.size)]}
    return {"seed": 0, "differ": int((first != second).sum()), "max_difference": float(np.abs(first - second).max())}
