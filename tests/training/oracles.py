"""Slow step-by-step definitions that the chunkwise kernels are compared with: token after token, head by head.

They are written from the equations of the papers alone and share no code with the programs that they test.
Use float64.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "FLA_OPS",
    "delta_product",
    "delta_rule",
    "depthwise_conv",
    "diagonal",
    "gated_delta_rule",
    "kimi_delta",
    "low_rank_transition",
    "recurrence",
    "rms",
    "rotary",
    "softmax_attention",
]

FLA_OPS = Path(str(importlib.metadata.distribution("fla-core").locate_file("fla/ops")))
"""fla's sources, to be read without importing fla: whatever stands in sys.modules under its name."""


def gated_delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor, log_decay_BTH: Tensor) -> Tensor:
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t (arXiv 2412.06464)."""
    batch, length, heads, key_dim = k_BTHK.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            state_KV = torch.zeros(key_dim, v_BTHV.shape[-1], dtype=v_BTHV.dtype)
            for t in range(length):
                k, v, beta = k_BTHK[b, t, h], v_BTHV[b, t, h], beta_BTH[b, t, h]
                transition_KK = torch.eye(key_dim, dtype=k.dtype) - beta * torch.outer(k, k)
                state_KV = log_decay_BTH[b, t, h].exp() * (transition_KK @ state_KV) + beta * torch.outer(k, v)
                rows.append(q_BTHK[b, t, h] @ state_KV)
    return torch.stack(rows).reshape(batch, heads, length, -1).transpose(1, 2)


def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor) -> Tensor:
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t (arXiv 2406.06484)."""
    return gated_delta_rule(q_BTHK, k_BTHK, v_BTHV, beta_BTH, torch.zeros_like(beta_BTH))


def recurrence(q_BTHK: Tensor, transition_BTHKK: Tensor, write_BTHKV: Tensor) -> Tensor:
    """S_t = M_t S_{t-1} + W_t from S_0 = 0, o_t = S_t^T q_t: every linear memory, one token after another."""
    state_BHKV = torch.zeros_like(write_BTHKV[:, 0])
    rows = []
    for t in range(q_BTHK.shape[1]):
        state_BHKV = transition_BTHKK[:, t] @ state_BHKV + write_BTHKV[:, t]
        rows.append((q_BTHK[:, t, :, None, :] @ state_BHKV)[:, :, 0])
    return torch.stack(rows, dim=1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]


def diagonal(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_BTHK: Tensor) -> Tensor:
    """S_t = Diag(a_t) S_{t-1} + k_t v_t^T (arXiv 2312.06635); equal decays of a head give arXiv 2307.08621, 2405.21060,
    none gives arXiv 2006.16236."""
    return recurrence(q_BTHK, torch.diag_embed(log_decay_BTHK.exp()), _outer(k_BTHK, v_BTHV))


def kimi_delta(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor, log_decay_BTHK: Tensor) -> Tensor:
    """S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T (arXiv 2510.26692)."""
    beta = beta_BTH[..., None, None]
    erase_BTHKK = torch.eye(k_BTHK.shape[-1], dtype=k_BTHK.dtype) - beta * _outer(k_BTHK, k_BTHK)
    return recurrence(q_BTHK, erase_BTHKK @ torch.diag_embed(log_decay_BTHK.exp()), beta * _outer(k_BTHK, v_BTHV))


def delta_product(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, beta_BSH: Tensor, log_decay_BTH: Tensor) -> Tensor:
    """S_t = a_t S_{t-1}, then S_t = (I - beta k k^T) S_t + beta k v^T for each of the S / T steps of token t, in order
    (arXiv 2502.10297)."""
    length, key_dim = q_BTHK.shape[1], k_BSHK.shape[-1]
    k, v, beta = (x.unflatten(1, (length, -1)) for x in (k_BSHK, v_BSHV, beta_BSH[..., None, None]))
    transition = torch.eye(key_dim, dtype=k.dtype) * log_decay_BTH.exp()[..., None, None]
    write = torch.zeros_like(_outer(k[:, :, 0], v[:, :, 0]))
    for step in range(k.shape[2]):
        erase = torch.eye(key_dim, dtype=k.dtype) - beta[:, :, step] * _outer(k[:, :, step], k[:, :, step])
        transition, write = erase @ transition, erase @ write + beta[:, :, step] * _outer(k[:, :, step], v[:, :, step])
    return recurrence(q_BTHK, transition, write)


def low_rank_transition(
    r_BTHK: Tensor, log_w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, a_BTHK: Tensor, b_BTHK: Tensor
) -> Tensor:
    """S_t = (Diag(w_t) + b_t a_t^T) S_{t-1} + k_t v_t^T (arXiv 2503.14456)."""
    transition = torch.diag_embed(log_w_BTHK.exp()) + _outer(b_BTHK, a_BTHK)
    return recurrence(r_BTHK, transition, _outer(k_BTHK, v_BTHV))


def rotary(x_BTHK: Tensor, base: float = 10_000.0) -> Tensor:
    """Channels i and i + K/2 of a token at position p = 1, 2, ... as one complex number, turned by p base^(-2i/K)."""
    length, half = x_BTHK.shape[1], x_BTHK.shape[-1] // 2
    angle = torch.arange(1, length + 1).double()[:, None] * base ** (-torch.arange(half).double() / half)
    turned = torch.complex(x_BTHK[..., :half], x_BTHK[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def softmax_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, base: float = 10_000.0) -> Tensor:
    """Each query against each earlier key, both turned by their position (arXiv 2104.09864) as complex numbers."""
    batch, length, heads, key_dim = k_BTHK.shape
    angle_TK = torch.arange(length).double()[:, None] * base ** (-torch.arange(key_dim // 2).double() * 2 / key_dim)
    turn_TK = torch.polar(torch.ones_like(angle_TK), angle_TK)

    def turned(x_TK: Tensor) -> Tensor:
        return torch.complex(x_TK[:, : key_dim // 2], x_TK[:, key_dim // 2 :]) * turn_TK

    out = torch.zeros(batch, length, heads, v_BTHV.shape[-1], dtype=v_BTHV.dtype)
    for b in range(batch):
        for h in range(heads):
            q_TK, k_TK = turned(q_BTHK[b, :, h]), turned(k_BTHK[b, :, h])
            for t in range(length):
                scores = (q_TK[t] * k_TK[: t + 1].conj()).real.sum(dim=-1) / key_dim**0.5
                weights = scores.exp() / scores.exp().sum()
                out[b, t, h] = weights @ v_BTHV[b, : t + 1, h]
    return out


def depthwise_conv(x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """y_t = sum_i w_i x_{t - W + 1 + i} (+ bias), with zeros before the start."""
    length, width = x_BTD.shape[1], weight_DW.shape[1]
    rows = []
    for t in range(length):
        y_BD = torch.zeros_like(x_BTD[:, 0]) if bias_D is None else bias_D.expand_as(x_BTD[:, 0])
        for i in range(width):
            if t - width + 1 + i >= 0:
                y_BD = y_BD + weight_DW[:, i] * x_BTD[:, t - width + 1 + i]
        rows.append(y_BD)
    return torch.stack(rows, dim=1)


def rms(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square in the last dimension."""
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
