"""Norms and the short convolution of fla.modules in plain torch operations.

As in the kernels that they stand for, arithmetic is float32 whatever the dtype of the input (float64 stays float64, so
that tests can be exact), results have the dtype of the input, and autocast changes nothing.
"""

from training.fla_compat.modules.convolution import ShortConvolution
from training.fla_compat.modules.fused_norm_gate import FusedRMSNormGated
from training.fla_compat.modules.layernorm import RMSNorm

__all__ = ["FusedRMSNormGated", "RMSNorm", "ShortConvolution"]
