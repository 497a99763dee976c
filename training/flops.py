"""Floating-point operations of a model, and the share of a GPU's peak that training reaches (MFU)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from training.profiles import Profile

__all__ = ["gpu_name", "mfu", "training_flops"]

_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 operations a second, from the vendor's data sheets. The first name that is part of the card's wins."""
_FORWARD_AND_BACKWARD = 3
"""The backward pass costs twice the forward pass; recomputed activations are overhead and do not count."""


def training_flops(profile: Profile, sizes: Mapping[str, int], mixer_flops: float | None) -> float | None:
    """FLOPs a token of one training step: 3 x forward, a multiply-add counted as two.

    Args:
        sizes: mlps, parameters of all feed-forward layers.
        mixer_flops: counted forward FLOPs a token of one mixer at the training length; None where nobody counted.

    Returns:
        None where the mixer's are not known.
    """
    if mixer_flops is None:
        return None
    head = 2 * profile.model.vocab * profile.model.hidden_size
    return _FORWARD_AND_BACKWARD * (profile.model.layers * mixer_flops + 2 * sizes["mlps"] + head)


def mfu(tokens_per_second: float | None, flops: float | None, gpu: str | None) -> float | None:
    """Share of the card's peak in [0, 1]; None on a CPU, on an unknown card, or where a number is missing."""
    peak = next((peak for name, peak in _PEAKS.items() if gpu is not None and name in gpu), None)
    if tokens_per_second is None or flops is None or peak is None:
        return None
    return tokens_per_second * flops / peak


def gpu_name() -> str | None:
    """The first card that the driver names, found without torch; None without one."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                return value.strip()
    return None
