"""DeltaNet with a short causal FIR branch: exact local detail beside the memory of the delta rule.

A memory of fixed size blurs what was said a few tokens ago. A finite impulse response filter over the values, a few
taps for each channel of each head, keeps it; the token chooses a head's share of the two:

    S_t = S_{t-1} + k_t beta_t (v_t - S_{t-1}^T k_t)^T        d_t = S_t^T q_t
    f_t = sum over i < W of h_i * v_{t-i}                     o_t = norm((1 - g_t) d_t + g_t f_t)

The filter starts as the identity (h_0 = 1) and g_t = sigmoid(W_f x_t + b).

Sources: chunkwise delta rule, arXiv 2406.06484; short filters beside a linear memory, arXiv 2212.14052 (the shift state
space model) and 2302.10866 (short explicit filters); gated sums of paths, arXiv 1505.00387.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 32
FLA_DEVICE = "cuda"
"""Where fla's Triton kernels run."""
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1.0, "identity": lambda x: x}
FIR_TAPS = 8
KEY_NORMS = {
    "l2": lambda x: x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6),
    "sum": lambda x: F.normalize(x, p=1.0, dim=-1, eps=1e-6),
}


def chunked_delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor) -> Tensor:
    """Run the delta rule over the whole sequence; returns o_BTHV in the dtype of the arguments (float32 or wider).

    Cost is linear in T: inside a chunk of C = 32 tokens everything is a batched matrix product, between chunks only S
    is handed on. T need not be a multiple of C: padding with beta = 0 writes nothing.
    Source: arXiv 2406.06484, section 3.
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

    # Token i of a chunk must subtract what tokens j < i of the same chunk wrote along its key: a unit lower-triangular
    # system. Solving it by substitution is exact at any beta, where a series for the inverse would cancel badly.
    # unitriangular=True reads only the part below the diagonal, so that nothing has to be masked.
    # The solution [U, W] says: a chunk that starts with memory S writes its keys with the values U - W S.
    overlap_MCC = torch.bmm(writes[..., value_dim:], k_MKC)
    solved = torch.linalg.solve_triangular(overlap_MCC, writes, upper=False, unitriangular=True)

    # Between chunks: S' = S + K^T (U - W S) = K^T U + (1 - K^T W) S. Both products are computed for all chunks at once,
    # so that the only sequential work is one small product a chunk.
    carried = rearrange(torch.bmm(k_MKC, solved), "(a n) k d -> a n k d", a=batch * heads)
    write_ANKV, erase_ANKK = carried.split([value_dim, key_dim], dim=-1)
    keep_ANKK = torch.eye(key_dim, dtype=q_MCK.dtype, device=q_MCK.device) - erase_ANKK
    states = [torch.zeros_like(write_ANKV[:, 0])]
    for write, keep in zip(write_ANKV.unbind(1)[:-1], keep_ANKK.unbind(1)[:-1], strict=True):
        states.append(torch.baddbmm(write, keep, states[-1]))
    state_MKV = torch.stack(states, dim=1).flatten(0, 1)

    # With P = tril(Q K^T): O = Q S + P (U - W S) = P U + (Q - P W) S.
    causal_CC = torch.ones(CHUNK, CHUNK, dtype=q_MCK.dtype, device=q_MCK.device).tril()
    within_MCC = torch.bmm(q_MCK, k_MKC) * causal_CC
    local_MCV, correction_MCK = torch.bmm(within_MCC, solved).split([value_dim, key_dim], dim=-1)
    o_MCV = torch.baddbmm(local_MCV, q_MCK - correction_MCK, state_MKV)
    return rearrange(o_MCV, "(b h n) c v -> b (n c) h v", b=batch, h=heads)[:, :length]


def runs_fla(q_BTHK: Tensor, v_BTHV: Tensor) -> bool:
    """Whether fla's kernel takes these: 16-bit values on a CUDA device, heads of 16 to 256 channels."""
    widths = (q_BTHK.shape[-1], v_BTHV.shape[-1])
    half = v_BTHV.dtype in (torch.bfloat16, torch.float16)
    return v_BTHV.device.type == FLA_DEVICE and half and min(widths) >= 16 and max(widths) <= 256


def fla_delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor) -> Tensor:
    """The same by fla's Triton kernel, in the dtype of v."""
    from fla.ops.delta_rule import chunk_delta_rule  # without a GPU this import is slow and its kernels fail

    q_BTHK, k_BTHK = q_BTHK.to(v_BTHV.dtype), k_BTHK.to(v_BTHV.dtype)
    return chunk_delta_rule(q_BTHK, k_BTHK, v_BTHV, beta_BTH, scale=1.0)[0]


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
    """DeltaNet's token mixer (arXiv 2406.06484) with a gated causal filter over the values beside the memory.

    Args:
        mode: name of the kernel that the block asks for; there is one kernel here, chunkwise with 32 tokens a chunk.
        d_model, hidden_size: width of the input and output; d_model wins where both are given.
        expand_k, expand_v: width of all keys and of all values as a multiple of hidden_size.
        num_heads: heads; must divide both widths.
        use_beta: a learnt write strength in (0, 1) for each token and head; else every write is a full one.
        use_gate: multiply the normalised output by SiLU of a projection of the input.
        use_short_conv, conv_size, conv_bias: the causal convolution behind the q, k and v projections.
        allow_neg_eigval: write strength in (0, 2), so that a state can also flip its sign (arXiv 2411.12537).
        layer_idx: which layer of the model this is; kept for inspection.
        qk_activation: 'silu', 'relu', 'elu' (ELU + 1) or 'identity'; qk_norm: 'l2' or 'sum' (of magnitudes).
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
        self.use_beta, self.use_gate, self.allow_neg_eigval = use_beta, use_gate, allow_neg_eigval
        self.use_short_conv, self.layer_idx = use_short_conv, layer_idx
        self.activation, self.key_norm = ACTIVATIONS[qk_activation], KEY_NORMS[qk_norm]

        # q, k and v side by side: one product and one convolution for all three.
        self.qkv_dims = [2 * key_dim, value_dim]
        self.qkv_proj = nn.Linear(hidden_size, sum(self.qkv_dims), bias=False)
        if use_short_conv:
            self.qkv_conv = ShortConv(sum(self.qkv_dims), conv_size, conv_bias)
        if use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        # Taps from the oldest token to the newest; the newest alone is on at first.
        taps = torch.zeros(value_dim, FIR_TAPS)
        taps[:, -1] = 1.0
        self.taps = nn.Parameter(taps)
        self.f_proj = nn.Linear(hidden_size, num_heads)
        if use_gate:
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
        share_BTH = self.f_proj(x_BTD)

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
            if attention_mask is not None:
                token_BT1 = attention_mask[..., None].to(dtype)
                # Values of padding are not zero where the convolution has a bias.
                beta_BTH, v_BTHV = beta_BTH * token_BT1, v_BTHV * token_BT1[..., None].to(v_BTHV.dtype)
            if runs_fla(q_BTHK, v_BTHV):
                read_BTHV = fla_delta_rule(q_BTHK, k_BTHK, v_BTHV, beta_BTH).to(dtype)
            else:
                read_BTHV = chunked_delta_rule(q_BTHK, k_BTHK, v_BTHV.to(dtype), beta_BTH)
            v_BDT = F.pad(rearrange(v_BTHV.to(dtype), "b t h v -> b (h v) t"), (FIR_TAPS - 1, 0))
            f_BDT = F.conv1d(v_BDT, self.taps.to(dtype)[:, None], groups=self.taps.shape[0])
            f_BTHV = rearrange(f_BDT, "b (h v) t -> b t h v", h=self.num_heads)
            share_BTH1 = share_BTH.to(dtype).sigmoid()[..., None]
            o_BTHV = self.o_norm(torch.lerp(read_BTHV, f_BTHV, share_BTH1))

        o_BTV = rearrange(o_BTHV, "b t h v -> b t (h v)").to(x_BTD.dtype)
        if self.use_gate:
            o_BTV = o_BTV * F.silu(self.g_proj(x_BTD))
        return self.o_proj(o_BTV), None, past_key_values
