"""Running the model without a trace in the run: what was drawn and what buffers hold is as it was before.

Not covered: what a program keeps elsewhere, such as a counter in a Python attribute. Runs beside candidate code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from training.worker.model import LanguageModel
from training.worker.registers import all_parameters, registers
from training.worker.state import WorkerState

__all__ = ["dense", "precision", "try_once", "undone"]


def precision(state: WorkerState) -> AbstractContextManager[Any]:
    """The context in which the model computes in the dtype of the run."""
    if state.values.get("dtype") == "bfloat16":
        return torch.autocast(state.device, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Whatever is done inside, afterwards generators, buffers and the training mode are as they were.

    A buffer is the tensor that it was, with the values that it had, also where another one took its place. What is
    first made inside stays, since the program believes that it is there.
    """
    parameters = all_parameters(model)
    known = {id(parameter) for parameter in parameters}
    before = [
        (held["_buffers"], leaf, buffer, buffer.detach().clone())
        for _, held in registers(model)
        for leaf, buffer in held["_buffers"].items()
        if buffer is not None and id(buffer) not in known
    ]
    training = model.training
    devices = [torch.cuda.current_device()] if any(parameter.is_cuda for parameter in parameters) else []
    with torch.random.fork_rng(devices):
        yield
    model.train(training)
    with torch.no_grad():
        for buffers, leaf, buffer, value in before:
            if buffer.shape == value.shape and dense(buffer):
                buffer.copy_(value)
                buffers[leaf] = buffer
            else:  # resized in place, or without memory of its own
                buffers[leaf] = value


def try_once(state: WorkerState, rows: int, length: int) -> None:
    """One forward pass as in training, undone: what the model makes only when it runs then has its place."""
    model: LanguageModel = state.instances["model"]
    tokens = torch.zeros((rows, length), dtype=torch.int64, device=state.device)
    with undone(model):
        model.train()
        with torch.no_grad(), precision(state):
            model.hidden(tokens)


def dense(tensor: Tensor) -> bool:
    """Whether each of its elements has a place of its own in memory."""
    return all(step > 0 or size < 2 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
