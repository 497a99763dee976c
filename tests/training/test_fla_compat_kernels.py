"""The stand-ins against fla's own Triton kernels, run without a GPU by Triton's interpreter in a child process.

The child imports fla (over ten seconds), so this is one of the slow tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def take_first_config() -> None:
    """Autotuners benchmark on a device; here each takes its first configuration."""
    from fla.ops.utils.cache import CachedAutotuner
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.configs[0]
        return self.fn.run(*args, **{**kwargs, **config.all_kwargs()})

    Autotuner.run = run
    CachedAutotuner.run = run


def results(modules: Any, l2norm: Any) -> dict[str, Tensor]:
    """Outputs and gradients of each module for fixed inputs and weights."""
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}

    def record(name: str, module: Any, call: Any, *inputs: Tensor) -> None:
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.no_grad():
            for i, parameter in enumerate(module.parameters() if module is not None else ()):
                parameter.copy_(torch.linspace(-1.0, 1.5 + i, parameter.numel()).view_as(parameter))
        outs = call(*leaves)
        outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out is not None]
        leaves += list(module.parameters()) if module is not None else []
        loss = sum((out * torch.linspace(0.1, 1.0, out.numel()).view_as(out)).sum() for out in outs)
        for i, value in enumerate([*outs, *torch.autograd.grad(loss, leaves, materialize_grads=True)]):
            found[f"{name}.{i}"] = value.detach()

    x, g, r = torch.randn(2, 7, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    norm, biased = modules.RMSNorm(16, eps=1e-3), modules.RMSNorm(16, bias=True)
    record("l2norm", None, l2norm, x)
    record("rms", norm, norm, x)
    record("rms_bias", biased, biased, x)
    record("rms_prenorm", norm, lambda a, b: norm(a, residual=b, prenorm=True), x, r)
    for activation in ("swish", "sigmoid"):
        gated = modules.FusedRMSNormGated(16, activation=activation)
        record(f"gated_{activation}", gated, gated, x, g)
    for activation, bias, width in (("silu", False, 4), (None, True, 3)):
        conv = modules.ShortConvolution(16, width, bias=bias, activation=activation)
        record(f"conv_{width}", conv, lambda a, conv=conv: conv(a)[0], x)
        # The oldest column of a state is never read, and the kernel gives it no gradient.
        record(f"conv_state_{width}", conv, lambda a, conv=conv: conv(a, output_final_state=True)[1][..., 1:], x)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is a Linux package")
def test_stand_ins_agree_with_the_kernels(tmp_path: Path) -> None:
    from training.fla_compat import modules
    from training.fla_compat.modules.l2norm import l2norm

    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ""}
    child = [sys.executable, __file__, str(tmp_path / "real.pt")]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    real = torch.load(tmp_path / "real.pt")
    ours = results(modules, l2norm)
    assert real.keys() == ours.keys()
    for name, value in real.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


if __name__ == "__main__":
    import fla.modules
    from fla.modules.l2norm import l2norm as real_l2norm

    take_first_config()
    torch.save(results(fla.modules, real_l2norm), sys.argv[1])
