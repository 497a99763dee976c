"""RWKV-7's time mixing: a generalised delta rule with a decay for every channel, in chunkwise parallel form.

The key that is removed and the key that is written differ, and both the decay and the strength of removal are chosen
channel by channel. With kappa the normalised removal key, a the in-context learning rate and k the replacement key, a
head's state S of shape [key_dim, value_dim] follows

    S_t = (Diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T
    o_t = norm(S_t^T r_t) + (r_t . (rho * k_t)) v_t        log w_t = -exp(-1/2) sigmoid(w0 + W2 tanh(W1 x_t))

Every projection reads its own mixture of the token and the one before it (token shift). The output is multiplied by a
low-rank gate. The value residual to the first layer is left out: a mixer sees its own layer only.

Sources: RWKV-7, arXiv 2503.14456, section 4 (equations of the time mixing); the chunkwise form of diagonal plus low
rank transitions follows the WY representation of arXiv 2406.06484, with two kinds of rows.
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
LEAST_LOG_DECAY = -math.exp(-0.5)
"""The strongest decay of one token: w > 0.545."""


def chunked_rwkv7(
    r_BTHK: Tensor, log_w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, a_BTHK: Tensor, b_BTHK: Tensor
) -> Tensor:
    """S_t = (Diag(w_t) + b_t a_t^T) S_{t-1} + k_t v_t^T, o_t = S_t^T r_t; returns o_BTHV in the dtype of the arguments.

    Cost is linear in T: inside a chunk of C = 32 tokens everything is a batched matrix product, between chunks only S
    is handed on. T need not be a multiple of C: padding with zeros and log decay 0 changes nothing. log_w must not lie
    below `LEAST_LOG_DECAY`: then exp(G_i - G_j), with G the sum of log decays since the start of the chunk, comes apart
    into exp(G_i) exp(-G_j), of at most exp(19.5).
    """
    batch, length, heads, key_dim = k_BTHK.shape
    value_dim = v_BTHV.shape[-1]

    def chunks(x_BTHD: Tensor) -> Tensor:
        padded = F.pad(x_BTHD, (0, 0, 0, 0, 0, -length % CHUNK)) if length % CHUNK else x_BTHD
        return rearrange(padded, "b (n c) h d -> (b h n) c d", c=CHUNK).contiguous()

    # M = B * H * N: every chunk of every head is one matrix of a batch. a_t reads the state before token t decays it.
    r_MCK, k_MCK, v_MCV, a_MCK, b_MCK = (chunks(t) for t in (r_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK))
    total_MCK = chunks(log_w_BTHK).cumsum(dim=1)
    before_MCK = F.pad(total_MCK[:, :-1], (0, 0, 1, 0))
    r_MCK, a_MCK = r_MCK * total_MCK.exp(), a_MCK * before_MCK.exp()
    cols_M2CK = torch.cat([k_MCK, b_MCK], dim=1) * (-total_MCK).exp().repeat(1, 2, 1)
    read_MC2C, removed_MC2C = torch.bmm(torch.cat([r_MCK, a_MCK], dim=1), cols_M2CK.transpose(1, 2)).chunk(2, dim=1)
    within_k_MCC, within_b_MCC = (part.tril() for part in read_MC2C.chunk(2, dim=-1))
    removed_k_MCC, removed_b_MCC = removed_MC2C.chunk(2, dim=-1)

    # What token i reads along a_i depends on what earlier tokens of its chunk read: a unit lower-triangular system.
    # unitriangular=True reads only the part below the diagonal.
    # The solution [U, W] says: in a chunk that starts with memory S, the tokens read U + W S.
    right = torch.cat([torch.bmm(removed_k_MCC.tril(-1), v_MCV), a_MCK], dim=-1)
    solved = torch.linalg.solve_triangular(-removed_b_MCC, right, upper=False, unitriangular=True)

    # Between chunks, with w the decay of the whole chunk and K', B' decayed to its end:
    # S' = Diag(w) S + K'^T V + B'^T (U + W S), both products for all chunks at once.
    until_end_M1K = total_MCK[:, -1:]
    k_end_MKC, b_end_MKC = ((t * (until_end_M1K - total_MCK).exp()).transpose(1, 2) for t in (k_MCK, b_MCK))
    carried = rearrange(torch.bmm(b_end_MKC, solved), "(a n) k d -> a n k d", a=batch * heads)
    write_ANKV, turn_ANKK = carried.split([value_dim, key_dim], dim=-1)
    write_ANKV = write_ANKV + rearrange(torch.bmm(k_end_MKC, v_MCV), "(a n) k v -> a n k v", a=batch * heads)
    whole_ANK = rearrange(until_end_M1K.exp(), "(a n) 1 k -> a n k", a=batch * heads)
    keep_ANKK = torch.diag_embed(whole_ANK) + turn_ANKK
    states = [torch.zeros_like(write_ANKV[:, 0])]
    for write, keep in zip(write_ANKV.unbind(1)[:-1], keep_ANKK.unbind(1)[:-1], strict=True):
        states.append(torch.baddbmm(write, keep, states[-1]))
    state_MKV = torch.stack(states, dim=1).flatten(0, 1)

    # O = R S + P_k V + P_b (U + W S), where R are the queries decayed from the start and P the products above.
    local_MCV, turned_MCK = torch.bmm(within_b_MCC, solved).split([value_dim, key_dim], dim=-1)
    o_MCV = torch.baddbmm(torch.baddbmm(local_MCV, within_k_MCC, v_MCV), r_MCK + turned_MCK, state_MKV)
    return rearrange(o_MCV, "(b h n) c v -> b (n c) h v", b=batch, h=heads)[:, :length]


def runs_fla(r_BTHK: Tensor, v_BTHV: Tensor) -> bool:
    """Whether fla's kernel takes these: 16-bit values on a CUDA device, heads of 16 to 256 channels."""
    widths = (r_BTHK.shape[-1], v_BTHV.shape[-1])
    half = v_BTHV.dtype in (torch.bfloat16, torch.float16)
    return v_BTHV.device.type == FLA_DEVICE and half and min(widths) >= 16 and max(widths) <= 256


def fla_rwkv7(
    r_BTHK: Tensor, log_w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, a_BTHK: Tensor, b_BTHK: Tensor
) -> Tensor:
    """The same by fla's Triton kernel, in the dtype of v."""
    from fla.ops.rwkv7 import chunk_rwkv7  # without a GPU this import is slow and its kernels fail

    r_BTHK, k_BTHK, a_BTHK, b_BTHK = (t.to(v_BTHV.dtype) for t in (r_BTHK, k_BTHK, a_BTHK, b_BTHK))
    return chunk_rwkv7(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, scale=1.0)[0]


class LowRank(nn.Module):
    """x -> W2 f(W1 x) (+ bias), with a middle of `rank` channels."""

    def __init__(self, width: int, rank: int, out: int, activation: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.down, self.activation = nn.Linear(width, rank, bias=False), activation
        self.up = nn.Linear(rank, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x)))


class DeltaNet(nn.Module):
    """The RWKV-7 token mixer (arXiv 2503.14456): token shift, projections, generalised delta rule, norm, gate, output.

    Args:
        mode: name of the kernel that the block asks for; there is one kernel here, chunkwise with 32 tokens a chunk.
        d_model, hidden_size: width of the input and output; d_model wins where both are given.
        expand_k, expand_v: width of all keys and of all values as a multiple of hidden_size.
        num_heads: heads; must divide both widths.
        use_short_conv: the token shift, which takes the place of a convolution here; False drops it.
        use_beta, use_gate, allow_neg_eigval, conv_size, conv_bias, qk_activation, qk_norm: accepted without effect:
            removal strength, gate and key norm are part of the mechanism.
        layer_idx: which layer of the model this is; kept for inspection.
        norm_eps: epsilon of the output norm, times the width of a head.
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

        self.mode = mode
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_k_dim, self.head_v_dim = key_dim // num_heads, value_dim // num_heads
        self.use_short_conv, self.layer_idx = use_short_conv, layer_idx
        self.norm_eps, self.use_output_norm = norm_eps * self.head_v_dim, bool(kwargs.get("use_output_norm", True))

        # How much of the token before goes into the inputs of r, w, k, v, a and g: less for later channels.
        place = torch.arange(hidden_size) / hidden_size
        self.shift = nn.Parameter(torch.stack([1.0 - place**power for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)]))
        self.r_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        rank = max(32, round(2.5 * math.sqrt(hidden_size) / 32) * 32)
        self.w_map = LowRank(hidden_size, rank, key_dim, nn.Tanh())
        self.a_map = LowRank(hidden_size, rank, key_dim, nn.Identity())
        self.g_map = LowRank(hidden_size, 2 * rank, value_dim, nn.Sigmoid(), bias=False)
        # Channels start with memories of a few to some hundred tokens.
        nn.init.zeros_(self.a_map.up.bias)
        with torch.no_grad():
            self.w_map.up.bias.copy_(torch.linspace(-6.0, 0.0, self.head_k_dim).repeat(num_heads))
        self.removal_scale = nn.Parameter(torch.full((key_dim,), 0.85))
        self.rate_mix = nn.Parameter(torch.ones(key_dim))
        self.bonus = nn.Parameter(torch.zeros(num_heads, self.head_k_dim))
        if self.use_output_norm:
            self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(value_dim)), nn.Parameter(torch.zeros(value_dim))
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
            # Zeros also keep the token shift of the first real token clean when the padding is on the left.
            x_BTD = x_BTD * attention_mask[..., None].to(x_BTD.dtype)

        earlier_BTD = F.pad(x_BTD, (0, 0, 1, 0))[:, :-1] if self.use_short_conv else x_BTD
        mixed = (torch.lerp(x_BTD, earlier_BTD, share.to(x_BTD.dtype)) for share in self.shift)
        r_in, w_in, k_in, v_in, a_in, g_in = mixed
        keys = (self.r_proj(r_in), self.w_map(w_in), self.k_proj(k_in), self.a_map(a_in))
        v_BTHV = rearrange(self.v_proj(v_in), "b t (h v) -> b t h v", h=self.num_heads)
        g_BTV = self.g_map(g_in)

        # The recurrence accumulates over the whole sequence: 16-bit inputs are widened, autocast stays outside.
        dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        with torch.autocast(device_type=x_BTD.device.type, enabled=False):
            r, w, k, a = (t.to(dtype) for t in keys)
            log_w, a = LEAST_LOG_DECAY * w.sigmoid(), a.sigmoid()
            removal = k * self.removal_scale.to(dtype)
            k = k * torch.lerp(torch.ones_like(a), a, self.rate_mix.to(dtype))
            split = (rearrange(t, "b t (h k) -> b t h k", h=self.num_heads) for t in (r, log_w, k, a, removal))
            r_BTHK, log_w_BTHK, k_BTHK, a_BTHK, removal_BTHK = split
            removal_BTHK = removal_BTHK * torch.rsqrt(removal_BTHK.square().sum(dim=-1, keepdim=True) + 1e-6)
            if attention_mask is not None:
                token_BT11 = attention_mask[..., None, None].to(dtype)
                log_w_BTHK, k_BTHK, a_BTHK = log_w_BTHK * token_BT11, k_BTHK * token_BT11, a_BTHK * token_BT11
            kernel = fla_rwkv7 if runs_fla(r_BTHK, v_BTHV) else chunked_rwkv7
            v_wide_BTHV = v_BTHV.to(dtype)
            given_v = v_BTHV if kernel is fla_rwkv7 else v_wide_BTHV
            o_BTHV = kernel(r_BTHK, log_w_BTHK, k_BTHK, given_v, -removal_BTHK, removal_BTHK * a_BTHK).to(dtype)
            if self.use_output_norm:
                weight_HV, bias_HV = (t.to(dtype).view(self.num_heads, -1) for t in (self.norm_weight, self.norm_bias))
                o_BTHV = F.layer_norm(o_BTHV, o_BTHV.shape[-1:], eps=self.norm_eps) * weight_HV + bias_HV
            seen_BTH1 = (r_BTHK * k_BTHK * self.bonus.to(dtype)).sum(dim=-1, keepdim=True)
            o_BTHV = o_BTHV + seen_BTH1 * v_wide_BTHV

        o_BTV = rearrange(o_BTHV, "b t h v -> b t (h v)").to(x_BTD.dtype)
        return self.o_proj(o_BTV * g_BTV), None, past_key_values
