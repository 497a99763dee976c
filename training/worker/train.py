"""Training and scoring operations of the worker: prepare, build, train, then logits for the scorer.

Everything here runs beside candidate code, so none of it is believed: reported losses steer the monitor and fill the
training curve; the scored loss and benchmarks come from logits that the scorer reads itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.worker.model import LanguageModel, all_parameters, all_tensors, build_model
from training.worker.state import Emit, Op, WorkerState

__all__ = ["OPS", "learning_rate"]

_PART = 1 << 28
"""Bytes of weights in one answer."""
_CARRIED = (torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)


def prepare(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Imports this module and fixes precision and seeds before the candidate is loaded. meta: {seed, dtype}."""
    torch.manual_seed(int(meta["seed"]))
    state.values["seed"] = int(meta["seed"])
    state.values["dtype"] = str(meta["dtype"])
    versions = {"torch": torch.__version__}
    hardware: dict[str, Any] = {}
    if state.device == "cuda":
        # On CPU one thread is deterministic anyway, and the switch would fill every new tensor.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32 = True
        hardware["gpu"] = torch.cuda.get_device_name()
    return {"versions": versions, "hardware": hardware}, []


def build(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Builds the language model around the loaded program. meta: {model, mixers, budget, init}; returns its sizes.

    An over-budget program is no exception: the answer is {refused: why}.
    """
    from training.worker.model import OverBudgetError

    if state.cls is None:
        raise RuntimeError("build before load")
    torch.manual_seed(state.values["seed"])
    try:
        model, sizes = build_model(
            state.cls, meta["model"], meta["mixers"], budget=meta["budget"], init=meta["init"], device=state.device
        )
    except OverBudgetError as error:
        return {"refused": str(error)}, []
    state.instances["model"] = model
    return dict(sizes), []


def train(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Trains the built model on a packed stream. meta: {stream, type, train: the profile's section}.

    Emits {step, loss, task_loss, lr, grad_norm, tokens, seconds} every `report_every` steps: means since the last
    report, loss over tokens of text (comparable with the held-out loss), task_loss over answers of generated tasks;
    loss is None when it is not finite. Returns {tokens, seconds, peak_memory_mb}.
    """
    model: LanguageModel = state.instances["model"]
    spec = meta["train"]
    steps, batch, length = int(spec["steps"]), int(spec["batch"]), int(spec["seq_len"])
    micro = min(batch, int(spec["micro_batch"] or batch))
    optimizer = _AdamW(model, spec)
    rows = np.memmap(meta["stream"], dtype=meta["type"], mode="r", shape=(steps * batch, length + 1))
    torch.manual_seed(state.values["seed"] + 1)
    model.train()
    started = time.perf_counter()
    means, every = _Means(state.device), int(spec["report_every"])
    for step, parts in enumerate(_batches(rows, batch, micro, state.device), start=1):
        rate = learning_rate(step, spec)
        optimizer.gradients.zero_()
        for part in parts:
            with _precision(state):
                logits = model.head(model.hidden(part.tokens).flatten(0, 1)[part.places])
            losses = F.cross_entropy(logits.float(), part.targets, reduction="none")
            (losses @ part.weights).backward()
            means.add(losses.detach(), part)
        norm = optimizer.step(rate)
        if step % every == 0 or step == steps or step == 1:
            finite = norm.item() if norm.isfinite() else None
            passed = {"tokens": step * batch * length, "seconds": time.perf_counter() - started}
            emit({"step": step, **means.take(), "lr": rate, "grad_norm": finite, **passed})
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return {"tokens": steps * batch * length, "seconds": seconds, "peak_memory_mb": _peak_memory(state.device)}, []


def logits(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Logits of the trained model. arrays: tokens int32 [B, T], and optionally places int32 [N, 2] (row, position).

    Returns float32 [B, T, V], or [N, V] with places.
    """
    model: LanguageModel = state.instances["model"]
    model.eval()
    tokens = torch.from_numpy(arrays[0].astype(np.int64)).to(state.device)
    with torch.no_grad(), _precision(state):
        hidden = model.hidden(tokens)
        if len(arrays) > 1:
            places = torch.from_numpy(arrays[1].astype(np.int64)).to(state.device)
            hidden = hidden[places[:, 0], places[:, 1]]
        out = model.head(hidden)
    return {}, [out.float().cpu().numpy()]


def read(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Weights and buffers of the model from number `from` on, as many as fit into one answer. Returns {total}.

    Types that numpy lacks go as float32; complex ones as pairs.
    """
    tensors, size = all_tensors(state.instances["model"]), 0
    parts: list[np.ndarray] = []
    for tensor in tensors[int(meta["from"]) :]:
        array = _plain(tensor).cpu().numpy()
        if parts and size + array.nbytes > _PART:
            break
        parts.append(array)
        size += array.nbytes
    return {"total": len(tensors)}, parts


def write(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Gives the tensors from number `from` on these values. meta: {from, total}. Returns {refused} on a mismatch."""
    tensors = all_tensors(state.instances["model"])
    chosen = tensors[int(meta["from"]) : int(meta["from"]) + len(arrays)]
    shapes = [tuple(_plain(tensor).shape) for tensor in chosen]
    if len(tensors) != meta["total"] or shapes != [array.shape for array in arrays]:
        return {"refused": f"{len(tensors)} tensors of shapes {shapes[:8]}"}, []
    for tensor, array in zip(chosen, arrays, strict=True):
        value = torch.from_numpy(array.copy())
        tensor.copy_(torch.view_as_complex(value) if tensor.is_complex() else value)
    return {}, []


def _plain(tensor: Tensor) -> Tensor:
    """As a dtype that the protocol carries."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.dtype in _CARRIED else tensor.float()


def learning_rate(step: int, spec: dict[str, Any]) -> float:
    """Rate at `step` (from 1): linear warm-up, then cosine to `final_lr` or constant with a linear decay at the end."""
    peak, final, steps, warmup = float(spec["lr"]), float(spec["final_lr"]), int(spec["steps"]), int(spec["warmup"])
    if step <= warmup:
        return peak * step / warmup
    if spec["schedule"] == "wsd":
        decay = int(spec["decay"])
        left = steps - step
        return peak * (final + (1 - final) * left / decay) if left < decay else peak
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)


class _AdamW:
    """AdamW (Loshchilov and Hutter 2019) on flat vectors: all weights, gradients and moments are one tensor each, and
    every parameter and its `.grad` are views into them. Norm, clipping, reset and update are a dozen calls, whatever
    the model.

    Matrices decay, vectors do not. A parameter that a step does not reach keeps a zero gradient. Not torch.optim's
    class, whose first use imports the compiler: 1.7 CPU-seconds in each short run.
    """

    def __init__(self, model: nn.Module, spec: Mapping[str, Any]) -> None:
        parameters = sorted((p for p in all_parameters(model) if p.requires_grad), key=lambda p: p.dim() < 2)
        if len({p.dtype for p in parameters}) > 1:
            model.float()
        self._decayed = sum(p.numel() for p in parameters if p.dim() >= 2)
        self._weights = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.gradients = torch.zeros_like(self._weights)
        self._first, self._second = torch.zeros_like(self._weights), torch.zeros_like(self._weights)
        self._betas, self._eps = (float(spec["betas"][0]), float(spec["betas"][1])), float(spec["eps"])
        self._decay, self._clip, self._steps = float(spec["weight_decay"]), float(spec["clip"]), 0
        at = 0
        for parameter in parameters:
            place = slice(at, at + parameter.numel())
            parameter.data = self._weights[place].view(parameter.shape)
            parameter.grad = self.gradients[place].view(parameter.shape)
            at += parameter.numel()

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Clips the gradients to the norm of the profile, updates, and returns their norm before clipping."""
        norm = self.gradients.norm()
        self.gradients.mul_((self._clip / (norm + 1e-6)).clamp(max=1.0))
        self._steps += 1
        (one, two), steps = self._betas, self._steps
        self._first.lerp_(self.gradients, 1 - one)
        self._second.mul_(two).addcmul_(self.gradients, self.gradients, value=1 - two)
        scale = (self._second / (1 - two**steps)).sqrt_().add_(self._eps)
        self._weights[: self._decayed].mul_(1 - rate * self._decay)
        self._weights.addcdiv_(self._first, scale, value=-rate / (1 - one**steps))
        return norm


@dataclass(frozen=True)
class _Part:
    """Rows of one forward pass: tokens int64 [rows, T]; flat places that are predicted, their targets and weights;
    text: 1 where the place is in a row of text, 0 where it is an answer of a task; counts of both.

    Every row of a batch weighs the same, so the few answers of a task row count as much as a row of text.
    """

    tokens: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor
    text: Tensor
    counts: tuple[int, int]


class _Means:
    """Mean losses since the last report, summed on the device so that no step waits for a number."""

    def __init__(self, device: str) -> None:
        self._sums, self._counts = torch.zeros(2, device=device), [0, 0]

    def add(self, losses: Tensor, part: _Part) -> None:
        text = losses @ part.text
        self._sums += torch.stack([text, losses.sum() - text])
        self._counts = [have + more for have, more in zip(self._counts, part.counts, strict=True)]

    def take(self) -> dict[str, float | None]:
        """{loss, task_loss}, and begins anew. Where there was no row of text, loss is that of the answers."""
        text, task = self._sums.tolist()
        means = [total / count if count else None for total, count in zip((text, task), self._counts, strict=True)]
        self._sums.zero_()
        self._counts = [0, 0]
        finite = [mean if mean is not None and math.isfinite(mean) else None for mean in means]
        return {"loss": finite[0] if means[0] is not None else finite[1], "task_loss": finite[1]}


def _batches(rows: np.ndarray, batch: int, micro: int, device: str) -> Iterator[list[_Part]]:
    """For each step its parts of at most `micro` rows."""
    for start in range(0, len(rows), batch):
        parts = []
        for at in range(start, start + batch, micro):
            block = np.asarray(rows[at : min(at + micro, start + batch)], dtype=np.int64)
            predicted = block[:, 1:] >= 0
            places, inside = np.flatnonzero(predicted), predicted.sum(axis=1)
            text = np.repeat(inside == predicted.shape[1], inside)
            weights = np.repeat(1.0 / (batch * np.maximum(inside, 1)), inside)
            arrays = (
                np.where(block < 0, -1 - block, block)[:, :-1],
                places,
                block[:, 1:].ravel()[places],
                weights.astype(np.float32),
                text.astype(np.float32),
            )
            tokens, *rest = (torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True) for x in arrays)
            written = int(text.sum())
            parts.append(_Part(tokens, rest[0], rest[1], rest[2], rest[3], (written, len(text) - written)))
        yield parts


def _precision(state: WorkerState) -> AbstractContextManager[Any]:
    if state.values.get("dtype") == "bfloat16":
        return torch.autocast(state.device, dtype=torch.bfloat16)
    return nullcontext()


def _peak_memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource
    import sys

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


OPS: dict[str, Op] = {
    "train.prepare": prepare,
    "train.build": build,
    "train.run": train,
    "train.logits": logits,
    "train.read": read,
    "train.write": write,
}
