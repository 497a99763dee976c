"""Linear-time mixers of our own: one program a file, in the contract that evolved programs keep.

The first two are the roots of every search; the others are baselines that a found design is held against, and trusted
like them. Importing this package loads no program and no torch; programs are read as text and executed in the sandbox.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["ARCHITECTURES", "SEEDS"]

_HERE = Path(__file__).resolve().parent
_SEEDS = ("delta_net", "gated_delta_net")
_OTHERS = (
    *("linear_attention", "retnet", "gla", "mamba2"),
    *("delta_net_fir", "gated_delta_product", "kimi_delta_attention", "rwkv7"),
)

SEEDS: dict[str, Path] = {name: _HERE / f"{name}.py" for name in _SEEDS}
"""Name of each seed and its file, in the order in which they become elements 1 and 2."""

ARCHITECTURES: dict[str, Path] = {name: _HERE / f"{name}.py" for name in (*_SEEDS, *_OTHERS)}
"""Name of each program here and its file: the seeds, then mixers whose memory only adds, then those that correct it."""
