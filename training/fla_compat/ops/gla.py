"""Gated linear attention, with a decay for every channel of the keys: stand-ins for fla.ops.gla."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from training.fla_compat.ops.arguments import finished, scale_of, started, unmet
from training.fla_compat.ops.recurrence import decayed

__all__ = ["chunk_gla", "fused_recurrent_gla"]


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """(o [B, T, H, V], state [B, H, K, V] or None) of q, k [B, T, H, K], v [B, T, H, V] and log decays g [B, T, H, K].

    Raises:
        ValueError: g has another shape than k; cu_seqlens, or another argument that only the kernels know.
    """
    unmet(cu_seqlens=cu_seqlens, **kwargs)
    if g.shape != k.shape:
        raise ValueError(f"expected g of the shape of k, {list(k.shape)}, got {list(g.shape)}")
    o, state = decayed(q, k, v, g, scale_of(scale, k), started(initial_state, state_v_first))
    return o, finished(state, output_final_state, state_v_first)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_gla`; gk None is no decay. Raises for `gv` and `reverse` too."""
    unmet(gv=gv, reverse=reverse)
    g = k.new_zeros(k.shape) if gk is None else gk
    return chunk_gla(q, k, v, g, scale, initial_state, output_final_state, state_v_first, cu_seqlens, **kwargs)
