"""Operators of fla.ops in plain torch operations: the delta rules and linear attention with and without decay.

Work is linear in the length for the recurrent names too: chunks give the same numbers. Arithmetic is float32 whatever
the dtype of the input (float64 stays float64), outputs have the dtype of v, states are float32 or wider, and autocast
changes nothing.
"""

from training.fla_compat.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from training.fla_compat.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from training.fla_compat.ops.gla import chunk_gla, fused_recurrent_gla
from training.fla_compat.ops.linear_attn import (
    chunk_linear_attn,
    fused_chunk_linear_attn,
    fused_recurrent_linear_attn,
)
from training.fla_compat.ops.simple_gla import (
    chunk_simple_gla,
    fused_chunk_simple_gla,
    fused_recurrent_simple_gla,
)

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_linear_attn",
    "chunk_simple_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_simple_gla",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gla",
    "fused_recurrent_linear_attn",
    "fused_recurrent_simple_gla",
]
