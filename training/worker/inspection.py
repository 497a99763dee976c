"""Operations of the verifier: build the candidate, run it, differentiate it, count its work.

Everything here runs in the candidate's process. Outputs and input gradients go back as arrays and are judged outside.
What can only be known inside (which parameters got a gradient, how much work was done) is computed with functions of
torch captured when this module is imported, which is before the candidate is; the replies carry `inside: true` there.
A program that patches torch's internals can still forge those; it cannot forge the outputs that it is scored by.
"""

from __future__ import annotations

import functools
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from training.worker import counting
from training.worker.__main__ import describe
from training.worker.program import load_class
from training.worker.state import Emit, Op, WorkerState

__all__ = ["OPS", "build", "call"]

Arrays = list[np.ndarray]
Reply = tuple[dict[str, Any], Arrays]

_grad, _manual_seed, _from_numpy, _no_grad = torch.autograd.grad, torch.manual_seed, torch.from_numpy, torch.no_grad
_count_nonzero, _isfinite, _tensor, _parameter, _module = (
    torch.count_nonzero,
    torch.isfinite,
    torch.Tensor,
    torch.nn.Parameter,
    torch.nn.Module,
)
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}


def load(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{text} -> {seconds}. Executes the program once."""
    started = time.perf_counter()
    state.text = str(meta["text"])
    state.cls = load_class(state.text, state.device)
    return {"seconds": time.perf_counter() - started}, []


def build(state: WorkerState, spec: dict[str, Any]) -> Any:
    """A fresh mixer.

    Args:
        spec: {kwargs, seed, dtype, train, jitter: {seed, scale} or None}. dtype "bfloat16" means float32 parameters
            under bfloat16 autocast. Jitter adds N(0, scale) to every floating parameter, so that what is zero at
            first is not.
    """
    if state.cls is None:
        raise LookupError("no program is loaded")
    _manual_seed(int(spec.get("seed", 0)))
    mixer = state.cls(**spec["kwargs"])
    if not isinstance(mixer, _module):
        raise TypeError(f"expected class DeltaNet to be a torch.nn.Module, got {type(mixer).__name__}")
    mixer = mixer.to(device=state.device, dtype=_DTYPES[spec.get("dtype", "float32")])
    jitter = spec.get("jitter")
    if jitter:
        generator = torch.Generator().manual_seed(int(jitter["seed"]))
        with _no_grad():
            for parameter in mixer.parameters():
                if parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_((noise * float(jitter["scale"])).to(parameter))
    mixer.train(bool(spec.get("train", False)))
    _manual_seed(int(spec.get("seed", 0)) + 1)
    return mixer


def call(mixer: Any, x: torch.Tensor) -> Any:
    """The forward call that the block makes: all arguments by keyword."""
    return mixer(hidden_states=x, attention_mask=None, past_key_values=None, use_cache=False, output_attentions=False)


def _autocast(spec: dict[str, Any], device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, dtype=torch.bfloat16) if spec.get("dtype") == "bfloat16" else nullcontext()


def _input(array: np.ndarray, spec: dict[str, Any], device: str) -> torch.Tensor:
    return _from_numpy(array.copy()).to(device=device, dtype=_DTYPES[spec.get("dtype", "float32")])


def _output(value: Any) -> torch.Tensor:
    first = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(first, _tensor):
        raise TypeError(f"expected the first returned value to be a tensor, got {type(first).__name__}")
    return first


def _describe(value: Any) -> dict[str, Any]:
    items = list(value) if isinstance(value, tuple | list) else []
    first = items[0] if items else value
    return {
        "ok": True,
        "tuple": isinstance(value, tuple),
        "returned": len(items) if items else 1,
        "shape": list(first.shape) if isinstance(first, _tensor) else None,
        "dtype": str(first.dtype).removeprefix("torch.") if isinstance(first, _tensor) else type(first).__name__,
        "auxiliary": type(items[1]).__name__ if len(items) > 1 else None,
        "auxiliary_shape": list(items[1].shape) if len(items) > 1 and isinstance(items[1], _tensor) else None,
    }


def _numpy(value: torch.Tensor) -> np.ndarray:
    value = value.detach().to("cpu")
    return value.to(torch.float64 if value.dtype == torch.float64 else torch.float32).numpy()


def construct(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{specs} -> {results: [{ok, parameters: [[name, shape]], buffers, hidden} or {ok: false, error}]}, flat values
    of each."""
    results: list[dict[str, Any]] = []
    flat: Arrays = []
    for spec in meta["specs"]:
        try:
            mixer = build(state, spec)
            named = list(mixer.named_parameters())
            values = [_numpy(parameter).reshape(-1).astype(np.float32) for _, parameter in named]
            results.append(
                {
                    "ok": True,
                    "parameters": [[name, list(parameter.shape)] for name, parameter in named],
                    "buffers": [[name, list(buffer.shape)] for name, buffer in mixer.named_buffers()],
                    "hidden": _hidden(mixer),
                }
            )
            flat.append(np.concatenate(values) if values else np.zeros(0, np.float32))
        except Exception as error:  # noqa: BLE001 - whatever the candidate raises is the answer
            results.append({"ok": False, "error": describe(error)})
            flat.append(np.zeros(0, np.float32))
    return {"results": results}, flat


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
    """{spec, specs?, calls?, warm?, watch?}, inputs -> {results, seen}, one output for each result that is ok.

    Each input gets a fresh mixer, built from `spec` (or from its own in `specs`) under one seed. `calls` > 1: the
    mixer is called so often on the same input and every output is returned. `warm`: the first input is only run, on
    the mixer that then runs the second. `watch`: lists the floating dtypes that its operations
    produced, and "mixing" (see counting.Watch).
    """
    results: list[dict[str, Any]] = []
    outputs: Arrays = []
    seen: set[str] = set()
    specs = meta.get("specs") or [meta["spec"]] * len(arrays)
    mixer: Any = None
    for index, (array, spec) in enumerate(zip(arrays, specs, strict=True)):
        try:
            if not (meta.get("warm") and index % 2):
                mixer = build(state, spec)
            x = _input(array, spec, state.device)
            for _ in range(int(meta.get("calls", 1))):
                watch = counting.Watch(seen) if meta.get("watch") else nullcontext()
                with _no_grad(), _autocast(spec, state.device), watch:
                    value = call(mixer, x)
                results.append(_describe(value))
                outputs.append(_numpy(_output(value)))
        except Exception as error:  # noqa: BLE001 - whatever the candidate raises is the answer
            results.append({"ok": False, "error": describe(error)})
            outputs.append(np.zeros(0, np.float32))
    return {"results": results, "seen": sorted(seen)}, outputs


def input_gradients(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec, cuts}, [x, w] -> {}, one array a cut t: the gradient of sum(o[:, :t] * w[:, :t]) with respect to x."""
    spec = meta["spec"]
    mixer = build(state, spec)
    x = _input(arrays[0], spec, state.device).requires_grad_()
    with _autocast(spec, state.device):
        output = _output(call(mixer, x))
    weight = _from_numpy(arrays[1].copy()).to(output)
    gradients: Arrays = []
    for cut in meta["cuts"]:
        target = (output[:, :cut] * weight[:, :cut]).sum()
        found = None
        if target.requires_grad:
            (found,) = _grad(target, x, retain_graph=True, allow_unused=True)
        gradients.append(np.zeros_like(arrays[0]) if found is None else _numpy(found))
    return {"inside": True}, gradients


def parameter_gradients(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec}, [x, w] -> {parameters: [[name, size, got, finite]], unregistered: [shape], loss}, [gradient of x]."""
    spec = meta["spec"]
    mixer = build(state, spec)
    x = _input(arrays[0], spec, state.device).requires_grad_()
    with _autocast(spec, state.device):
        output = _output(call(mixer, x))
    target = (output.float() * _from_numpy(arrays[1].copy()).to(output.device).float()).sum()
    named = [(name, item) for name, item in mixer.named_parameters() if item.requires_grad]
    leaves = counting.leaves(target.grad_fn)
    known = {id(item) for _, item in named} | {id(x)}
    unregistered = [list(leaf.shape) for leaf in leaves if id(leaf) not in known]
    gradients: Any = [None] * (len(named) + 1)
    if target.requires_grad:
        gradients = _grad(target, [x, *(item for _, item in named)], allow_unused=True)
    rows = []
    for (name, item), gradient in zip(named, gradients[1:], strict=True):
        got = gradient is not None and bool(_count_nonzero(gradient))
        finite = gradient is None or bool(_isfinite(gradient).all())
        rows.append([name, item.numel(), got, finite])
    found = np.zeros_like(arrays[0]) if gradients[0] is None else _numpy(gradients[0])
    return {"inside": True, "parameters": rows, "unregistered": unregistered, "loss": float(target.detach())}, [found]


def count(state: WorkerState, meta: dict[str, Any], arrays: Arrays, emit: Emit) -> Reply:
    """{spec, width, lengths, batch, seconds} -> {rows: [{length, flops, elements, bytes, operations, saved, seconds}]}.

    Stops early, leaving out the longer lengths, when `seconds` have passed.
    """
    spec, started = meta["spec"], time.perf_counter()
    rows = []
    for length in meta["lengths"]:
        mixer = build(state, spec)
        generator = torch.Generator().manual_seed(int(spec.get("seed", 0)))
        x = torch.randn(int(meta.get("batch", 1)), length, int(meta["width"]), generator=generator)
        x = x.to(device=state.device, dtype=_DTYPES[spec.get("dtype", "float32")])
        begun = time.perf_counter()
        with _autocast(spec, state.device):
            row = counting.count(functools.partial(call, mixer, x))
        rows.append({"length": length, **row, "seconds": time.perf_counter() - begun})
        # Twice the length costs at least twice the time: stop while the budget still holds.
        if time.perf_counter() - started + 2 * (time.perf_counter() - begun) > float(meta.get("seconds", 60.0)):
            break
    return {"inside": True, "rows": rows}, []


OPS: dict[str, Op] = {
    "load": load,
    "construct": construct,
    "forward": forward,
    "input_gradients": input_gradients,
    "parameter_gradients": parameter_gradients,
    "count": count,
}
