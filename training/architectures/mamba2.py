"""Mamba2's selective state space in the dual form (SSD), in chunkwise parallel form.

A head is a linear system whose state S, of shape [state_dim, value_dim], forgets by a scalar that the token chooses.
The step size d_t sets both what is forgotten and how strongly the token is written; the input map B_t and the read-out
C_t play the part of key and query, and all heads share them:

    S_t = exp(-exp(A_log) d_t) S_{t-1} + B_t (d_t x_t)^T        y_t = S_t^T C_t + D x_t        d_t = softplus(W x_t + b)

The output is y multiplied by SiLU of a projection of the input, and then normalised over all channels.

Source: Mamba2, arXiv 2405.21060: the recurrence (section 2), the block form (section 6), the layer (section 7).
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


def chunked_ssd(c_BTK: Tensor, b_BTK: Tensor, x_BTHV: Tensor, log_decay_BTH: Tensor) -> Tensor:
    """y_t = sum over i <= t of x_i (b_i . c_t) times the decay since i; returns y_BTHV in the dtype of the arguments.

    Cost is linear in T: inside a chunk of C = 32 tokens everything is a batched matrix product, between chunks only
    the states are handed on. T need not be a multiple of C: padding with x = 0 and log decay 0 changes nothing.
    Source: arXiv 2405.21060, section 6.
    """
    length = x_BTHV.shape[1]

    def chunks(x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, N, C, ...]."""
        padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -length % CHUNK)) if length % CHUNK else x
        return padded.unflatten(1, (-1, CHUNK))

    c_BNCK, b_BNCK = chunks(c_BTK), chunks(b_BTK)
    x_BNHCV = rearrange(chunks(x_BTHV), "b n c h v -> b n h c v")
    total_BNHC1 = rearrange(chunks(log_decay_BTH), "b n c h -> b n h c 1").cumsum(dim=-2)

    # since[i, j]: how much is left at token i of what was written at token j of the same chunk; 0 where j comes later.
    # Masked before exp, because the decay from a later to an earlier token could overflow. All exponents are <= 0.
    later_CC = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x_BTHV.device).triu(1)
    since_BNHCC = (total_BNHC1 - total_BNHC1.transpose(-1, -2)).masked_fill(later_CC, -torch.inf).exp()
    since_start_BNHC1, until_end_BNHC1 = total_BNHC1.exp(), since_BNHCC[..., -1:, :].transpose(-1, -2)

    # Between chunks, with a the decay of the whole chunk and X' the inputs decayed to its end: S' = a S + B^T X'.
    write_BNHKV = b_BNCK[:, :, None].transpose(-1, -2) @ (x_BNHCV * until_end_BNHC1)
    keep_BNH11 = since_start_BNHC1[..., -1:, :]
    states = [torch.zeros_like(write_BNHKV[:, 0])]
    for write, keep in zip(write_BNHKV.unbind(1)[:-1], keep_BNH11.unbind(1)[:-1], strict=True):
        states.append(torch.addcmul(write, keep, states[-1]))
    state_BNHKV = torch.stack(states, dim=1)

    # Y = ((C B^T) * since) X + C S decayed from the start; C B^T is the same for all heads.
    within_BNHCC = (c_BNCK @ b_BNCK.transpose(-1, -2))[:, :, None] * since_BNHCC
    y_BNHCV = within_BNHCC @ x_BNHCV + (c_BNCK[:, :, None] @ state_BNHKV) * since_start_BNHC1
    return rearrange(y_BNHCV, "b n h c v -> b (n c) h v")[:, :length]


def runs_fla(c_BTK: Tensor, x_BTHV: Tensor) -> bool:
    """Whether fla's kernel takes these: 16-bit values on a CUDA device, heads of 16 to 256 channels."""
    widths = (c_BTK.shape[-1], x_BTHV.shape[-1])
    half = x_BTHV.dtype in (torch.bfloat16, torch.float16)
    return x_BTHV.device.type == FLA_DEVICE and half and min(widths) >= 16 and max(widths) <= 256


def fla_ssd(c_BTK: Tensor, b_BTK: Tensor, x_BTHV: Tensor, log_decay_BTH: Tensor) -> Tensor:
    """The same by fla's Triton kernel, in the dtype of x."""
    from fla.ops.simple_gla import chunk_simple_gla  # without a GPU this import is slow and its kernels fail

    heads = x_BTHV.shape[2]
    c_BTHK, b_BTHK = (t.to(x_BTHV.dtype)[:, :, None].repeat(1, 1, heads, 1) for t in (c_BTK, b_BTK))
    return chunk_simple_gla(c_BTHK, b_BTHK, x_BTHV, g=log_decay_BTH, scale=1.0)[0]


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
    """The Mamba2 token mixer (arXiv 2405.21060): projections, short convolutions, state space, gate, norm, output.

    Args:
        mode: name of the kernel that the block asks for; there is one kernel here, chunkwise with 32 tokens a chunk.
        d_model, hidden_size: width of the input and output; d_model wins where both are given.
        expand_k: num_heads times the state dimension of a head, as a multiple of hidden_size, so that states are as
            large as those of other mixers; expand_v: width of all values likewise.
        num_heads: heads; must divide both widths.
        use_beta, use_gate, allow_neg_eigval, qk_norm: accepted without effect: the step size is the write strength,
            the gate is always there, and Mamba2 does not normalise B and C.
        use_short_conv, conv_size, conv_bias: the causal convolution behind x, B and C.
        layer_idx: which layer of the model this is; kept for inspection.
        qk_activation: of B and C: 'silu', 'relu', 'elu' (ELU + 1) or 'identity'.
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
        if use_short_conv and conv_size < 1:
            raise ValueError(f"conv_size must be at least 1, got {conv_size}")

        self.mode = mode
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_k_dim, self.head_v_dim = key_dim // num_heads, value_dim // num_heads
        self.use_short_conv, self.layer_idx = use_short_conv, layer_idx
        self.activation = ACTIVATIONS[qk_activation]

        # B, C and x side by side, since one convolution runs over all three.
        self.bcx_dims = [2 * self.head_k_dim, value_dim]
        self.bcx_proj = nn.Linear(hidden_size, sum(self.bcx_dims), bias=False)
        if use_short_conv:
            self.bcx_conv = ShortConv(sum(self.bcx_dims), conv_size, conv_bias)
        self.dt_proj = nn.Linear(hidden_size, num_heads, bias=False)
        # Rates spread over (1, 16), steps log-uniform in (0.001, 0.1), so that heads begin with memories of one token
        # to about a thousand. dt_bias is the inverse of softplus at the step.
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1.0, 16.0).log())
        step = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.D = nn.Parameter(torch.ones(num_heads))
        self.z_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.o_norm = RMSNorm(value_dim, norm_eps) if kwargs.get("use_output_norm", True) else nn.Identity()
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

        bcx = self.bcx_proj(x_BTD)
        if self.use_short_conv:
            bcx = self.bcx_conv(bcx)
        bc, x = bcx.split(self.bcx_dims, dim=-1)
        x_BTHV = rearrange(F.silu(x), "b t (h v) -> b t h v", h=self.num_heads)
        dt_BTH, z_BTV = self.dt_proj(x_BTD), self.z_proj(x_BTD)

        # The recurrence accumulates over the whole sequence: 16-bit inputs are widened, autocast stays outside.
        dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        with torch.autocast(device_type=x_BTD.device.type, enabled=False):
            b_BTK, c_BTK = self.activation(bc.to(dtype)).chunk(2, dim=-1)
            dt_BTH = F.softplus(dt_BTH.to(dtype) + self.dt_bias.to(dtype))
            if attention_mask is not None:
                dt_BTH = dt_BTH * attention_mask[..., None].to(dtype)
            log_decay_BTH, written_BTHV = -self.A_log.to(dtype).exp() * dt_BTH, dt_BTH[..., None] * x_BTHV.to(dtype)
            if runs_fla(c_BTK, x_BTHV):
                y_BTHV = fla_ssd(c_BTK, b_BTK, written_BTHV.to(x_BTHV.dtype), log_decay_BTH).to(dtype)
            else:
                y_BTHV = chunked_ssd(c_BTK, b_BTK, written_BTHV, log_decay_BTH)
            y_BTHV = y_BTHV + self.D.to(dtype)[:, None] * x_BTHV.to(dtype)
            o_BTV = self.o_norm(rearrange(y_BTHV, "b t h v -> b t (h v)") * F.silu(z_BTV.to(dtype)))

        return self.o_proj(o_BTV.to(x_BTD.dtype)), None, past_key_values
