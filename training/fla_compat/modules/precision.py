"""The precision that the stand-ins compute in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wide"]


def wide(x: Tensor) -> Tensor:
    """x in float32; float64 stays as it is."""
    return x if x.dtype == torch.float64 else x.float()
