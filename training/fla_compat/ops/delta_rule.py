"""The delta rule: stand-ins for fla.ops.delta_rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.fla_compat.modules.l2norm import l2norm
from training.fla_compat.ops.arguments import finished, scale_of, unmet
from training.fla_compat.ops.recurrence import delta

__all__ = ["chunk_delta_rule", "fused_recurrent_delta_rule"]


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """(o [B, T, H, V], state [B, H, K, V] or None) of q, k [B, T, H, K], v [B, T, H, V] and beta [B, T, H].

    The kernel takes 16-bit values only; here every dtype will do.

    Raises:
        ValueError: beta has another shape; cu_seqlens, or another argument that only the kernels know.
    """
    unmet(cu_seqlens=cu_seqlens, **kwargs)
    if beta.shape != k.shape[:3]:
        raise ValueError(f"expected beta of shape {list(k.shape[:3])}, got {list(beta.shape)}")
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    o, state = delta(q, k, v, beta, None, scale_of(scale, k), initial_state)
    return o, finished(state, output_final_state, False)


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_delta_rule`; beta None is 1."""
    beta = torch.ones_like(q[..., 0]) if beta is None else beta
    return chunk_delta_rule(
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, **kwargs
    )
