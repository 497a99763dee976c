"""AdamW on flat vectors, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.worker.guard import Pair, untouched
from training.worker.registers import named_parameters

__all__ = ["AdamW", "learning_rate"]


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


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) on flat vectors: all weights, gradients and moments are one tensor each. Norm,
    clipping, reset and update are a dozen calls, whatever the model.

    The weights are its own: every parameter is a view into a copy of them, renewed after each step, and every `.grad`
    one into the gradients. What anyone else writes into a parameter shows in `pair` and is gone after the step.
    Matrices decay, vectors do not. A parameter that a step does not reach keeps a zero gradient. Not torch.optim's
    class, whose first use imports the compiler: 1.7 CPU-seconds in each short run.

    Args:
        model: whose trained parameters have one dtype, as those of `build_model` do.

    Attributes:
        steps: updates so far.
        pair: what the model computes with, beside the weights.
    """

    def __init__(self, model: nn.Module, spec: Mapping[str, Any]) -> None:
        trained = [(name, p) for name, p in named_parameters(model).items() if p.requires_grad]
        trained.sort(key=lambda item: item[1].dim() < 2)
        self._decayed = sum(p.numel() for _, p in trained if p.dim() >= 2)
        with untouched():
            self._live = torch.cat([p.detach().reshape(-1) for _, p in trained])
            self._weights = self._live.clone()
            self.gradients = torch.zeros_like(self._weights)
            self._first, self._second = torch.zeros_like(self._weights), torch.zeros_like(self._weights)
        self._betas, self._eps = (float(spec["betas"][0]), float(spec["betas"][1])), float(spec["eps"])
        self._decay, self._clip = float(spec["weight_decay"]), float(spec["clip"])
        self.steps = 0
        names, at = [], 0
        for name, parameter in trained:
            place = slice(at, at + parameter.numel())
            parameter.data = self._live[place].view(parameter.shape)
            parameter.grad = self.gradients[place].view(parameter.shape)
            names.append((at, name))
            at += parameter.numel()
        self.pair = Pair(self._live, self._weights, names)

    @property
    def vectors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, beside `steps`. After a change of it, call `publish`."""
        return {"weights": self._weights, "first": self._first, "second": self._second}

    @torch.no_grad()
    def publish(self) -> None:
        """Gives the model the weights."""
        with untouched():
            self._live.copy_(self._weights)

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Clips the gradients to the norm of the profile, updates, and returns their norm before clipping."""
        norm = self.gradients.norm()
        self.gradients.mul_((self._clip / (norm + 1e-6)).clamp(max=1.0))
        self.steps += 1
        (one, two), steps = self._betas, self.steps
        self._first.lerp_(self.gradients, 1 - one)
        self._second.mul_(two).addcmul_(self.gradients, self.gradients, value=1 - two)
        scale = (self._second / (1 - two**steps)).sqrt_().add_(self._eps)
        self._weights[: self._decayed].mul_(1 - rate * self._decay)
        self._weights.addcdiv_(self._first, scale, value=-rate / (1 - one**steps))
        self.publish()
        return norm
