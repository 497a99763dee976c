"""The two recurrences behind the stand-ins, in chunks: work linear in the length, arithmetic in float32 or wider.

Per head, with a state S [K, V], a log decay g_t (a number, or one a channel of K; none is 0) and queries scaled:

    decayed:  S_t = exp(g_t) S_{t-1} + k_t v_t^T                                   o_t = S_t^T q_t
    delta:    S_t = P + beta_t k_t (v_t - P^T k_t)^T  with  P = exp(g_t) S_{t-1}    o_t = S_t^T q_t

Inside a chunk every decay between two tokens is exp of a difference of running sums that is at most 0 where g is, so
nothing overflows however strong a decay is. Padding writes nothing: k, v, beta and g are 0 there.
Sources: the chunkwise form of gated linear attention, arXiv 2312.06635; of the (gated) delta rule, arXiv 2406.06484 and
2412.06464.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

__all__ = ["decayed", "delta"]

CHUNK, NARROW = 64, 16
"""Tokens of a chunk; NARROW where every channel has its own decay: that takes a number a channel and pair of tokens."""


def decayed(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g: Tensor | None, scale: float, state_BHKV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(o_BTHV in the dtype of v, the last state).

    Args:
        g: [B, T, H], [B, T, H, K], or None.
        state_BHKV: before the first token; None: zeros.
    """
    by_channel = g is not None and g.dim() == 4
    size = NARROW if by_channel else CHUNK
    with torch.autocast(q_BTHK.device.type, enabled=False):
        q, k, v, g = _promoted(q_BTHK, k_BTHK, v_BTHV, g)
        q, k, v = (_chunks(x, size) for x in (q * scale, k, v))
        decay, between = _decays(g, size)
        if by_channel:
            # [.., C, C, K]: the weight of token j for token i in each channel, so no exponent is ever split.
            scores = torch.einsum("bhnik,bhnjk,bhnijk->bhnij", q, k, between)
        else:
            scores = (q @ k.transpose(-1, -2)) * _causal(between, q, size)
        local = scores @ v
        asked, kept, written = _carried(q, k, decay)
        writes = written.transpose(-1, -2) @ v
        state = _start(state_BHKV, k, v)
        states = []
        for number in range(q.shape[2]):
            states.append(state)
            state = writes[:, :, number] + (state if kept is None else kept[:, :, number] * state)
        o = local + asked @ torch.stack(states, dim=2)
        return _tokens(o, v_BTHV), state


def delta(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g_BTH: Tensor | None,
    scale: float,
    state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(o_BTHV in the dtype of v, the last state). Arguments as in `decayed`."""
    with torch.autocast(q_BTHK.device.type, enabled=False):
        q, k, v, beta, g = _promoted(q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None], g_BTH)
        q, k, v, beta = (_chunks(x, CHUNK) for x in (q * scale, k, v, beta))
        decay, between = _decays(g, CHUNK)
        within = _causal(between, q, CHUNK)
        asked, kept, written = _carried(q, k, decay)
        # What token i writes is its value less what it reads, which earlier tokens of the chunk wrote as well: a unit
        # lower-triangular system. Solved for the values and for the keys, a chunk writes values - keys S.
        read = k if decay is None else k * decay.exp()
        sides = torch.cat([beta * v, beta * read], dim=-1)
        overlap = beta * (k @ k.transpose(-1, -2)) * within
        solved = torch.linalg.solve_triangular(overlap.tril(-1), sides, upper=False, unitriangular=True)
        values, keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        scores = (q @ k.transpose(-1, -2)) * within
        state = _start(state_BHKV, k, v)
        parts = []
        for number in range(q.shape[2]):
            new = values[:, :, number] - keys[:, :, number] @ state
            parts.append(asked[:, :, number] @ state + scores[:, :, number] @ new)
            held = state if kept is None else kept[:, :, number] * state
            state = torch.baddbmm(
                held.flatten(0, 1), written[:, :, number].flatten(0, 1).transpose(1, 2), new.flatten(0, 1)
            ).view_as(state)
        return _tokens(torch.stack(parts, dim=2), v_BTHV), state


def _promoted(*values: Any) -> list[Any]:
    """All in float64 where one of them is, else in float32; None stays None."""
    double = any(x is not None and x.dtype == torch.float64 for x in values)
    return [x if x is None else x.to(torch.float64 if double else torch.float32) for x in values]


def _chunks(x_BTHD: Tensor, size: int) -> Tensor:
    """[B, H, N, C, D], padded with zeros to whole chunks."""
    padded = F.pad(x_BTHD, (0, 0, 0, 0, 0, -x_BTHD.shape[1] % size))
    return rearrange(padded, "b (n c) h d -> b h n c d", c=size)


def _tokens(o: Tensor, like_BTHV: Tensor) -> Tensor:
    return rearrange(o, "b h n c d -> b (n c) h d")[:, : like_BTHV.shape[1]].to(like_BTHV.dtype)


def _decays(g: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Running sums of g in each chunk [.., C, 1 or K], and the decay from token j to token i, 0 where j is later:
    [.., C, C], by channel [.., C, C, K]."""
    if g is None:
        return None, None
    running = _chunks(g if g.dim() == 4 else g[..., None], size).cumsum(dim=3)
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).triu(1)
    gaps = running[..., :, None, :] - running[..., None, :, :]
    between = gaps.masked_fill(later[..., None], -torch.inf).exp()
    return running, between if g.dim() == 4 else between.squeeze(-1)


def _causal(between: Tensor | None, like: Tensor, size: int) -> Tensor:
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril() if between is None else between


def _carried(q: Tensor, k: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Queries as they read the state before the chunk; what is kept of that state [.., K or 1, 1] (None: all); keys as
    they stand in the state after the chunk."""
    if decay is None:
        return q, None, k
    last = decay[..., -1:, :]
    return q * decay.exp(), last.exp().transpose(-1, -2), k * (last - decay).exp()


def _start(state_BHKV: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    if state_BHKV is not None:
        return state_BHKV.to(k.dtype)
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
