"""Root-mean-square norm with an output gate: stand-in for fla.modules.fused_norm_gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.fla_compat.modules.layernorm import rms_norm
from training.fla_compat.modules.precision import wide

__all__ = ["FusedRMSNormGated"]


class FusedRMSNormGated(nn.Module):
    """RMSNorm(x) * activation(g): the norm first, then the gate. activation: 'swish' (the same as 'silu') or 'sigmoid'.

    Raises:
        ValueError: another activation.
    """

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("swish", "silu", "sigmoid"):
            raise ValueError(f"activation must be 'swish', 'silu' or 'sigmoid', got {activation!r}")
        self.hidden_size, self.elementwise_affine, self.eps = hidden_size, elementwise_affine, eps
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, kept = rms_norm(x, self.weight, None, self.eps, residual, residual_in_fp32)
        gate = wide(g).sigmoid() if self.activation == "sigmoid" else F.silu(wide(g))
        y = (y * gate).to(x.dtype)
        return (y, kept) if prenorm else y
