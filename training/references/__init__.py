"""Programs outside the search, in the same contract: what an evolved mixer is held against, never a candidate.

Their cost may grow faster than linearly, so they run with `training/train.py --reference`.
Importing this package loads no program and no torch.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["REFERENCES"]

_HERE = Path(__file__).resolve().parent

REFERENCES: dict[str, Path] = {"softmax_attention": _HERE / "softmax_attention.py"}
"""Name of each reference program and its file."""
