"""Linear attention without decay: stand-ins for fla.ops.linear_attn."""

from __future__ import annotations

import torch
from torch import Tensor

from training.fla_compat.modules.precision import wide
from training.fla_compat.ops.arguments import scale_of, unmet
from training.fla_compat.ops.simple_gla import chunk_simple_gla

__all__ = ["chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"]

State = Tensor | tuple[Tensor | None, Tensor] | None


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """(o [B, T, H, V], state) of q, k [B, T, H, K] and v [B, T, H, V].

    Args:
        normalize: divides o by scale q . (k_1 + ... + k_t). The state, given and returned, is then a pair of
            [B, H, K, V] (None where not asked for) and the sum of the keys, [B, 1, H, K].

    Raises:
        ValueError: cu_seqlens is set.
    """
    memory, keys = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    o, state = chunk_simple_gla(
        q,
        k,
        v,
        scale=scale,
        initial_state=memory,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    if not normalize:
        return o, state
    with torch.autocast(q.device.type, enabled=False):
        total = wide(k).cumsum(dim=1) if keys is None else wide(k).cumsum(dim=1) + keys
        size = (wide(q) * scale_of(scale, k) * total).sum(dim=-1, keepdim=True) + 1e-10
        return (wide(o) / size).to(o.dtype), (state, total[:, -1:])


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """As `chunk_linear_attn`, but not normalised unless told. Raises for `reverse` too."""
    unmet(reverse=reverse)
    return chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


fused_chunk_linear_attn = chunk_linear_attn
