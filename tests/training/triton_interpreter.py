"""Runs fla's real Triton kernels without a GPU: Triton's interpreter, and what it needs to run them.

`environment()` is for a child process, which imports fla in it and then calls `prepare()`. bfloat16 is not interpreted
right; float16 is.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["environment", "prepare"]

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """What a child must have in its environment when it imports triton."""
    return {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}


def prepare() -> None:
    """Call it after every module of fla that is used has been imported."""
    import triton.language as tl
    from fla.ops.utils.cache import CachedAutotuner
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import _implicit_cvt

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.configs[0]
        return self.fn.run(*args, **{**kwargs, **config.all_kwargs()})

    # Autotuners benchmark on a device; here each takes its first configuration.
    Autotuner.run = CachedAutotuner.run = run

    def counted(*bounds: Any) -> Iterable[Any]:
        if not any(isinstance(bound, tl.tensor) for bound in bounds):
            return builtins.range(*bounds)
        return (_implicit_cvt(i) for i in builtins.range(*(int(bound) for bound in bounds)))

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            # In a compiled kernel the variable of a loop is a tensor, and kernels call its methods.
            vars(module)["range"] = counted
            # tl.gather was bound before the interpreter could take its place.
            if hasattr(module, "IS_GATHER_SUPPORTED"):
                vars(module)["IS_GATHER_SUPPORTED"] = False
