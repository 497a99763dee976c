"""AdamW on flat vectors, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.worker.guard import Pair, untouched
from training.worker.ranks import Ranks
from training.worker.registers import named_parameters

__all__ = ["AdamW", "learning_rate"]

_fused_adamw = torch._fused_adamw_


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

    Of several ranks each updates one part of the weights (ZeRO, Rajbhandari et al. 2020): gradients are summed into the
    part of whoever needs them, moments exist for the own part only, and the new weights are gathered on all. Weights
    stay whole, since the guard of every rank compares all that its model computes with.

    Args:
        model: whose trained parameters have one dtype, as those of `build_model` do.
        fused: update by torch's fused kernel; None: on a GPU. It rounds differently.
        ranks: those that train together; `whole`, `deal` and `step` have to be called on each of them.

    Attributes:
        steps: updates so far.
        gradients: of this rank's rows, until `step` sums them over ranks.
        pair: what the model computes with, beside the weights.
        sizes: elements of each vector of a checkpoint.
    """

    def __init__(
        self, model: nn.Module, spec: Mapping[str, Any], ranks: Ranks | None = None, fused: bool | None = None
    ) -> None:
        self._ranks = ranks or Ranks()
        trained = [(name, p) for name, p in named_parameters(model).items() if p.requires_grad]
        trained.sort(key=lambda item: item[1].dim() < 2)
        self._count = sum(p.numel() for _, p in trained)
        self._mine, padding = self._ranks.part(self._count)
        decayed = sum(p.numel() for _, p in trained if p.dim() >= 2)
        with untouched():
            flat = [p.detach().reshape(-1) for _, p in trained]
            self._live = torch.cat([*flat, flat[0].new_zeros(padding)]) if padding else torch.cat(flat)
            self._weights = self._live.clone()
            self.gradients = torch.zeros_like(self._weights)
            self._own, self._gradient = self._weights[self._mine], self.gradients[self._mine]
            self._first, self._second = torch.zeros_like(self._own), torch.zeros_like(self._own)
        self._decayed = max(0, decayed - self._mine.start)
        self._betas, self._eps = (float(spec["betas"][0]), float(spec["betas"][1])), float(spec["eps"])
        self._decay, self._clip = float(spec["weight_decay"]), float(spec["clip"])
        self._fused = self._own.is_cuda if fused is None else fused
        self.steps = 0
        self.sizes = dict.fromkeys(("weights", "first", "second"), self._count)
        names, at = [], 0
        for name, parameter in trained:
            place = slice(at, at + parameter.numel())
            parameter.data = self._live[place].view(parameter.shape)
            parameter.grad = self.gradients[place].view(parameter.shape)
            names.append((at, name))
            at += parameter.numel()
        self.pair = Pair(self._live, self._weights, names)

    def whole(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it beside `steps`, whatever the number of ranks: on rank 0 the whole weights and
        moments, elsewhere nothing. Of one rank they are its own tensors, of several those of the moments are copies."""
        moments = {"first": self._first, "second": self._second}
        whole = {name: self._ranks.gather(part) for name, part in moments.items()}
        found = {"weights": self._weights, **{name: vector for name, vector in whole.items() if vector is not None}}
        return {name: vector[: self._count] for name, vector in found.items()} if self._ranks.rank == 0 else {}

    def room(self) -> dict[str, Tensor]:
        """On rank 0, where to put what `whole` gave, before `deal`; needs no other rank."""
        if self._ranks.world == 1:
            return self.whole()
        weights = self._weights[: self._count]
        return {"weights": weights, "first": torch.zeros_like(weights), "second": torch.zeros_like(weights)}

    @torch.no_grad()
    def deal(self, room: Mapping[str, Tensor]) -> None:
        """Gives every rank its part of what rank 0 has in `room` (empty: no moments yet), and the model the weights."""
        self._ranks.copy([self._weights])
        for name, part in (("first", self._first), ("second", self._second)):
            self._ranks.scatter(part, room.get(name))
        self._publish()

    def _publish(self) -> None:
        with untouched():
            self._live.copy_(self._weights)

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Clips the gradients to the norm of the profile, updates, and returns their norm before clipping."""
        self._ranks.reduce(self._gradient, self.gradients)
        norm = self._ranks.norm(self._gradient)
        self._gradient.mul_((self._clip / (norm + 1e-6)).clamp(max=1.0))
        self.steps += 1
        (one, two), steps = self._betas, self.steps
        if self._fused:
            self._update_fused(rate)
        else:
            self._first.lerp_(self._gradient, 1 - one)
            self._second.mul_(two).addcmul_(self._gradient, self._gradient, value=1 - two)
            scale = (self._second / (1 - two**steps)).sqrt_().add_(self._eps)
            self._own[: self._decayed].mul_(1 - rate * self._decay)
            self._own.addcdiv_(self._first, scale, value=-rate / (1 - one**steps))
        self._ranks.spread(self._weights, self._own)
        self._publish()
        return norm

    def _update_fused(self, rate: float) -> None:
        """The same in one pass over memory for what decays and one for what does not."""
        steps = torch.full((), float(self.steps), device=self._own.device)
        for place, decay in ((slice(0, self._decayed), self._decay), (slice(self._decayed, None), 0.0)):
            if self._own[place].numel():
                _fused_adamw(
                    [self._own[place]],
                    [self._gradient[place]],
                    [self._first[place]],
                    [self._second[place]],
                    [],
                    [steps],
                    lr=rate,
                    beta1=self._betas[0],
                    beta2=self._betas[1],
                    weight_decay=decay,
                    eps=self._eps,
                    amsgrad=False,
                    maximize=False,
                )
