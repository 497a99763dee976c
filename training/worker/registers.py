"""What a module holds, read from its registers themselves: a class may override the methods that list it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["all_buffers", "all_parameters", "named_buffers", "named_parameters", "register_buffer", "registers"]


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


def all_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Every parameter registered in `module` and below it, once, in the order of registration."""
    return list(named_parameters(module).values())


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The same by name: the path under which each is registered first."""
    return _named(module, "_parameters")


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Every buffer registered in `module` and below it, once, by name, in the order of registration."""
    return _named(module, "_buffers")


def all_buffers(module: nn.Module) -> list[Tensor]:
    """Every buffer registered in `module` and below it that is no parameter, once, in the order of registration."""
    known = {id(parameter) for parameter in all_parameters(module)}
    return [buffer for buffer in named_buffers(module).values() if id(buffer) not in known]


def register_buffer(module: nn.Module, name: str, value: Tensor) -> bool:
    """Registers `value` under a path as of `named_buffers`, in place of what is there. False: no such module."""
    owner, separator, leaf = name.rpartition(".")
    for prefix, held in registers(module):
        if prefix == owner + separator:
            held["_buffers"][leaf] = value
            return True
    return False


def _named(module: nn.Module, register: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for prefix, held in registers(module):
        for leaf, tensor in held[register].items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                name = f"{prefix}{leaf}"
                # A program may register "a.b" itself, beside the b of its a: neither hides the other.
                while name in found:
                    name += "'"
                found[name] = tensor
    return found
