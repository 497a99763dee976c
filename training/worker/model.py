"""The language model around a mixer: embedding, pre-norm blocks (mixer, SwiGLU), final norm, head.

Runs inside the sandbox. Equal size by construction: the feed-forward width is fitted so that the whole model has the
baseline's number of parameters, whatever the mixer takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from training.worker.registers import all_parameters

__all__ = ["LanguageModel", "OverBudgetError", "build_model", "fit_width"]

EMBEDDING_STD = 0.02
_compile, _numel = torch.compile, torch.Tensor.numel
_MULTIPLES = (64, 32, 16, 8, 4, 2, 1)
"""Feed-forward widths are multiples of the largest of these that still meets the tolerance: kernels like round
sizes."""


class OverBudgetError(ValueError):
    """The mixer leaves no room for a feed-forward layer at the baseline's size."""


class RMSNorm(nn.Module):
    """x_BTD / rms(x) * weight, computed in float32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD.float(), self.weight.shape, self.weight.float(), self.eps).to(x_BTD.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix. Shazeer 2020."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)). The mixer's cache is dropped; it gets no mask."""

    def __init__(self, mixer: nn.Module, width: int, inner: int, eps: float) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width, eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, inner)
        self._fused: Callable[[Tensor], Tensor] | None = None

    def fuse(self, backend: str | Callable[..., Any]) -> None:
        self._fused = _compile(self._feed, backend=backend)

    def _feed(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(x_BTD, the mixer's auxiliary value: a scalar, or None)."""
        mixed = self.mixer(self.mixer_norm(x_BTD))
        several = isinstance(mixed, tuple | list)
        x_BTD = x_BTD + (mixed[0] if several else mixed)
        auxiliary = mixed[1] if several and len(mixed) > 1 else None
        feed = self._fused if self._fused is not None and self.training else self._feed
        return feed(x_BTD), auxiliary if isinstance(auxiliary, Tensor) else None


class LanguageModel(nn.Module):
    """tokens_BT (int64) -> logits. `hidden` gives the states before the head, so that a caller can pick positions.

    Attributes:
        recompute: keep only what each block gets, and compute the inside again in the backward pass.
    """

    def __init__(self, mixers: list[nn.Module], width: int, inner: int, vocab: int, tied: bool, eps: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(mixer, width, inner, eps) for mixer in mixers)
        self.norm = RMSNorm(width, eps)
        self.head = nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.head.weight, std=EMBEDDING_STD)
        if tied:
            self.head.weight = self.embedding.weight
        self.recompute = False

    def fuse(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Lets torch.compile fuse the second half of each block, from its norm to the sum, in training mode: scoring
        asks in many shapes, each of which would be compiled. Mixers stay as they are: their code is nobody's to
        trace."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.fuse(backend)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        return self.states(tokens_BT)[0]

    def states(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """(States before the head [B, T, D], sum of the blocks' auxiliary values, None where no block gives one)."""
        x_BTD, total = self.embedding(tokens_BT), None
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BTD, auxiliary = checkpoint(block, x_BTD, use_reentrant=False)
            else:
                x_BTD, auxiliary = block(x_BTD)
            if auxiliary is not None:
                total = auxiliary if total is None else total + auxiliary
        return self.norm(x_BTD), total

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.head(self.hidden(tokens_BT))


def fit_width(fixed: int, per_width: int, budget: int, tolerance: float) -> int:
    """The feed-forward width at which fixed + width * per_width is within `tolerance` of `budget` parameters.

    Raises:
        OverBudgetError: no width of at least 1 is.
    """
    exact = (budget - fixed) / per_width
    for multiple in _MULTIPLES:
        width = max(multiple, round(exact / multiple) * multiple)
        if abs(fixed + width * per_width - budget) <= tolerance * budget:
            return width
    raise OverBudgetError(
        f"over budget: without feed-forward layers the model has {fixed:,} parameters, the baseline {budget:,}"
        if exact < 1
        else f"no feed-forward width gives {budget:,} parameters within {tolerance:.1%}: one unit takes {per_width:,}"
    )


def build_model(
    make: Callable[..., nn.Module],
    spec: Mapping[str, Any],
    mixer_arguments: list[dict[str, Any]],
    *,
    budget: int | None,
    init: str,
    device: str,
) -> tuple[LanguageModel, dict[str, int]]:
    """The model around `make(**arguments)` for each layer, and its sizes.

    Args:
        spec: width, vocab, tied, ffn, eps and tolerance of the profile's model section.
        mixer_arguments: keywords of the mixer, one dict a layer.
        budget: total parameters to meet; None takes the profile's feed-forward width as it is.
        init: "program" keeps the mixers as their own code initialised them; "fla" resets each Linear and Conv1d of the
            model to N(0, 0.02) and zero bias.

    Returns:
        The model on `device`, in float32 where its trained parameters had several dtypes, and {parameters,
        mixer_parameters, ffn_width, embedding, head, mlps, norms}: parameters in all and by part; a tied head has none
        of its own.

    Raises:
        OverBudgetError: the budget cannot be met. Anything else: what the mixer raises.
    """
    width, vocab = int(spec["hidden_size"]), int(spec["vocab"])
    mixers = [make(**arguments) for arguments in mixer_arguments]
    mixer_parameters = sum(_count(mixer) for mixer in mixers)
    fixed = mixer_parameters + (1 if spec["tied"] else 2) * vocab * width + (2 * len(mixers) + 1) * width
    per_width = 3 * width * len(mixers)
    inner = int(spec["ffn"]) if budget is None else fit_width(fixed, per_width, budget, float(spec["tolerance"]))
    model = LanguageModel(mixers, width, inner, vocab, bool(spec["tied"]), float(spec["norm_eps"]))
    if init == "fla":
        _reset(model)
    if len({parameter.dtype for parameter in all_parameters(model) if parameter.requires_grad}) > 1:
        model.float()
    model.to(device)
    sizes = {"parameters": _count(model), "mixer_parameters": mixer_parameters, "ffn_width": inner}
    return model, {**sizes, **_parts(model)}


def _parts(model: LanguageModel) -> dict[str, int]:
    embedding = _count(model.embedding)
    mlps = sum(_count(block.mlp) for block in model.blocks if isinstance(block, Block))
    tied = model.head.weight is model.embedding.weight
    head = 0 if tied else _count(model.head)
    norms = (2 * len(model.blocks) + 1) * _count(model.norm)
    return {"embedding": embedding, "head": head, "mlps": mlps, "norms": norms}


def _count(module: nn.Module) -> int:
    return sum(_numel(parameter) for parameter in all_parameters(module))


def _reset(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
