"""What the operators have in common: arguments that cannot be met here, the scale, and the layout of states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["finished", "scale_of", "started", "unmet"]

_ONLY_SPEED = ("chunk_indices", "chunk_size", "cu_seqlens_cpu")


def unmet(**given: Any) -> None:
    """Refuses what the kernels can and the stand-ins cannot; None and False are met, and what only changes speed.

    Raises:
        ValueError: another argument is set; it is named.
    """
    for name, value in given.items():
        if name not in _ONLY_SPEED and value is not None and value is not False:
            raise ValueError(f"{name} must be None or False without a CUDA device, got {type(value).__name__}")


def scale_of(scale: float | None, k: Tensor) -> float:
    """1 / sqrt(K) unless told."""
    return k.shape[-1] ** -0.5 if scale is None else float(scale)


def started(initial_state: Tensor | None, state_v_first: bool) -> Tensor | None:
    """[B, H, K, V] of a state in either layout."""
    return initial_state.transpose(-1, -2) if initial_state is not None and state_v_first else initial_state


def finished(state_BHKV: Tensor, output_final_state: bool, state_v_first: bool) -> Tensor | None:
    """The state in the caller's layout, None where it was not asked for."""
    if not output_final_state:
        return None
    return state_BHKV.transpose(-1, -2).contiguous() if state_v_first else state_BHKV
