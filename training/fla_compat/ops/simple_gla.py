"""Linear attention with one decay a head: stand-ins for fla.ops.simple_gla."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from training.fla_compat.ops.arguments import finished, scale_of, started, unmet
from training.fla_compat.ops.recurrence import decayed

__all__ = ["chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla"]


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """(o [B, T, H, V], state [B, H, K, V] or None) of q, k [B, T, H, K] and v [B, T, H, V].

    Args:
        g: log decay [B, T, H]; g_gamma: the same at all tokens, [H]; neither: no decay.

    Raises:
        ValueError: both decays; cu_seqlens, or another argument that only the kernels know.
    """
    unmet(cu_seqlens=cu_seqlens, **kwargs)
    if g is not None and g_gamma is not None:
        raise ValueError("expected g or g_gamma, got both")
    if g_gamma is not None:
        g = g_gamma.expand(*k.shape[:3])
    o, state = decayed(q, k, v, g, scale_of(scale, k), started(initial_state, state_v_first))
    return o, finished(state, output_final_state, state_v_first)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_simple_gla`: the two differ in how the kernels go about it. Raises for `reverse` too."""
    unmet(reverse=reverse)
    return chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, **kwargs
    )


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_simple_gla`."""
    return chunk_simple_gla(q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens)
