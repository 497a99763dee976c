"""Executes a candidate's file once and hands out its class. Nothing here is believed by the trusted side."""

from __future__ import annotations

import linecache
import sys
import types
from typing import Any

__all__ = ["FILE", "load_class"]

FILE = "candidate.py"
"""The name under which a candidate appears in its tracebacks."""


def load_class(text: str, device: str = "cpu") -> type:
    """Executes `text` as a module and returns its class DeltaNet.

    Raises:
        TypeError: there is no class of that name. Anything else: what the program raises while it is imported.
    """
    if device == "cpu":
        from training import fla_compat

        fla_compat.install()
        _no_compile()
    module = types.ModuleType("candidate")
    module.__file__ = FILE
    sys.modules["candidate"] = module
    linecache.cache[FILE] = (len(text), None, text.splitlines(keepends=True), FILE)
    exec(compile(text, FILE, "exec"), module.__dict__)
    found = getattr(module, "DeltaNet", None)
    if not isinstance(found, type):
        raise TypeError(f"expected the program to define class DeltaNet, got {type(found).__name__}")
    return found


def _no_compile() -> None:
    """torch.compile as the identity: on CPU it gains nothing at these sizes, and its import alone takes seconds."""
    import torch

    def identity(model: Any = None, **_: Any) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = identity
