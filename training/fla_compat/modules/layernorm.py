"""Root-mean-square norm: stand-in for fla.modules.layernorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.fla_compat.modules.precision import wide

__all__ = ["RMSNorm", "rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual in wide arithmetic, and that sum in the dtype of the stream of residuals."""
    total = wide(x) if residual is None else wide(x) + wide(residual)
    kept = total.to(residual.dtype) if residual is not None else wide(x) if residual_in_fp32 else x
    y = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y, kept


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), with an optional residual added before it.

    forward(x [..., hidden_size], residual) -> y; with prenorm=True -> (y, x + residual), for the next block.
    """

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.elementwise_affine, self.eps = hidden_size, elementwise_affine, eps
        affine: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(hidden_size, **affine)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(hidden_size, **affine)) if elementwise_affine and bias else None

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, kept = rms_norm(x, self.weight, self.bias, self.eps, residual, residual_in_fp32)
        return (y.to(x.dtype), kept) if prenorm else y.to(x.dtype)
