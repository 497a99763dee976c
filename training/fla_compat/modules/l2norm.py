"""Scaling to unit length: stand-in for fla.modules.l2norm."""

from __future__ import annotations

import torch
from torch import Tensor

from training.fla_compat.modules.precision import wide

__all__ = ["l2_norm", "l2norm"]


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension; eps lies inside the root, so the length is just under 1."""
    x_wide = wide(x)
    return (x_wide * torch.rsqrt(x_wide.square().sum(dim=-1, keepdim=True) + eps)).to(output_dtype or x.dtype)


l2_norm = l2norm
