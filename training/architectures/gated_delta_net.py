"""Gated DeltaNet: the delta rule with a data-dependent decay of the whole memory, in chunkwise parallel form.

The delta rule erases one key at a time and never forgets what is not overwritten. Here each head also scales its
state S, of shape [key_dim, value_dim], by a scalar a_t in (0, 1) that the token chooses, so that the memory can be
cleared quickly, while the delta rule still makes exact single updates:

    S_t = a_t S_{t-1} + k_t beta_t (v_t - a_t S_{t-1}^T k_t)^T        o_t = S_t^T q_t

The decay follows Mamba2: log a_t = -exp(A_log) * softplus(a_proj(x_t) + dt_bias). The normalised output is multiplied
by SiLU of a projection of the input.

Sources: Gated DeltaNet, arXiv 2412.06464; chunkwise delta rule, arXiv 2406.06484; the decay and its initialisation,
arXiv 2405.21060; negative eigenvalues by beta in (0, 2), arXiv 2411.12537.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 32
FLA_DEVICE = "cuda"
"""Where fla's Triton kernels run."""
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1.0, "identity": lambda x: x}
KEY_NORMS = {
    "l2": lambda x: x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6),
    "sum": lambda x: F.normalize(x, p=1.0, dim=-1, eps=1e-6),
}


def chunked_gated_delta_rule(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor, log_decay_BTH: Tensor
) -> Tensor:
    """Run the gated delta rule over the whole sequence; returns o_BTHV in the dtype of the arguments (>= float32).

    Cost is linear in T: inside a chunk of C = 32 tokens everything is a batched matrix product, between chunks only S
    is handed on. T need not be a multiple of C: padding with beta = 0 and log decay 0 changes nothing.
    Source: arXiv 2412.06464, section 3.
    """
    batch, length, heads, key_dim = k_BTHK.shape
    value_dim = v_BTHV.shape[-1]

    def chunks(x_BTHD: Tensor) -> Tensor:
        padded = F.pad(x_BTHD, (0, 0, 0, 0, 0, -length % CHUNK)) if length % CHUNK else x_BTHD
        return rearrange(padded, "b (n c) h d -> (b h n) c d", c=CHUNK).contiguous()

    # M = B * H * N: every chunk of every head is one matrix of a batch.
    writes = chunks(torch.cat([v_BTHV, k_BTHK], dim=-1) * beta_BTH[..., None])
    q_MCK, k_MCK = chunks(q_BTHK), chunks(k_BTHK)
    k_MKC = k_MCK.transpose(1, 2)

    # since[i, j]: how much is left at token i of what was written at token j of the same chunk; 0 where j comes later.
    # Masked before exp, because the decay from a later to an earlier token could overflow. All exponents are <= 0.
    total_MC1 = chunks(log_decay_BTH[..., None]).cumsum(dim=1)
    later_CC = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q_MCK.device).triu(1)
    since_MCC = (total_MC1 - total_MC1.transpose(1, 2)).masked_fill(later_CC, -torch.inf).exp()
    since_start_MC1, until_end_M1C = total_MC1.exp(), since_MCC[:, -1:]

    # Token i of a chunk must subtract what is left of the writes of tokens j < i along its key: a unit lower-triangular
    # system. Solving it by substitution is exact at any beta, where a series for the inverse would cancel badly.
    # unitriangular=True reads only the part below the diagonal.
    # The solution [U, W] says: a chunk that starts with memory S writes its keys with the values U - W S.
    write_v_MCV, write_k_MCK = writes.split([value_dim, key_dim], dim=-1)
    overlap_MCC = torch.bmm(write_k_MCK, k_MKC) * since_MCC
    right = torch.cat([write_v_MCV, write_k_MCK * since_start_MC1], dim=-1)
    solved = torch.linalg.solve_triangular(overlap_MCC, right, upper=False, unitriangular=True)

    # Between chunks, with a the decay of the whole chunk and K' the keys decayed to its end:
    # S' = a S + K'^T (U - W S) = K'^T U + (a - K'^T W) S. Both products are computed for all chunks at once, so that
    # the only sequential work is one small product a chunk.
    carried = rearrange(torch.bmm(k_MKC * until_end_M1C, solved), "(a n) k d -> a n k d", a=batch * heads)
    write_ANKV, erase_ANKK = carried.split([value_dim, key_dim], dim=-1)
    whole_AN11 = rearrange(since_start_MC1[:, -1:], "(a n) 1 1 -> a n 1 1", a=batch * heads)
    keep_ANKK = torch.eye(key_dim, dtype=q_MCK.dtype, device=q_MCK.device) * whole_AN11 - erase_ANKK
    states = [torch.zeros_like(write_ANKV[:, 0])]
    for write, keep in zip(write_ANKV.unbind(1)[:-1], keep_ANKK.unbind(1)[:-1], strict=True):
        states.append(torch.baddbmm(write, keep, states[-1]))
    state_MKV = torch.stack(states, dim=1).flatten(0, 1)

    # With Q' the queries decayed from the start and P = (Q K^T) * since: O = Q' S + P (U - W S) = P U + (Q' - P W) S.
    within_MCC = torch.bmm(q_MCK, k_MKC) * since_MCC
    local_MCV, correction_MCK = torch.bmm(within_MCC, solved).split([value_dim, key_dim], dim=-1)
    o_MCV = torch.baddbmm(local_MCV, q_MCK * since_start_MC1 - correction_MCK, state_MKV)
    return rearrange(o_MCV, "(b h n) c v -> b (n c) h v", b=batch, h=heads)[:, :length]


def runs_fla(q_BTHK: Tensor, v_BTHV: Tensor) -> bool:
    """Whether fla's kernel takes these: 16-bit values on a CUDA device, heads of 16 to 256 channels."""
    widths = (q_BTHK.shape[-1], v_BTHV.shape[-1])
    half = v_BTHV.dtype in (torch.bfloat16, torch.float16)
    return v_BTHV.device.type == FLA_DEVICE and half and min(widths) >= 16 and max(widths) <= 256


def fla_gated_delta_rule(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor, log_decay_BTH: Tensor
) -> Tensor:
    """The same by fla's Triton kernel, in the dtype of v."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # without a GPU this is slow and its kernels fail

    q_BTHK, k_BTHK = q_BTHK.to(v_BTHV.dtype), k_BTHK.to(v_BTHV.dtype)
    return chunk_gated_delta_rule(q_BTHK, k_BTHK, v_BTHV, g=log_decay_BTH, beta=beta_BTH, scale=1.0)[0]


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 or wider (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


class ShortConv(nn.Conv1d):
    """Depthwise convolution over the last `width` tokens, x_BTD -> y_BTD: position t sees t - width + 1 ... t only."""

    def __init__(self, dim: int, width: int, bias: bool) -> None:
        super().__init__(dim, dim, kernel_size=width, groups=dim, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BDT = F.pad(rearrange(x_BTD, "b t d -> b d t"), (self.kernel_size[0] - 1, 0))
        return rearrange(super().forward(x_BDT), "b d t -> b t d")


class DeltaNet(nn.Module):
    """The Gated DeltaNet token mixer (arXiv 2412.06464): DeltaNet with a scalar decay a head and a gated output.

    Args:
        mode: name of the kernel that the block asks for; there is one kernel here, chunkwise with 32 tokens a chunk.
        d_model, hidden_size: width of the input and output; d_model wins where both are given.
        expand_k, expand_v: width of all keys and of all values as a multiple of hidden_size.
        num_heads: heads; must divide both widths.
        use_beta: a learnt write strength in (0, 1) for each token and head; else every write is a full one.
        use_gate: accepted and without effect: the gated output is part of this architecture.
        use_short_conv, conv_size, conv_bias: the causal convolution behind the q, k and v projections.
        allow_neg_eigval: write strength in (0, 2), so that a state can also flip its sign (arXiv 2411.12537).
        layer_idx: which layer of the model this is; kept for inspection.
        qk_activation: 'silu', 'relu', 'elu' (ELU + 1) or 'identity'; qk_norm: 'l2' or 'sum' (of
            magnitudes: activations that can be negative must not divide by a sum near zero).
        norm_eps: epsilon of the output norm.
        **kwargs: what blocks pass to other mixers; `use_output_norm=False` drops the output norm, others do nothing.

    Raises:
        ValueError: for arguments that cannot be met, with what was expected and what came.
    """

    def __init__(
        self,
        mode: str = "chunk1",
        d_model: int | None = None,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        hidden_size = hidden_size if d_model is None else d_model
        key_dim, value_dim = int(hidden_size * expand_k), int(hidden_size * expand_v)
        if num_heads < 1 or min(key_dim, value_dim) < 1 or key_dim % num_heads or value_dim % num_heads:
            raise ValueError(
                f"num_heads must divide the key and value widths {key_dim} and {value_dim}, got {num_heads}"
            )
        if qk_activation not in ACTIVATIONS:
            raise ValueError(f"qk_activation must be one of {sorted(ACTIVATIONS)}, got {qk_activation!r}")
        if qk_norm not in KEY_NORMS:
            raise ValueError(f"qk_norm must be one of {sorted(KEY_NORMS)}, got {qk_norm!r}")
        if use_short_conv and conv_size < 1:
            raise ValueError(f"conv_size must be at least 1, got {conv_size}")

        self.mode = mode
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_k_dim, self.head_v_dim = key_dim // num_heads, value_dim // num_heads
        self.use_beta, self.use_short_conv = use_beta, use_short_conv
        self.allow_neg_eigval = allow_neg_eigval
        self.layer_idx = layer_idx
        self.activation, self.key_norm = ACTIVATIONS[qk_activation], KEY_NORMS[qk_norm]

        # q, k and v side by side: one product and one convolution for all three is a seventh faster on CPU.
        self.qkv_dims = [2 * key_dim, value_dim]
        self.qkv_proj = nn.Linear(hidden_size, sum(self.qkv_dims), bias=False)
        if use_short_conv:
            self.qkv_conv = ShortConv(sum(self.qkv_dims), conv_size, conv_bias)
        if use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)
        # Mamba2's start: rates spread over (1, 16), steps log-uniform in (0.001, 0.1), so that heads begin with
        # memories of one token to about a thousand. dt_bias is the inverse of softplus at the step.
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1.0, 16.0).log())
        step = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.o_norm = RMSNorm(self.head_v_dim, norm_eps) if kwargs.get("use_output_norm", True) else nn.Identity()
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """Mix the tokens of hidden_states [B, T, hidden_size]; returns (o [B, T, hidden_size], None, past_key_values).

        attention_mask: optional [B, T], 1 for a token and 0 for padding on either side. Padding writes
        nothing and forgets nothing; its own output is meaningless. There is no decoding cache: past_key_values is
        handed back as it came, use_cache has no effect, and there are no attention weights for output_attentions.

        Raises:
            ValueError: the mask is not [B, T].
        """
        x_BTD = hidden_states
        if attention_mask is not None:
            if attention_mask.shape != x_BTD.shape[:2]:
                raise ValueError(
                    f"attention_mask must be [B, T] = {list(x_BTD.shape[:2])}, got {list(attention_mask.shape)}"
                )
            # Zeros also keep the convolutions of the first real tokens clean when the padding is on the left.
            x_BTD = x_BTD * attention_mask[..., None].to(x_BTD.dtype)

        qkv = self.qkv_proj(x_BTD)
        if self.use_short_conv:
            qkv = self.qkv_conv(qkv)
        qk, v = qkv.split(self.qkv_dims, dim=-1)
        qk_2BTHK = rearrange(self.activation(qk), "b t (s h k) -> s b t h k", s=2, h=self.num_heads)
        v_BTHV = rearrange(F.silu(v), "b t (h v) -> b t h v", h=self.num_heads)
        beta_BTH = self.b_proj(x_BTD) if self.use_beta else None
        a_BTH = self.a_proj(x_BTD)

        # The recurrence accumulates over the whole sequence: 16-bit inputs are widened, autocast stays outside.
        dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        with torch.autocast(device_type=x_BTD.device.type, enabled=False):
            q_BTHK, k_BTHK = self.key_norm(qk_2BTHK.to(dtype)).unbind(0)
            if beta_BTH is None:
                beta_BTH = x_BTD.new_ones(*x_BTD.shape[:2], self.num_heads, dtype=dtype)
            else:
                beta_BTH = beta_BTH.to(dtype).sigmoid()
            if self.allow_neg_eigval:
                beta_BTH = beta_BTH * 2.0
            log_decay_BTH = -self.A_log.to(dtype).exp() * F.softplus(a_BTH.to(dtype) + self.dt_bias.to(dtype))
            if attention_mask is not None:
                token_BT1 = attention_mask[..., None].to(dtype)
                beta_BTH, log_decay_BTH = beta_BTH * token_BT1, log_decay_BTH * token_BT1
            if runs_fla(q_BTHK, v_BTHV):
                o_BTHV = self.o_norm(fla_gated_delta_rule(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay_BTH))
            else:
                o_BTHV = self.o_norm(
                    chunked_gated_delta_rule(q_BTHK, k_BTHK, v_BTHV.to(dtype), beta_BTH, log_decay_BTH)
                )

        o_BTV = rearrange(o_BTHV, "b t h v -> b t (h v)").to(x_BTD.dtype)
        return self.o_proj(o_BTV * F.silu(self.g_proj(x_BTD))), None, past_key_values
