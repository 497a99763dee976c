"""Packing of padded batches into one row of tokens and back: stand-ins for fla.layers.utils."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["get_unpad_data", "index_first_axis", "pad_input"]


def get_unpad_data(attention_mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where the tokens of a 0/1 mask [B, T] lie.

    Returns:
        indices [tokens] into the flattened mask, cu_seqlens [B + 1] (int32, starts with 0), and the longest length.
    """
    lengths_B = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths_B.cumsum(dim=0, dtype=torch.int32), (1, 0))
    return indices, cu_seqlens, int(lengths_B.max())


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` [tokens] of x [rows, ...]; returns [tokens, ...]."""
    return x[indices]


def pad_input(hidden_states: Tensor, indices: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """Put tokens [tokens, ...] back at `indices` of a zero batch; returns [batch_size, seq_len, ...]."""
    rows = hidden_states.new_zeros(batch_size * seq_len, *hidden_states.shape[1:])
    return rows.index_put((indices,), hidden_states).unflatten(0, (batch_size, seq_len))
