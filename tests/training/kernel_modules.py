"""Modules in the place of fla's: each function has the signature of the pinned fla's, read from its source, records
what it gets and computes in float64."""

from __future__ import annotations

import ast
import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import Tensor

from tests.training.oracles import FLA_OPS

__all__ = ["Calls", "Compute", "kernel_modules"]

Calls = list[tuple[str, dict[str, Any]]]
"""Name and arguments of each call."""
Compute = Callable[[dict[str, Any]], Tensor]
"""From the arguments of a call, tensors in float64 and queries scaled, to o."""


@functools.cache
def real_signature(package: str, function: str) -> ast.arguments:
    """The arguments of fla.ops.<package>.<function>, from the installed file; nothing of fla is imported."""
    path = FLA_OPS / package / "chunk.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            for argument in (*node.args.args, *node.args.kwonlyargs, node.args.kwarg):
                if argument is not None:
                    argument.annotation = None
            return node.args
    raise LookupError(f"{path} has no {function}")


def stand_in(package: str, function: str, compute: Compute, calls: Calls) -> Any:
    """A function with the real one's signature that records what it gets and computes the recurrence in float64."""

    def answer(given: dict[str, Any]) -> tuple[Tensor, None]:
        calls.append((function, given))
        tensors = {key: value.double() if isinstance(value, Tensor) else value for key, value in given.items()}
        first = "r" if "r" in tensors else "q"
        tensors[first] = tensors[first] * tensors["scale"]
        return compute(tensors).to(given["v"].dtype), None

    text = f"def {function}({ast.unparse(real_signature(package, function))}): return answer(dict(locals()))"
    scope: dict[str, Any] = {"answer": answer}
    exec(text, scope)
    return scope[function]


def kernel_modules(monkeypatch: pytest.MonkeyPatch, kernels: Iterable[tuple[str, str, Compute]]) -> Calls:
    """Puts modules of ours where `from fla.ops.<package> import <function>` looks; returns the calls to come."""
    recorded: Calls = []
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for package, function, compute in kernels:
        module = types.ModuleType(f"fla.ops.{package}")
        setattr(module, function, stand_in(package, function, compute, recorded))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return recorded
