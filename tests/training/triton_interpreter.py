"""Runs fla's real Triton kernels without a GPU: Triton's interpreter, and what it needs to run them.

`environment()` is for a child process, which imports fla in it and then calls `prepare()`. bfloat16 is not interpreted
right; float16 is.
"""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["assert_close", "environment", "output_of", "prepare"]

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """What a child must have in its environment when it imports triton."""
    return {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}


def output_of(file: str) -> str:
    """What the script `file` prints, run in such an environment. It must end well."""
    done = subprocess.run([sys.executable, file], env=environment(), capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def assert_close(name: str, net: nn.Module, called: Sequence[Tensor], own: Sequence[Tensor], most: float) -> None:
    """The output of `net` and its gradients by the input and each parameter, by the kernel and by its own form: within
    `most` of their norms of each other, and not equal to the last bit."""
    names = ["output", "input", *(parameter for parameter, _ in net.named_parameters())]
    worst = 0.0
    for what, got, want in zip(names, called, own, strict=True):
        error = ((got - want).norm() / (want.norm() + 1e-2)).item()
        assert error < most, (name, what, error)
        worst = max(worst, error)
    assert worst > 0, f"{name}: equal to the last bit, so the kernel was not called"
    print(f"{name}: at most {worst:.1e} apart", flush=True)


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
