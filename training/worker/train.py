"""Training and scoring operations of the worker: prepare, build, train, then logits for the scorer.

Everything here runs beside candidate code, so none of it is believed: reported losses steer the monitor and fill the
training curve; the scored loss and benchmarks come from logits that the scorer reads itself.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.worker.batches import Means, Part, batches
from training.worker.guard import NOTHING, Guard
from training.worker.model import LanguageModel, build_model
from training.worker.optimizer import AdamW, learning_rate
from training.worker.registers import all_buffers
from training.worker.snapshot import Restored, Snapshot, sizes_of, state_of, unheld
from training.worker.state import Emit, Op, WorkerState
from training.worker.trial import precision, try_once
from training.worker.validation import Validation

__all__ = ["OPS"]


def prepare(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Imports this module and fixes precision and seeds before the candidate is loaded. meta: {seed, dtype,
    deterministic: operations without a deterministic form fail}."""
    torch.manual_seed(int(meta["seed"]))
    state.values["seed"] = int(meta["seed"])
    state.values["dtype"] = str(meta["dtype"])
    versions = {"torch": torch.__version__}
    hardware: dict[str, Any] = {}
    strict = bool(meta.get("deterministic"))
    if strict or state.device == "cuda":
        # On CPU one thread gives the same bits anyway.
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if state.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        hardware["gpu"] = torch.cuda.get_device_name()
    return {"versions": versions, "hardware": hardware}, []


def build(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Builds the language model around the loaded program. meta: {model, mixers, budget, init, compile}; returns its
    sizes.

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
    if meta.get("compile"):
        model.fuse()
    state.instances["model"] = model
    return dict(sizes), []


def restore(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """One piece of a checkpoint, put in place by the next `train`. meta: {name}; arrays: one flat piece of it."""
    state.values.setdefault("restored", Restored()).add(str(meta["name"]), arrays[0])
    return {}, []


def train(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Trains the built model on a packed stream.

    Args:
        meta: {stream, type, train: the profile's section}, and optionally checkpoint: {steps, seconds, at}, the
            intervals (None: none) and the steps at which a snapshot is sent; resume: {step, sizes: name -> elements},
            from where the restored checkpoint goes on, and what is in it; validation: {every}, with what `logits` is
            then asked as arrays.

    Emits {step, loss, task_loss, lr, grad_norm, memory_mb} every `report_every` steps: means since the last report,
    loss over tokens of text (comparable with the held-out loss), task_loss over answers of generated tasks; loss is
    None when it is not finite. Emits {checkpoint: {step, name, last}} with one array for each piece of a snapshot.

    With several ranks each takes its share of every batch's rows; rank 0 reports and keeps checkpoints for all.

    Returns:
        {peak_memory_mb}, or {refused: why} where a checkpoint does not fit, or {changed: {parameter, step}} where a
        parameter was not what the step before left, and training ended there.
    """
    model: LanguageModel = state.instances["model"]
    spec = meta["train"]
    steps, batch, length = int(spec["steps"]), int(spec["batch"]), int(spec["seq_len"])
    micro = min(batch, int(spec["micro_batch"] or batch))
    ranks = state.ranks
    optimizer, means = AdamW(model, spec, ranks), Means(state.device)
    rows = np.memmap(meta["stream"], dtype=meta["type"], mode="r", shape=(steps * batch, length + 1))
    torch.manual_seed(state.values["seed"] + 1)
    model.train()
    model.recompute = bool(spec["recompute"])
    done = _begin(state, meta.get("resume"), optimizer, means, (micro, length))
    if isinstance(done, str):
        return {"refused": done}, []
    mine = means if ranks.world == 1 else Means(state.device)
    guard = Guard(model, [optimizer.pair])
    # Rank 0 keeps checkpoints and reports for all.
    sender, every = _Sender((not ranks.rank and meta.get("checkpoint")) or {}, emit), int(spec["report_every"])
    stream = batches(rows, batch, micro, state.device, done, ranks.share(batch))
    validation = Validation.of(
        meta if not ranks.rank else {}, arrays, lambda asked: logits(state, {}, asked, emit)[1], emit
    )
    for step, parts in enumerate(stream, start=done + 1):
        rate = learning_rate(step, spec)
        optimizer.gradients.zero_()
        _agree(state, model, step)
        for part in parts:
            losses, total = _losses(state, model, part, spec)
            total.backward()
            mine.add(losses.detach(), part)
        guard.look(step)
        norm = optimizer.step(rate)
        if mine is not means:
            ranks.add([*mine.state.values()])
            means.absorb(mine)
        validation.look(model, step, steps)
        reports = step % every == 0 or step == steps or step == 1
        looked = reports or state.device == "cpu"  # a GPU is not waited for at every step
        # Every rank has to know what any of them saw, and that a snapshot needs all of them.
        due, changed, seen = ranks.most([int(sender.due(step, steps)), *(guard.found() if looked else NOTHING)])
        if seen:
            return {"changed": {"parameter": guard.names[changed], "step": seen}}, []
        if reports:
            finite = norm.item() if norm.isfinite() else None
            report = {"step": step, **means.take(), "lr": rate, "grad_norm": finite}
            report["memory_mb"] = _memory(state.device)
            if not ranks.rank:  # nobody reads what another rank says before training is over
                emit(report)
        if due:
            vectors = optimizer.whole()
            if not ranks.rank:
                sender.take(Snapshot(step, state_of(model, {**vectors, **means.state}, state.device)))
            del vectors
        sender.trickle()
    sender.flush()
    model.zero_grad(set_to_none=True)
    state.values["guard"] = guard
    if state.device == "cuda":
        torch.cuda.empty_cache()
    return {"peak_memory_mb": _peak_memory(state.device)}, []


def _agree(state: WorkerState, model: LanguageModel, step: int) -> None:
    """Before a step of several ranks: buffers as rank 0 has them (as in DDP), and random numbers of each other rank
    that follow from the step, so that a checkpoint needs none but rank 0's."""
    if state.ranks.world == 1:
        return
    state.ranks.copy(all_buffers(model))
    if state.ranks.rank > 0:
        torch.manual_seed((state.values["seed"] + 1) * 1_000_003 + step * 1_009 + state.ranks.rank)


def _losses(state: WorkerState, model: LanguageModel, part: Part, spec: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(Cross entropy of each predicted place [N], what is minimised: its weighted mean and the terms that the profile
    adds). Sums over places are outside autocast, which would round them, and with them the gradient, to bfloat16."""
    with precision(state):
        states, auxiliary = model.states(part.tokens)
        logits = model.head(states.flatten(0, 1)[part.places])
    logits = logits.float()
    losses = F.cross_entropy(logits, part.targets, reduction="none")
    total = losses @ part.weights
    if spec["z_loss"]:
        total = total + float(spec["z_loss"]) * (logits.logsumexp(-1).square() @ part.weights)
    if spec["aux_loss"] and auxiliary is not None:
        # Every part of a batch adds its share of rows, as its losses do.
        total = total + float(spec["aux_loss"]) * auxiliary.float() * len(part.tokens) / int(spec["batch"])
    return losses, total


def _begin(
    state: WorkerState, resume: Mapping[str, Any] | None, optimizer: AdamW, means: Means, shape: tuple[int, int]
) -> int | str:
    """Steps that are done, after putting a restored checkpoint in place and giving every rank what rank 0 has; or why
    the checkpoint does not fit. Where it does not at first, the model runs once on tokens of this `shape`, and so makes
    what it makes late."""
    model, ranks = state.instances["model"], state.ranks
    restored: Restored = state.values.pop("restored", Restored())
    vectors: dict[str, Tensor] = {}
    if resume is not None:

        def others() -> dict[str, Tensor]:
            return state_of(model, means.state, state.device)

        def fits() -> bool:
            return {**optimizer.sizes, **sizes_of(others())} == resume["sizes"]

        if not fits():
            try_once(state, *shape)
        if ranks.rank == 0:
            vectors = optimizer.room()
            refused = restored.into({**vectors, **others()}, state.device)
        else:  # it must not wait for rank 0, which refuses
            refused = None if fits() else "the checkpoint does not fit"
        if refused is not None:
            return refused
        optimizer.steps = int(resume["step"])
    ranks.copy(unheld(model))
    optimizer.deal(vectors)
    return optimizer.steps


class _Sender:
    """Decides when a snapshot is taken, and sends it one piece a step."""

    def __init__(self, spec: Mapping[str, Any], emit: Emit) -> None:
        self._steps, self._seconds = spec.get("steps"), spec.get("seconds")
        self._at, self._emit = frozenset(spec.get("at", ())), emit
        self._snapshot: Snapshot | None = None
        self._taken = time.monotonic()

    def due(self, step: int, steps: int) -> bool:
        """Also at the last step, where there is any interval at all."""
        if step in self._at:
            return True
        if self._steps is None and self._seconds is None:
            return False
        by_step = self._steps is not None and step % int(self._steps) == 0
        by_time = self._seconds is not None and time.monotonic() - self._taken >= float(self._seconds)
        return by_step or by_time or step == steps

    def take(self, snapshot: Snapshot) -> None:
        self.flush()
        self._snapshot, self._taken = snapshot, time.monotonic()

    def trickle(self) -> bool:
        """Sends one piece. False when there is none."""
        piece = self._snapshot.next() if self._snapshot is not None else None
        if piece is None:
            self._snapshot = None
            return False
        self._emit({"checkpoint": piece[0]}, [piece[1]])
        return True

    def flush(self) -> None:
        while self.trickle():
            pass


def logits(
    state: WorkerState, meta: dict[str, Any], arrays: list[np.ndarray], emit: Emit
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Logits of the trained model. arrays: tokens int32 [B, T], and optionally places int32 [N, 2] (row, position).

    Returns float32 [B, T, V], or [N, V] with places; and {changed: a parameter} where answering changed one.
    """
    model: LanguageModel = state.instances["model"]
    model.eval()
    tokens = torch.from_numpy(arrays[0].astype(np.int64)).to(state.device)
    with torch.no_grad(), precision(state):
        hidden = model.hidden(tokens)
        if len(arrays) > 1:
            places = torch.from_numpy(arrays[1].astype(np.int64)).to(state.device)
            hidden = hidden[places[:, 0], places[:, 1]]
        out = model.head(hidden)
    answer = out.float().cpu().numpy()
    guard: Guard | None = state.values.get("guard")
    if guard is not None:
        guard.look(1)
        changed, seen = guard.found()
        if seen:
            return {"changed": guard.names[changed]}, [answer]
    return {}, [answer]


def _memory(device: str) -> float | None:
    """MB in use now, None where it is not known."""
    if device == "cuda":
        return round(torch.cuda.memory_allocated() / 2**20, 1)
    try:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return round(int(file.read().split()[1]) * resource.getpagesize() / 2**20, 1)
    except OSError:
        return None


def _peak_memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


OPS: dict[str, Op] = {
    "train.prepare": prepare,
    "train.build": build,
    "train.restore": restore,
    "train.run": train,
    "train.logits": logits,
}
