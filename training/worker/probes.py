"""Operations of the verifier beyond single forward passes: what a program does to its process, what one instance
leaves to the next, whether it learns, whether it decodes. As in inspection.py, only arrays are judged as they are."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from training.worker.mixers import (
    autocast,
    build,
    call,
    gradients,
    move,
    output,
    to_numpy,
    to_tensor,
)
from training.worker.program import load_class
from training.worker.registers import all_parameters, named_parameters
from training.worker.state import Emit, Op, WorkerState
from training.worker.surroundings import changed

__all__ = ["OPS"]

Arrays = list[np.ndarray]
Reply = tuple[dict[str, Any], Arrays]

_tensor, _no_grad, _enable_grad = torch.Tensor, torch.no_grad, torch.enable_grad
_from_numpy, _get_rng_state, _manual_seed = torch.from_numpy, torch.get_rng_state, torch.manual_seed
_to, _matmul, _log_softmax, _gather = _tensor.to, _tensor.matmul, _tensor.log_softmax, _tensor.gather
_mean, _neg, _copy_, _numel = _tensor.mean, _tensor.neg, _tensor.copy_, _tensor.numel
_element_size, _numpy = _tensor.element_size, _tensor.numpy
_float32, _float64 = torch.float32, torch.float64


def environment(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec}, [x] -> {imported, ran: {settings: {name: [before, now]}, replaced: [names]}, moved: [names], random:
    {constructor, drawn, reseeded, python}}, and two outputs.

    The outputs are of fresh mixers whose forward passes begin with different random states.
    imported is what import and construction did, ran includes forward passes. drawn: a forward pass moved the state;
    reseeded: the state after it does not depend on the state before; constructor: the same of construction.
    """
    build(state, meta["spec"])
    settings, replaced = changed(state)
    imported = {"settings": settings, "replaced": replaced[:20]}
    outputs, states = [], []
    drawn = python = False
    for rng in (11, 12):
        spec = {**meta["spec"], "rng": rng}
        mixer = build(state, spec)
        before, plain = _random_state(), random.getstate()
        with _no_grad(), autocast(spec, state.device):
            outputs.append(to_numpy(output(call(mixer, to_tensor(arrays[0], spec, state.device), spec))))
        states.append(_random_state())
        drawn, python = drawn or states[-1] != before, python or random.getstate() != plain
    moved = _moved(mixer, state, meta["spec"], arrays[0])
    settings, replaced = changed(state)
    reply = {
        "inside": True,
        "imported": imported,
        "ran": {"settings": settings, "replaced": replaced[:20]},
        "moved": moved[:20],
        "random": {
            "constructor": _constructed(state, meta["spec"], 11) == _constructed(state, meta["spec"], 12),
            "drawn": drawn,
            "reseeded": states[0] == states[1],
            "python": python,
        },
    }
    return reply, outputs


def _moved(mixer: Any, state: WorkerState, spec: dict[str, Any], array: np.ndarray) -> list[str]:
    """Names of parameters that forward passes change, in eval and in train mode."""
    before = {name: to_numpy(item).copy() for name, item in named_parameters(mixer).items()}
    for train in (False, True):
        mixer.train(train)
        with _enable_grad(), autocast(spec, state.device):
            call(mixer, to_tensor(array, spec, state.device), spec)
    return [
        name
        for name, item in named_parameters(mixer).items()
        if name not in before or not np.array_equal(before[name], to_numpy(item), equal_nan=True)
    ]


def _constructed(state: WorkerState, spec: dict[str, Any], seed: int) -> bytes:
    """The global random state after a construction that began with `seed`."""
    assert state.cls is not None
    _manual_seed(seed)
    state.cls(**spec["kwargs"])
    return _random_state()


def _random_state() -> bytes:
    return _numpy(_get_rng_state()).tobytes()


def history(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec, anew, same, modes, layers, move}, inputs -> the output for each input, in order, in one process.

    Each input gets a fresh mixer, of the layer that `layers` names for it, or with `same` all get one; `modes`: for
    each input "eval", as unless told, or "train", where autograd records; `move`: the parameters are moved so (see
    mixers.move) after the first call. `anew`: the program is executed again before all, so that what its module and
    classes hold is as after an import; the class that other operations use stays as it was.
    """
    held, spec = state.cls, {**meta["spec"], "anew": False}
    try:
        if meta.get("anew"):
            state.cls = load_class(str(state.text), state.device)
        outputs: Arrays = []
        mixer: Any = None
        for index, array in enumerate(arrays):
            if mixer is None or not meta.get("same"):
                layer = {"layer_idx": int(meta["layers"][index])} if meta.get("layers") else {}
                mixer = build(state, {**spec, "kwargs": {**spec["kwargs"], **layer}})
            train = bool(meta.get("modes")) and meta["modes"][index] == "train"
            mixer.train(train)
            with _enable_grad() if train else _no_grad(), autocast(spec, state.device):
                outputs.append(to_numpy(output(call(mixer, to_tensor(array, spec, state.device), spec))))
            if meta.get("move") and index == 0:
                move(mixer, meta["move"])
        return {}, outputs
    finally:
        state.cls = held


def learn(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec, rate, clip}, [embedding [V, W], head [W, V], tokens, targets int64 [steps, B, T] (-1: not scored)] ->
    {losses, norms}: Adam on the mixer's parameters alone, between a fixed embedding and a fixed head."""
    spec = meta["spec"]
    mixer = build(state, spec)
    parameters = [item for item in all_parameters(mixer) if item.requires_grad]
    table, head = arrays[0].astype(np.float32), _to(_from_numpy(arrays[1].astype(np.float32)), state.device)
    values = np.concatenate([to_numpy(item).reshape(-1) for item in parameters] or [np.zeros(0)]).astype(np.float64)
    first, second = np.zeros_like(values), np.zeros_like(values)
    losses: list[float] = []
    norms: list[float] = []
    for step, (tokens, targets) in enumerate(zip(arrays[2], arrays[3], strict=True), start=1):
        with _enable_grad():
            x = to_tensor(table[tokens], spec, state.device)
            with autocast(spec, state.device):
                value = output(call(mixer, x, spec))
            loss = _loss(value, head, targets, state.device)
            found = gradients(loss, parameters)
        parts = [
            np.zeros(_numel(item)) if grad is None else to_numpy(grad).reshape(-1)
            for item, grad in zip(parameters, found, strict=True)
        ]
        gradient = np.concatenate(parts or [np.zeros(0)]).astype(np.float64)
        losses.append(float(to_numpy(loss)))
        norms.append(float(np.sqrt(np.square(gradient).sum())))
        if not np.isfinite(losses[-1]) or not np.isfinite(norms[-1]):
            break
        gradient *= min(1.0, float(meta["clip"]) / (norms[-1] + 1e-12))
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        scale = np.sqrt(second / (1 - 0.99**step)) + 1e-8
        values -= float(meta["rate"]) * first / (1 - 0.9**step) / scale
        _write(parameters, values)
    return {"inside": True, "losses": [_json(x) for x in losses], "norms": [_json(x) for x in norms]}, []


def _loss(value: Any, head: Any, targets: np.ndarray, device: str) -> Any:
    """Mean negative log likelihood of the scored targets."""
    scored = targets >= 0
    logits = _matmul(_to(value, _float32), head)[_to(_from_numpy(scored), device)]
    wanted = _to(_from_numpy(targets[scored].astype(np.int64)[:, None]), device)
    return _neg(_mean(_gather(_log_softmax(logits, -1), -1, wanted)))


def _write(parameters: list[Any], values: np.ndarray) -> None:
    at = 0
    with _no_grad():
        for item in parameters:
            part = values[at : at + _numel(item)].reshape(tuple(item.shape))
            _copy_(item, _from_numpy(np.ascontiguousarray(part)))
            at += _numel(item)


def _json(value: float) -> float | None:
    return value if np.isfinite(value) else None


class Cache:
    """What a program of the published form expects as past_key_values: one dict of states a layer."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}
        self.seen = 0

    def update(self, *args: Any, layer_idx: int | None = 0, offset: int | None = 1, **states: Any) -> dict[str, Any]:
        """Keeps the states that are named and not None; counts the tokens of the first layer."""
        held = self.states.setdefault(int(layer_idx or 0), {})
        held.update({name: value for name, value in states.items() if value is not None and name != "cache_kwargs"})
        if not int(layer_idx or 0):
            self.seen += int(offset or 0)
        return held

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self.seen

    def __getitem__(self, layer: int) -> dict[str, Any]:
        return self.states[layer]

    def __len__(self) -> int:
        return max(self.states, default=-1) + 1


def decode(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec, prompt}, [x [1, T, W]] -> {kept: whether a cache is kept, error, state_bytes: after prompt and at the
    end}, [output of the whole, output of the prompt and then of one token a call].

    A program with a method step is asked through it, one token a call from the first on. Others are tried with
    past_key_values=None, as it begins, then with a cache object as fla's models pass it.
    """
    spec, prompt = meta["spec"], int(meta["prompt"])
    with _no_grad(), autocast(spec, state.device):
        whole = to_numpy(output(call(build(state, spec), to_tensor(arrays[0], spec, state.device), spec)))
        if callable(getattr(build(state, spec), "step", None)):
            return _stepped(build(state, spec), spec, prompt, arrays[0], state.device, whole)
        for start in (None, Cache()):
            mixer, cache, parts, sizes = build(state, spec), start, [], []
            edges = [0, *range(prompt, arrays[0].shape[1] + 1)]
            try:
                for begin, end in itertools.pairwise(edges):
                    x = to_tensor(arrays[0][:, begin:end], spec, state.device)
                    form = {"call": {"use_cache": True, "past_key_values": cache}}
                    value = call(mixer, x, form)
                    cache = value[2] if isinstance(value, tuple) and len(value) > 2 else None
                    sizes.append(_bytes(cache))
                    if not sizes[-1]:
                        break
                    parts.append(to_numpy(output(value)))
            except Exception as error:  # noqa: BLE001 - whatever the candidate raises is the answer
                what = f"{type(error).__name__}: {str(error)[:300]}"
                return {"kept": True, "error": what, "at": len(parts), "state_bytes": sizes}, [whole]
            if sizes and sizes[-1]:
                return {"kept": True, "error": None, "state_bytes": [sizes[0], sizes[-1]]}, [whole, *parts]
    return {"kept": False, "error": None, "state_bytes": []}, [whole]


def _stepped(mixer: Any, spec: dict[str, Any], prompt: int, x: np.ndarray, device: str, whole: np.ndarray) -> Reply:
    """The same through step(x_t [1, 1, W], state) -> (output, state)."""
    held, parts, sizes = None, [], []
    try:
        for at in range(x.shape[1]):
            value = mixer.step(to_tensor(x[:, at : at + 1], spec, device), held)
            held = value[1]
            parts.append(to_numpy(output(value)))
            sizes.append(_bytes(held))
    except Exception as error:  # noqa: BLE001 - whatever the candidate raises is the answer
        what = f"{type(error).__name__}: {str(error)[:300]}"
        return {"kept": True, "error": what, "at": len(parts), "state_bytes": sizes}, [whole]
    meta = {"kept": True, "error": None, "state_bytes": [sizes[prompt - 1], sizes[-1]]}
    return meta, [whole, np.concatenate(parts[:prompt], axis=1), *parts[prompt:]]


def _bytes(value: Any, depth: int = 0) -> int:
    """Bytes of all tensors inside a cache."""
    if isinstance(value, _tensor):
        return _numel(value) * _element_size(value)
    if depth > 4 or value is None:
        return 0
    items: Any = ()
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, list | tuple):
        items = value
    else:
        with suppress(TypeError):
            items = vars(value).values()
    return sum(_bytes(item, depth + 1) for item in items)


OPS: dict[str, Op] = {"environment": environment, "history": history, "learn": learn, "decode": decode}
