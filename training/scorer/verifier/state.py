"""State: what was computed before does not change what a mixer answers, and the process is left as it was.

Refuses: a mixer that saw other data of the same shape before (in eval or train mode) answers the same input otherwise;
so does a fresh mixer after another instance saw other data (a cache of the module or the class), also one of another
layer, in training; an output in eval mode that is drawn from the global random state; a forward pass that draws from
that state in eval mode or resets it; a constructor that resets it; a parameter that a forward pass changes; parameters
that change between two calls and do not count in full; a default of torch, or a function of torch, numpy or Python,
that is not what it was before the import. Warns: a second identical call gives another output (a step counter, which
one published program in seven keeps), or a fresh mixer answers otherwise after another instance was called: then a
result depends on how many calls went before; settings that change speed or rounding only. How: fresh mixers under one
seed; for what a module holds, the program's file is executed anew for each history; outputs are compared here, at equal
shapes, so with next to no tolerance. What was changed in the process is read inside. Cannot see: what is kept outside
of the program's module and written only once; what needs more calls than were made; a change that is undone before the
call ends.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.records import CheckOutcome
from training.scorer.verifier.context import Context, failed, passed, warned

__all__ = ["NAME", "run"]

NAME = "state"
LENGTH = 65
_HARMLESS = ("threads", "matmul precision", "deterministic algorithms", "anomaly mode")


def run(context: Context) -> list[CheckOutcome]:
    """A refusal for what content or chance changes, warnings for what only the count of calls does, or passed."""
    warnings: list[CheckOutcome] = []
    for test in (_instance, _module, _process):
        refusal = test(context, warnings)
        if refusal is not None:
            return [refusal, *warnings]
    if warnings:
        return [passed(NAME, "does not depend on earlier data"), *warnings]
    return [passed(NAME, "two calls give one output; earlier data leaves no trace; the process is left as it was")]


def _place(seed: int, dtype: str, length: int = LENGTH) -> dict[str, Any]:
    return {"seed": seed, "batch": 2, "length": length, "dtype": dtype, "mode": "eval"}


def _inputs(context: Context, seed: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An input, other data, and data that begins as the input does (what is remembered by its first tokens)."""
    x, one, two = (context.inputs(seed + index, 2, length) for index in range(3))
    two[:, : length // 2] = x[:, : length // 2]
    return x, one, two


def _last(context: Context, meta: dict[str, Any], arrays: list[np.ndarray]) -> np.ndarray:
    """The output on the last of the inputs, after calls on those before it."""
    return context.worker.call("history", meta, arrays)[1][-1].astype(np.float64)


def _instance(context: Context, warnings: list[CheckOutcome]) -> CheckOutcome | None:
    """One mixer, called before on other data."""
    x, one, two = _inputs(context, 70, LENGTH)
    spec = context.spec(70, jitter=True)
    early: dict[str, np.ndarray] = {}
    for mode, then in (("eval", "eval"), ("train", "eval"), ("train", "train")):
        meta = {"spec": spec, "anew": True, "same": True, "modes": [mode, then]}
        after_one, after_two = (_last(context, meta, [before, x]) for before in (one, two))
        found = _difference(context, after_one, after_two)
        if found:
            what = f"after a call in {mode} mode with other data of the same shape, the same input gives another output"
            place = _place(70, spec["dtype"]) | {"mode": then, "earlier_call": mode}
            return failed(NAME, f"{what}: by {found['max_difference']:.3g}", {**place, **found})
        if then == "eval":
            early[mode] = after_one
    refusal = _stale(context, [one, x], early)
    if refusal is not None:
        return refusal
    first, second = context.outputs(NAME, spec, [x], calls=2)
    found = _difference(context, first, second)
    if found:
        what = f"a second identical call gives another output: by {found['max_difference']:.3g}"
        warnings.append(warned(NAME, what, {**_place(70, spec["dtype"]), **found}))
    return None


def _stale(context: Context, arrays: list[np.ndarray], early: dict[str, np.ndarray]) -> CheckOutcome | None:
    """Parameters moved between two calls, against `early`: by the mode of the first call, the second output with them
    moved from the start."""
    spec, jitter = context.spec(70), context.spec(70, jitter=True)["jitter"]
    for mode, wanted in early.items():
        meta = {"spec": spec, "anew": True, "same": True, "modes": [mode, "eval"], "move": jitter}
        found = _difference(context, wanted, _last(context, meta, arrays))
        if found:
            what = f"parameters that change after a call in {mode} mode do not count in full: something made from them"
            place = _place(70, spec["dtype"]) | {"earlier_call": mode}
            return failed(NAME, f"{what} is kept, by {found['max_difference']:.3g}", {**place, **found})
    return None


def _module(context: Context, warnings: list[CheckOutcome]) -> CheckOutcome | None:
    """Fresh mixers, after another one saw other data: first as after an import, then one more time without."""
    length = LENGTH + 2
    spec = context.spec(75, jitter=True)
    x, one, two = _inputs(context, 75, length)
    outputs = {
        name: _last(context, {"spec": spec, "anew": anew}, arrays)
        for name, anew, arrays in (
            ("alone", True, [x]),
            ("after one", True, [one, x]),
            ("after two", True, [two, x]),
            ("later, after one", False, [one, x]),
            ("later, after two", False, [two, x]),
        )
    }
    place = _place(75, spec["dtype"], length)
    counted = _difference(context, outputs["alone"], outputs["after one"])
    pairs = [("after one", "after two")] + ([] if counted else [("later, after one", "later, after two")])
    for before, other in pairs:
        found = _difference(context, outputs[before], outputs[other])
        if found:
            what = "a fresh mixer answers otherwise after another instance saw other data: state shared by instances"
            return failed(NAME, f"{what}: by {found['max_difference']:.3g}", {**place, **found})
    refusal = _between_layers(context, length, (one, two, x))
    if refusal is not None:
        return refusal
    if counted:
        what = "a fresh mixer answers otherwise after another instance was called: a count shared by instances"
        warnings.append(warned(NAME, f"{what}: by {counted['max_difference']:.3g}", {**place, **counted}))
    return None


def _between_layers(
    context: Context, length: int, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> CheckOutcome | None:
    """As `_module`, in training, where the mixer of another layer saw the other data: of the layer before, and of the
    layer after, which it did in the step before."""
    one, two, x = arrays
    spec = context.spec(76, jitter=True)
    for layers in ([0, 1], [1, 0]):
        meta = {"spec": spec, "anew": True, "modes": ["train", "train"], "layers": layers}
        after_one, after_two = (_last(context, meta, [before, x]) for before in (one, two))
        found = _difference(context, after_one, after_two)
        if found:
            what = f"the mixer of layer {layers[1]} answers otherwise after that of layer {layers[0]} saw other data"
            place = _place(76, spec["dtype"], length) | {"mode": "train", "layers": layers}
            return failed(NAME, f"{what}: state shared by layers, by {found['max_difference']:.3g}", place | found)
    return None


def _process(context: Context, warnings: list[CheckOutcome]) -> CheckOutcome | None:
    """Random state, defaults and functions of the process."""
    spec = context.spec(78, jitter=True)
    reply, outputs = context.worker.call("environment", {"spec": spec}, [context.inputs(78, 2, LENGTH)])
    one, two = (output.astype(np.float64) for output in outputs)
    place = _place(78, spec["dtype"])
    for when, found in (("import or construction", reply["imported"]), ("a forward pass", reply["ran"])):
        changed = {str(name): value for name, value in found["settings"].items()}
        severe = [name for name in changed if name not in _HARMLESS]
        if severe:
            text = ", ".join(f"{name} from {changed[name][0]} to {changed[name][1]}" for name in severe)
            return failed(NAME, f"{when} changes a setting of the whole process: {text}", {"changed": changed})
        if found["replaced"]:
            names = [str(name) for name in found["replaced"]]
            what = f"{when} replaces {', '.join(names[:4])} for the whole process; define functions of your own"
            return failed(NAME, what, {"replaced": names})
        if changed:
            text = ", ".join(f"{name} from {value[0]} to {value[1]}" for name, value in changed.items())
            warnings.append(warned(NAME, f"{when} changes {text} for the whole process", {"changed": changed}))
    drawn = _difference(context, one, two)
    if drawn:
        what = "in eval mode the output depends on the global random state: by"
        return failed(NAME, f"{what} {drawn['max_difference']:.3g}", {**place, "random_seeds": [11, 12], **drawn})
    if reply["moved"]:
        names = [str(name) for name in reply["moved"]]
        what = f"a forward pass changes parameters: {', '.join(names[:4])}; only the optimizer may"
        return failed(NAME, what, {**place, "parameters": names})
    chance = reply["random"]
    if chance["constructor"]:
        what = "the constructor resets the global random state: every layer starts equal, whatever the seed"
        return failed(NAME, f"{what}; use a torch.Generator of your own", {**place, "random_seeds": [11, 12]})
    if chance["reseeded"]:
        what = "a forward pass resets the global random state, so that all later draws of the process repeat"
        return failed(NAME, what, {**place, "random_seeds": [11, 12]})
    if chance["drawn"]:
        what = "a forward pass in eval mode draws from the global random state, so that it moves all later draws"
        return failed(NAME, f"{what}; use a torch.Generator of your own, or none", {**place, "random_seeds": [11, 12]})
    if chance["python"]:
        warnings.append(warned(NAME, "a forward pass draws from Python's random module", place))
    return None


def _difference(context: Context, one: np.ndarray, two: np.ndarray) -> dict[str, Any]:
    if one.shape != two.shape:
        return {"max_difference": float("inf"), "shapes": [list(one.shape), list(two.shape)]}
    difference = np.abs(one - two).max(axis=(0, 2))
    allowed = context.same_shape_tolerance(one)
    if (difference <= allowed).all():
        return {}
    positions = [int(index) for index in np.flatnonzero(~(difference <= allowed))[:8]]
    return {"max_difference": float(difference.max()), "tolerance": allowed, "positions": positions}
