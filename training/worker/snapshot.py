"""The state of a training run as flat arrays, sent in pieces between steps, and put back.

A snapshot copies the optimiser's three vectors at once and hands them out one piece a step, so that training waits for
a copy in memory and never for a disk. Runs beside candidate code: the scorer bounds and checks all that arrives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.worker.registers import all_buffers, all_parameters

__all__ = ["Restored", "Snapshot", "plain", "sizes_of", "state_of", "unheld"]

PIECE = 64 << 20
"""Bytes of one piece."""
_CARRIED = (torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)


def plain(tensor: Tensor) -> Tensor:
    """As a dtype that the protocol carries: complex as pairs, what numpy lacks as float32."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.dtype in _CARRIED else tensor.float()


def state_of(model: torch.nn.Module, vectors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Everything a run goes on from: `vectors` of the optimiser, the tensors it does not hold, generator states."""
    found = {**vectors, **{f"tensor.{number}": tensor for number, tensor in enumerate(unheld(model))}}
    found["rng"] = _padded(torch.get_rng_state())
    if device == "cuda":
        found["rng_cuda"] = _padded(torch.cuda.get_rng_state())
    return found


def sizes_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """How many elements a checkpoint of these tensors holds of each."""
    return {name: plain(tensor.detach()).numel() for name, tensor in tensors.items()}


def unheld(model: torch.nn.Module) -> list[Tensor]:
    """The tensors of `model` that the optimiser does not hold: parameters that are not trained, then buffers."""
    frozen = [parameter.detach() for parameter in all_parameters(model) if not parameter.requires_grad]
    return [*frozen, *all_buffers(model)]


def _padded(state: Tensor) -> Tensor:
    """Bytes as int32."""
    return torch.nn.functional.pad(state, (0, -len(state) % 4)).view(torch.int32)


class Snapshot:
    """A copy of `tensors` as they are now, in pieces.

    Attributes:
        step: optimiser steps that are done.
    """

    def __init__(self, step: int, tensors: dict[str, Tensor]) -> None:
        self.step = step
        copies = {name: plain(tensor.detach()).reshape(-1).clone() for name, tensor in tensors.items()}
        self._pieces = self._cut(copies)

    def next(self) -> tuple[dict[str, Any], np.ndarray] | None:
        """({step, name, last}, flat array) of the next piece; None when all are sent."""
        return next(self._pieces, None)

    def _cut(self, copies: dict[str, Tensor]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        final = list(copies)[-1]
        for name, tensor in copies.items():
            count = max(1, PIECE // tensor.element_size())
            starts = range(0, max(len(tensor), 1), count)
            for start in starts:
                last = name == final and start == starts[-1]
                yield {"step": self.step, "name": name, "last": last}, tensor[start : start + count].cpu().numpy()


class Restored:
    """Collects the pieces of a checkpoint, then puts them back."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[np.ndarray]] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        self._pieces.setdefault(name, []).append(array)

    def into(self, tensors: dict[str, Tensor], device: str) -> str | None:
        """Gives `tensors`, from `state_of`, the collected values, and the generators their states.

        Returns:
            Why they do not fit; then nothing was changed.
        """
        values = {name: np.concatenate(parts) for name, parts in self._pieces.items()}
        sizes = sizes_of(tensors)
        if {name: value.size for name, value in values.items()} != sizes:
            return f"the checkpoint holds {_sizes(values)}, the model has {dict(list(sizes.items())[:8])}"
        with torch.no_grad():
            for name, tensor in tensors.items():
                value = torch.from_numpy(values[name])
                if name == "rng":
                    torch.set_rng_state(value.view(torch.uint8)[: len(torch.get_rng_state())])
                elif name == "rng_cuda":
                    torch.cuda.set_rng_state(value.view(torch.uint8)[: len(torch.cuda.get_rng_state())], device)
                elif tensor.is_complex():
                    tensor.copy_(torch.view_as_complex(value.reshape(*tensor.shape, 2)))
                else:
                    tensor.copy_(value.reshape(tensor.shape))
        return None


def _sizes(values: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: int(value.size) for name, value in list(values.items())[:8]}
