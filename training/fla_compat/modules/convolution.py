"""Short causal convolution: stand-in for fla.modules.convolution."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from training.fla_compat.modules.precision import wide

__all__ = ["ShortConvolution"]


class ShortConvolution(nn.Conv1d):
    """Depthwise causal convolution over the last kernel_size tokens, then SiLU unless activation is None.

    The forward pass returns (y [B, T, D], final_state): the last kernel_size inputs [B, D, kernel_size] when
    output_final_state is set, else None. Such a state goes in as `cache` to continue a sequence; when one token is
    decoded without gradients the cache is also updated in place.

    Raises:
        ValueError: another activation; cu_seqlens (packed sequences are not needed where this package is used).
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str | None = "triton",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if activation not in (None, "silu", "swish"):
            raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
        super().__init__(
            hidden_size,
            hidden_size,
            kernel_size,
            padding=kernel_size - 1,
            groups=hidden_size,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.hidden_size, self.activation, self.backend = hidden_size, activation, backend

    @property
    def state_size(self) -> int:
        """Numbers in the state of one sequence."""
        return self.hidden_size * self.kernel_size[0]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None without a CUDA device, got packed sequences: pad them instead")
        width = self.kernel_size[0]
        if mask is not None:
            x = x * mask.unsqueeze(-1).to(x.dtype)
        x_BDT = rearrange(x, "b t d -> b d t")
        seen_BDT = F.pad(x_BDT, (width, 0)) if cache is None else torch.cat([cache.to(x.dtype), x_BDT], dim=-1)
        with torch.autocast(device_type=x.device.type, enabled=False):
            seen = wide(seen_BDT[..., 1:])
            bias = None if self.bias is None else self.bias.to(seen.dtype)
            y_BDT = F.conv1d(seen, self.weight.to(seen.dtype), bias, groups=self.hidden_size)
            y = rearrange(y_BDT if self.activation is None else F.silu(y_BDT), "b d t -> b t d")
        y = (y if residual is None else y + wide(residual)).to(x.dtype)
        final_state = seen_BDT[..., -width:] if output_final_state else None
        if cache is not None and not torch.is_grad_enabled() and x.shape[1] == 1:
            cache.copy_(seen_BDT[..., -width:])
            final_state = cache if output_final_state else None
        return y, final_state

    def step(
        self,
        x: Tensor,
        residual: Tensor | None,
        cache: Tensor | None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The forward pass for one token x [B, 1, D] after the inputs in `cache`; without a cache, after nothing."""
        return self.forward(x, residual, None, cache, output_final_state, cu_seqlens)
