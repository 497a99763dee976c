"""Construct: the block can build the mixer, in every form it uses, and twice the same under one seed.

Proves: it is built from hidden_size and from d_model, with 2, 4 and 8 heads, with and without a layer index, with the
block's keywords and with one nobody knows; two builds under one seed have equal parameters; what learns is a
registered parameter. The reference's other arguments at values that are not the default (`SWITCHES`) are built too:
an exception that a raise or assert statement of the program itself gives (a ValueError as a rule, a UserWarning in
the published reference) means "unsupported" and is recorded in facts.unsupported; any other failure is refused. How:
builds them in the sandbox; the parameter values come back and are compared here, bit by bit (same seed, same code,
same machine: no tolerance). Cannot see: sizes other than these; combinations of switches; parameters kept outside
the module, which the gradients check looks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.client import OperationFailed
from training.scorer.verifier.context import Context, explain, failed, passed, raised, warned
from training.scorer.verifier.source import own_switches, raises_at

__all__ = ["NAME", "SWITCHES", "run", "unsupported"]

NAME = "construct"
SWITCHES: dict[str, dict[str, object]] = {
    f"{name}={value!r}": {name: value}
    for name, value in (
        ("mode", "fused_recurrent"),
        ("expand_k", 0.5),
        ("expand_v", 2.0),
        ("use_beta", False),
        ("use_gate", True),
        ("use_short_conv", False),
        ("use_output_norm", False),
        ("conv_size", 3),
        ("conv_bias", True),
        ("allow_neg_eigval", True),
        ("qk_activation", "relu"),
        ("qk_activation", "elu"),
        ("qk_activation", "identity"),
        ("qk_norm", "sum"),
        ("norm_eps", 1e-3),
    )
}
"""The arguments of the published reference, each at one value or more that is not its default."""


def run(context: Context) -> list[CheckOutcome]:
    """Imports the program and builds its mixers. Sets facts.mixer_parameters (at the width of the profile),
    facts.unsupported, context.switches and context.shapes."""
    try:
        context.worker.load()
    except OperationFailed as error:
        return [raised(NAME, "importing the program raises", error.error)]
    cases = _cases(context)
    reply, values = context.worker.call("construct", {"specs": list(cases.values())})
    results = dict(zip(cases, reply["results"], strict=True))
    for case, result in results.items():
        if not result["ok"]:
            return [raised(NAME, f"with {case} it raises", result["error"], {"with": case})]
    first, again = results["the block's keywords"], results["the same again"]
    if first["parameters"] != again["parameters"] or not np.array_equal(values[0], values[1], equal_nan=True):
        return [failed(NAME, "two mixers built under one seed differ", _difference(values[0], values[1]))]
    if not values[0].size:
        return [failed(NAME, "it has no parameters", {"parameters": 0})]
    if not np.isfinite(values[0]).all():
        bad = int((~np.isfinite(values[0])).sum())
        return [failed(NAME, "a parameter is not finite after construction", {"seed": 0, "not_finite": bad})]
    by_d_model = f"d_model={context.options.width}"
    if [shape for _, shape in first["parameters"]] != [shape for _, shape in results[by_d_model]["parameters"]]:
        return [failed(NAME, "d_model and hidden_size give parameters of other shapes", {"with": by_d_model})]
    if first["hidden"]:
        names = ", ".join(first["hidden"][:5])
        return [failed(NAME, f"{names}: learnt, but no registered parameter", {"attributes": first["hidden"][:20]})]
    context.facts["mixer_parameters"] = int(values[-1].size)
    context.shapes = [list(shape) for _, shape in first["parameters"]]
    refusal = _switches(context)
    if refusal is not None:
        return [refusal]
    built = f"{len(cases) + len(context.switches)} forms built; {values[0].size} parameters"
    without = f"; unsupported: {', '.join(context.facts['unsupported'])}" if context.facts["unsupported"] else ""
    outcomes = [passed(NAME, f"{built} at width {context.options.width}{without}")]
    if np.array_equal(values[0], values[2]) and np.unique(values[0]).size > 16:
        what = "another seed gives the same parameters: it seems to fix the seed itself, so its runs cannot differ"
        outcomes.append(warned(NAME, what, {"seeds": [0, 1]}))
    return outcomes


def _cases(context: Context) -> dict[str, dict[str, Any]]:
    """What every program must build. The first three and the last are used by position."""
    options, spec = context.options, context.spec(dtype="float32")
    by_d_model = {key: value for key, value in spec["kwargs"].items() if key != "hidden_size"}
    by_d_model["d_model"] = options.width
    profile = {"hidden_size": options.profile_width, "num_heads": options.profile_heads}
    return {
        "the block's keywords": spec,
        "the same again": spec,
        "another seed": {**spec, "seed": 1},
        f"d_model={options.width}": {**spec, "kwargs": by_d_model},
        "num_heads=2": context.spec(dtype="float32", given={"num_heads": 2}),
        "num_heads=8": context.spec(dtype="float32", given={"num_heads": 8}),
        "layer_idx=3": context.spec(dtype="float32", given={"layer_idx": 3}),
        "layer_idx=None": context.spec(dtype="float32", given={"layer_idx": None}),
        "a keyword nobody knows": context.spec(dtype="float32", given={"keyword_nobody_knows": 1}),
        f"hidden_size={options.profile_width}, num_heads={options.profile_heads}": context.spec(
            dtype="float32", given=profile
        ),
    }


def _switches(context: Context) -> CheckOutcome | None:
    """Builds every switch; keeps those that can be built, records the others, refuses what breaks."""
    context.facts.setdefault("unsupported", [])
    own = {label: values for label, values in own_switches(context.program.text).items() if label not in SWITCHES}
    wanted = {**SWITCHES, **own}
    specs = [context.spec(dtype="float32", given=changes) for changes in wanted.values()]
    reply, _ = context.worker.call("construct", {"specs": specs})
    for (label, changes), result in zip(wanted.items(), reply["results"], strict=True):
        if result["ok"]:
            context.switches[label] = changes
        elif not unsupported(context, label, result["error"], own=label in own):
            what = f"with {label} it breaks; raise ValueError or NotImplementedError for what is not supported:"
            return raised(NAME, what, result["error"], {"with": label})
    return None


def unsupported(context: Context, label: str, error: Mapping[str, Any], *, own: bool) -> bool:
    """Whether the program says itself that it has no such form; if so it is recorded. A switch of the program's own,
    which nothing uses, may also break."""
    explicit = bool(error.get("own")) and raises_at(context.program.text, error.get("line")) and not error.get("memory")
    if not (own or explicit):
        return False
    context.facts["unsupported"].append(label)
    context.unsupported[label] = explain(error)
    return True


def _difference(first: np.ndarray, second: np.ndarray) -> dict[str, object]:
    if first.size != second.size:
        return {"seed": 0, "sizes": [int(first.size), int(second.size)]}
    return {"seed": 0, "differ": int((first != second).sum()), "max_difference": float(np.abs(first - second).max())}
