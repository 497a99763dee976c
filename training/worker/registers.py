"""What a module holds, read from its registers themselves: a class may override the methods that list it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["registers"]


def registers(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """(prefix of its names, attributes) of `module` and of every module below it, each once, in the order of
    registration."""
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", module)]
    while pending:
        prefix, current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        held = object.__getattribute__(current, "__dict__")
        yield prefix, held
        below = [(f"{prefix}{name}.", child) for name, child in held["_modules"].items() if child is not None]
        pending.extend(reversed(below))
