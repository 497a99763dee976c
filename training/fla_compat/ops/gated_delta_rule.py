"""The delta rule with one decay a head: stand-ins for fla.ops.gated_delta_rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.fla_compat.modules.l2norm import l2norm
from training.fla_compat.modules.precision import wide
from training.fla_compat.ops.arguments import finished, scale_of, started, unmet
from training.fla_compat.ops.recurrence import delta

__all__ = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """(o [B, T, HV, V], state [B, HV, K, V] or None) of q, k [B, T, H, K], v [B, T, HV, V], g and beta [B, T, HV].

    Args:
        g: log decay; with use_gate_in_kernel what -exp(A_log) softplus(g + dt_bias) makes one of.
        beta: with use_beta_sigmoid_in_kernel before the sigmoid, which allow_neg_eigval doubles.

    Raises:
        ValueError: HV is no multiple of H; A_log is missing; allow_neg_eigval without use_beta_sigmoid_in_kernel;
            cu_seqlens, or another argument that only the kernels know.
    """
    unmet(cu_seqlens=cu_seqlens, **kwargs)
    if v.shape[2] % k.shape[2] or q.shape[2] != k.shape[2]:
        heads = [x.shape[2] for x in (q, k, v)]
        raise ValueError(f"expected as many heads of q as of k, and a multiple of them of v, got {heads}")
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval needs use_beta_sigmoid_in_kernel=True")
    if use_gate_in_kernel:
        if A_log is None:
            raise ValueError("use_gate_in_kernel needs A_log")
        g = -wide(A_log).exp() * F.softplus(wide(g) if dt_bias is None else wide(g) + wide(dt_bias))
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    groups = v.shape[2] // k.shape[2]
    if groups > 1:
        q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    o, state = delta(q, k, v, beta, g, scale_of(scale, k), started(initial_state, state_v_first))
    return o, finished(state, output_final_state, state_v_first)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_gated_delta_rule`; g None is no decay, beta None is 1. Raises for `gk` and `gv` too."""
    unmet(gk=gk, gv=gv)
    ones = torch.ones_like(v[..., 0])
    return chunk_gated_delta_rule(
        q,
        k,
        v,
        torch.zeros_like(ones) if g is None else g,
        ones if beta is None else beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        **kwargs,
    )
