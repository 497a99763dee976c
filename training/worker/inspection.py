"""Operations of the verifier: build the candidate, run it, differentiate it, count its work.

Everything here runs in the candidate's process. Outputs and input gradients go back as arrays and are judged outside.
What can only be known inside (which parameters got a gradient, how much work was done) is computed with functions of
torch taken before the candidate is imported (training/worker/mixers.py); the replies carry `inside: true` there. A
program that patches torch's internals can still forge those; it cannot forge the outputs that it is scored by.
"""

from __future__ import annotations

import functools
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from training.worker import counting, probes, surroundings
from training.worker.__main__ import describe
from training.worker.mixers import (
    autocast,
    build,
    call,
    class_of,
    describe_value,
    gradients,
    normed,
    output,
    to_numpy,
    to_tensor,
    weighted_sum,
)
from training.worker.program import FILE, load_class
from training.worker.registers import all_parameters, named_parameters
from training.worker.state import Emit, Op, WorkerState

__all__ = ["OPS"]

Arrays = list[np.ndarray]
Reply = tuple[dict[str, Any], Arrays]

_tensor, _parameter, _module = torch.Tensor, torch.nn.Parameter, torch.nn.Module
_cpu_time = time.process_time
_no_grad, _enable_grad, _numel, _add = torch.no_grad, torch.enable_grad, torch.Tensor.numel, torch.Tensor.add


def load(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{text} -> {seconds}. Executes the program once; what it does to torch meanwhile is kept for `environment`."""
    started = time.perf_counter()
    state.text = str(meta["text"])
    surroundings.before_import(state)
    state.cls = load_class(state.text, state.device)
    return {"seconds": time.perf_counter() - started}, []


def construct(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{specs} -> {results: [{ok, parameters: [[name, shape]], buffers, hidden} or {ok: false, error}]}, flat values
    of each."""
    results: list[dict[str, Any]] = []
    flat: Arrays = []
    for spec in meta["specs"]:
        try:
            mixer = build(state, spec)
            named = named_parameters(mixer)
            values = [to_numpy(parameter).reshape(-1).astype(np.float32) for parameter in named.values()]
            results.append(
                {
                    "ok": True,
                    "parameters": [[name, list(parameter.shape)] for name, parameter in named.items()],
                    "buffers": [[name, list(buffer.shape)] for name, buffer in mixer.named_buffers()],
                    "hidden": _hidden(mixer),
                }
            )
            flat.append(np.concatenate(values) if values else np.zeros(0, np.float32))
        except Exception as error:  # noqa: BLE001 - whatever the candidate raises is the answer
            results.append({"ok": False, "error": _described(error)})
            flat.append(np.zeros(0, np.float32))
    return {"results": results}, flat


def _described(error: BaseException) -> dict[str, Any]:
    """The error, and `own`: whether the statement that raised it is the candidate's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return {**describe(error), "own": trace is not None and trace.tb_frame.f_code.co_filename == FILE}


def _hidden(mixer: Any) -> list[str]:
    """Names of attributes that hold parameters or modules which torch does not know (in a list, a dict, a plain
    tensor)."""
    known = {id(item) for item in (*mixer.parameters(), *mixer.buffers(), *mixer.modules())}
    found: list[str] = []

    def search(value: Any, name: str, depth: int) -> None:
        learnt = isinstance(value, _parameter | _module) or (isinstance(value, _tensor) and value.requires_grad)
        if learnt and id(value) not in known:
            found.append(name)
        elif isinstance(value, list | tuple) and depth < 3:
            for index, item in enumerate(value[:64]):
                search(item, f"{name}[{index}]", depth + 1)
        elif isinstance(value, dict) and depth < 3:
            for key, item in list(value.items())[:64]:
                search(item, f"{name}[{key!r}]", depth + 1)

    for prefix, module in mixer.named_modules():
        for key, value in list(vars(module).items()):
            if key not in ("_parameters", "_buffers", "_modules"):
                search(value, f"{prefix}.{key}".lstrip("."), 0)
    return found


def forward(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec, specs?, calls?, watch?, largest?, grad?}, inputs -> {results, seen}, an output for each result.

    Each input gets a fresh mixer, built from `spec` (or from its own in `specs`) under one seed. `calls` > 1: the
    mixer is called so often on the same input and every output is returned. A spec's `before`: so many calls on noise
    come first; its `behind`: the layer_idx of another mixer of the same module, which gets the input first, and to
    whose output the input is added, as a model's block does. `grad`: with autograd recording, as in training. `watch`:
    lists the floating dtypes that its operations produced, and "mixing" (see counting.Watch). `largest`: adds the
    largest finite magnitude of all that its operations produced to each result.
    """
    results: list[dict[str, Any]] = []
    outputs: Arrays = []
    seen: set[str] = set()
    specs = meta.get("specs") or [meta["spec"]] * len(arrays)
    for array, spec in zip(arrays, specs, strict=True):
        try:
            cls = class_of(state, spec)
            first = _before(state, spec, cls)
            mixer = build(state, spec, cls)
            _used(mixer, spec, array, state.device)
            x = to_tensor(array, spec, state.device)
            for _ in range(int(meta.get("calls", 1))):
                largest = counting.Largest() if meta.get("largest") else None
                watch = largest or (counting.Watch(seen) if meta.get("watch") else nullcontext())
                with _enable_grad() if meta.get("grad") else _no_grad(), autocast(spec, state.device), watch:
                    value = call(mixer, x if first is None else _behind(first, x, spec), spec)
                results.append(describe_value(value) | ({"largest": largest.value} if largest else {}))
                outputs.append(to_numpy(output(value)))
        except Exception as error:  # noqa: BLE001 - whatever the candidate raises is the answer
            results.append({"ok": False, "error": _described(error)})
            outputs.append(np.zeros(0, np.float32))
    return {"results": results, "seen": sorted(seen)}, outputs


def _before(state: WorkerState, spec: dict[str, Any], cls: Any) -> Any:
    """The mixer of the layer spec["behind"], or None."""
    if spec.get("behind") is None:
        return None
    return build(state, {**spec, "kwargs": {**spec["kwargs"], "layer_idx": int(spec["behind"])}}, cls)


def _behind(first: Any, x: Any, spec: dict[str, Any]) -> Any:
    """What a mixer gets behind the mixer `first`."""
    added = _add(x, output(call(first, x, spec)))
    return normed(added) if spec.get("normed") else added


def _used(mixer: Any, spec: dict[str, Any], array: np.ndarray, device: str) -> None:
    """Calls the mixer spec["before"] times on four tokens of noise, in training mode, so that what waits for a later
    call shows."""
    if not spec.get("before"):
        return
    noise = np.random.default_rng(1).standard_normal((1, 4, array.shape[2]))
    mixer.train(True)
    for _ in range(int(spec["before"])):
        with _enable_grad(), autocast(spec, device):
            call(mixer, to_tensor(noise, spec, device), spec)
    mixer.train(bool(spec.get("train", False)))


def input_gradients(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec, cuts}, [x, w] -> {}, one array a cut t: the gradient of sum(o[:, :t] * w[:, :t]) with respect to x."""
    spec = meta["spec"]
    mixer = build(state, spec)
    x = to_tensor(arrays[0], spec, state.device, grad=True)
    with autocast(spec, state.device):
        value = output(call(mixer, x, spec))
    found: Arrays = []
    for cut in meta["cuts"]:
        (gradient,) = gradients(weighted_sum(value, arrays[1], cut), [x], keep=True)
        found.append(np.zeros_like(arrays[0]) if gradient is None else to_numpy(gradient))
    return {"inside": True}, found


def parameter_gradients(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec}, [x, w] -> {parameters: [[name, size, got, finite]], unregistered: [shape], loss}, [gradient of x]."""
    spec = meta["spec"]
    mixer = build(state, spec)
    x = to_tensor(arrays[0], spec, state.device, grad=True)
    with autocast(spec, state.device):
        value = output(call(mixer, x, spec))
    target = weighted_sum(value, arrays[1])
    named = named_parameters(mixer)
    learnt = [item for item in named.values() if item.requires_grad]
    known = {id(item) for item in learnt} | {id(x)}
    unregistered = [list(leaf.shape) for leaf in counting.leaves(target.grad_fn) if id(leaf) not in known]
    found = gradients(target, [x, *learnt])
    by_id = {id(item): gradient for item, gradient in zip(learnt, found[1:], strict=True)}
    rows = []
    for name, item in named.items():
        gradient = by_id.get(id(item))  # none for a frozen one
        values = np.zeros(1) if gradient is None else to_numpy(gradient)
        rows.append([name, _numel(item), bool(values.any()), bool(np.isfinite(values).all())])
    reached = np.zeros_like(arrays[0]) if found[0] is None else to_numpy(found[0])
    loss = float(to_numpy(target))
    return {"inside": True, "parameters": rows, "unregistered": unregistered, "loss": loss}, [reached]


def count(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec, width, lengths, batch, grad, backward, operations, saved, seconds} -> {late, rows: [{length, flops,
    elements, bytes, operations, saved, seconds}]}, with `backward` also backward_flops and backward_largest.

    Leaves out the longer lengths where one more doubling, at the growth seen, would launch more than `operations` or
    keep more than `saved` bytes: both are counted, so the rows do not depend on the machine; or where `seconds` of
    CPU time have passed, so that a program which is far too slow still gets a verdict: then `late` is true.
    """
    spec, started = meta["spec"], _cpu_time()
    rows: list[dict[str, Any]] = []
    for length in meta["lengths"]:
        if len(rows) >= 2 and _too_large(rows, meta):
            break
        mixer = build(state, spec)
        shape = (int(meta.get("batch", 1)), length, int(meta["width"]))
        x = to_tensor(np.random.default_rng(0).standard_normal(shape), spec, state.device)
        begun = _cpu_time()
        with autocast(spec, state.device), (_enable_grad if meta.get("grad", True) else _no_grad)():
            run = functools.partial(call, mixer, x, spec)
            row = counting.count(run, functools.partial(_differentiate, mixer) if meta.get("backward") else None)
        now = _cpu_time()
        rows.append({"length": length, **row, "seconds": now - begun})
        if length != meta["lengths"][-1] and now - started + 2 * (now - begun) > float(meta.get("seconds", 60.0)):
            return {"inside": True, "late": True, "rows": rows}, []
    return {"inside": True, "late": False, "rows": rows}, []


def _differentiate(mixer: Any, value: Any) -> None:
    gradients(output(value), [item for item in all_parameters(mixer) if item.requires_grad])


def _too_large(rows: list[dict[str, Any]], meta: dict[str, Any]) -> bool:
    last, before = rows[-1], rows[-2]
    for key in ("operations", "saved"):
        growth = last[key] / max(1, before[key])
        if last[key] * growth > float(meta.get(key, np.inf)):
            return True
    return False


OPS: dict[str, Op] = {
    "load": load,
    "construct": construct,
    "forward": forward,
    "input_gradients": input_gradients,
    "parameter_gradients": parameter_gradients,
    "count": count,
    **probes.OPS,
}
