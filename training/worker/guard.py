"""Notices whoever writes into parameters but the optimiser.

A mixer may compute what it likes with its parameters; changing them is the optimiser's part. A program that takes steps
of its own inside forward, in a hook or in a thread trains for longer than others do, and its numbers would be compared
as if it had not. So the optimiser keeps the weights in a tensor of its own (training/worker/optimizer.py) and hands out
copies, and the copies are compared with it, bit by bit, before each of its steps and after each answer to the scorer.
What is written between never lasts: the next step starts from the optimiser's own tensor.

Buffers may change: counters and running means are honest. Runs beside candidate code, with functions of torch taken
before the program was imported and its overrides switched off: however a write is spelled, it shows; a program that
finds the kept tensor in this process and changes both is not noticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.worker.registers import named_parameters

__all__ = ["NOTHING", "Guard", "Pair", "untouched"]

NOTHING = (-1, 0)
"""What `Guard.found` says where no parameter was changed."""

_any, _data_ptr, _logical_or, _ne, _nonzero, _view, _where = (
    torch.any,
    Tensor.data_ptr,
    torch.logical_or,
    torch.ne,
    torch.nonzero,
    Tensor.view,
    torch.where,
)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
untouched = torch._C.DisableTorchFunction
"""A context in which no subclass and no mode of the program sees what is done with tensors."""


@dataclass(frozen=True)
class Pair:
    """What the model computes with, what the optimiser knows, and which parameters lie there from which place on."""

    live: Tensor
    kept: Tensor
    names: Sequence[tuple[int, str]]


class Guard:
    """Compares the parameters of a model with what is known of them.

    Args:
        pairs: of the optimiser; parameters that are in none are compared with their values now.

    Attributes:
        names: of the parameters, in the same order in every process that builds the same model.
    """

    def __init__(self, model: nn.Module, pairs: Sequence[Pair] = ()) -> None:
        self._model = model
        self._held = named_parameters(model)
        self.names = list(self._held)
        self._at = {name: _data_ptr(parameter) for name, parameter in self._held.items()}
        known = {name for pair in pairs for _, name in pair.names}
        with untouched():
            loose = {name: parameter.detach() for name, parameter in self._held.items() if name not in known}
            self._pairs = [*pairs, *(Pair(value, value.clone(), [(0, name)]) for name, value in loose.items())]
            self._differ = [torch.zeros_like(_bits(pair.live), dtype=torch.bool) for pair in self._pairs]
            self._first = [torch.zeros((), dtype=torch.int64, device=pair.live.device) for pair in self._pairs]
        self._moved: tuple[str, int] | None = None

    def look(self, step: int) -> None:
        """Compares now, in the number `step` from 1. Waits for no device."""
        if self._moved is None:
            now = named_parameters(self._model)
            moved = [name for name, held in self._held.items() if now.get(name) is not held or self._strays(name, held)]
            self._moved = (moved[0], step) if moved else None
        with untouched():
            for number, pair in enumerate(self._pairs):
                differ = _ne(_bits(pair.live), _bits(pair.kept))
                _logical_or(self._differ[number], differ, out=self._differ[number])
                first = self._first[number]
                self._first[number] = _where((first == 0) & _any(differ), step, first)

    def _strays(self, name: str, parameter: nn.Parameter) -> bool:
        return _data_ptr(parameter) != self._at[name]

    def found(self) -> tuple[int, int]:
        """(Number in `names` of the first parameter that was seen changed, or standing elsewhere in memory; the `step`
        at which it was), `NOTHING` where none was."""
        if self._moved is not None:
            return self.names.index(self._moved[0]), self._moved[1]
        with untouched():
            for pair, differ, first in zip(self._pairs, self._differ, self._first, strict=True):
                if int(first):
                    place = int(_nonzero(differ.reshape(-1))[0]) * pair.live.numel() // differ.numel()
                    return self.names.index([name for start, name in pair.names if start <= place][-1]), int(first)
        return NOTHING

    def values(self) -> Mapping[str, Tensor]:
        """What is known of each parameter, by name, in its shape."""
        found: dict[str, Tensor] = {}
        for pair in self._pairs:
            for start, name in pair.names:
                shape = self._held[name].shape
                found[name] = pair.kept.reshape(-1)[start : start + shape.numel()].view(shape)
        return {name: found[name] for name in self._held}


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: a NaN equals itself there. Complex numbers of 16 bytes are two."""
    if tensor.element_size() > max(_BITS):
        tensor = torch.view_as_real(tensor)
    return _view(tensor, _BITS[tensor.element_size()])
