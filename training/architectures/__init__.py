"""The roots of the search tree: one program a file, in the contract that evolved programs keep.

Importing this package loads no program and no torch; programs are read as text and executed in the sandbox.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["SEEDS"]

_HERE = Path(__file__).resolve().parent

SEEDS: dict[str, Path] = {name: _HERE / f"{name}.py" for name in ("delta_net", "gated_delta_net")}
"""Name of each seed and its file, in the order in which they become elements 1 and 2."""
