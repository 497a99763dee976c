"""Causal softmax attention with rotary positions, in the contract of evolved programs: a reference, never a candidate.

Its cost grows with the square of the length. The class has the name that the contract asks for.

Sources: softmax attention, arXiv 1706.03762; rotary position embedding, arXiv 2104.09864.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_BASE = 10_000.0


def rotate(x_BHTD: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) at position t by the angle t * base^(-2i/D), in float32 or wider.

    The product of a query and a key then depends on the distance between their positions only.
    """
    length, dim = x_BHTD.shape[-2:]
    wide = x_BHTD if x_BHTD.dtype == torch.float64 else x_BHTD.float()
    speed = ROPE_BASE ** (-torch.arange(0, dim, 2, device=wide.device, dtype=wide.dtype) / dim)
    angle = torch.arange(length, device=wide.device, dtype=wide.dtype)[:, None] * speed
    cos, sin = angle.cos(), angle.sin()
    first, second = wide.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x_BHTD.dtype)


class DeltaNet(nn.Module):
    """Multi-head causal softmax attention (arXiv 1706.03762) with rotary positions and an optional output gate.

    Args:
        d_model, hidden_size: width of the input and output; d_model wins where both are given.
        expand_k, expand_v: width of all keys and of all values as a multiple of hidden_size.
        num_heads: heads; must divide both widths, and the width of a key must be even.
        use_gate: multiply the output by SiLU of a projection of the input.
        layer_idx: which layer of the model this is; kept for inspection.
        mode, use_beta, use_short_conv, conv_size, conv_bias, allow_neg_eigval, qk_activation, qk_norm, norm_eps,
            **kwargs: accepted, because blocks pass them to every mixer; plain attention has no such part.

    Raises:
        ValueError: for widths that the heads cannot divide.
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
        if num_heads < 1 or min(key_dim, value_dim) < 1 or key_dim % (2 * num_heads) or value_dim % num_heads:
            raise ValueError(
                f"num_heads must divide half the key width {key_dim} and the value width {value_dim}, got {num_heads}"
            )
        self.hidden_size, self.num_heads, self.use_gate, self.layer_idx = hidden_size, num_heads, use_gate, layer_idx
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
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

        attention_mask: optional [B, T], 1 for a token and 0 for padding, whose own output is meaningless. There is no
        decoding cache: past_key_values is handed back as it came; use_cache and output_attentions have no effect.

        Raises:
            ValueError: the mask is not [B, T].
        """
        x_BTD = hidden_states
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        q_BHTK, k_BHTK, v_BHTV = (rearrange(t, "b t (h d) -> b h t d", h=self.num_heads) for t in (q, k, v))
        allowed_B1TT = None
        if attention_mask is not None:
            if attention_mask.shape != x_BTD.shape[:2]:
                raise ValueError(
                    f"attention_mask must be [B, T] = {list(x_BTD.shape[:2])}, got {list(attention_mask.shape)}"
                )
            length = x_BTD.shape[1]
            causal_TT = torch.ones(length, length, dtype=torch.bool, device=x_BTD.device).tril()
            # Padding may see itself: a row without any key would be 0 / 0.
            itself_TT = torch.eye(length, dtype=torch.bool, device=x_BTD.device)
            allowed_B1TT = (causal_TT & attention_mask.bool()[:, None, None, :]) | itself_TT
        o_BHTV = F.scaled_dot_product_attention(
            rotate(q_BHTK), rotate(k_BHTK), v_BHTV, attn_mask=allowed_B1TT, is_causal=allowed_B1TT is None
        )
        o_BTV = rearrange(o_BHTV, "b h t v -> b t (h v)")
        if self.use_gate:
            o_BTV = o_BTV * F.silu(self.g_proj(x_BTD))
        return self.o_proj(o_BTV), None, past_key_values
