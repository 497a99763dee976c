"""The stand-ins against fla's own Triton kernels, run without a GPU by Triton's interpreter in a child process.

The child imports fla (over ten seconds), so this is one of the slow tests.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor


def results(modules: Any, l2norm: Any, utils: Any) -> dict[str, Tensor]:
    """Outputs and gradients of each name for fixed inputs and weights; outputs only where inputs are float16."""
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
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    norm, biased = modules.RMSNorm(16, eps=1e-3), modules.RMSNorm(16, bias=True)
    plain = modules.RMSNorm(16, elementwise_affine=False)
    record("l2norm", None, l2norm, x)
    record("l2norm_heads", None, lambda a: l2norm(a.unflatten(-1, (4, 4)), eps=1e-2), x)
    record("rms", norm, norm, x)
    record("rms_bias", biased, biased, x)
    record("rms_plain", plain, plain, x)
    record("rms_residual", norm, lambda a, b: norm(a, residual=b), x, r)
    record("rms_prenorm", norm, lambda a, b: norm(a, residual=b, prenorm=True), x, r)
    record("rms_prenorm_alone", norm, lambda a: norm(a, prenorm=True), x)
    for activation in ("swish", "silu", "sigmoid"):
        gated = modules.FusedRMSNormGated(16, activation=activation, eps=1e-3)
        record(f"gated_{activation}", gated, gated, x, g)
    record("gated_prenorm", gated, lambda a, b, c, m=gated: m(a, b, residual=c, prenorm=True), x, g, r)
    gated = modules.FusedRMSNormGated(16, elementwise_affine=False)
    record("gated_plain", gated, gated, x, g)
    for activation, bias, width in (("silu", False, 4), (None, True, 3), ("swish", True, 2)):
        conv = modules.ShortConvolution(16, width, bias=bias, activation=activation)
        record(f"conv_{width}", conv, lambda a, conv=conv: conv(a)[0], x)
        record(f"conv_residual_{width}", conv, lambda a, b, conv=conv: conv(a, residual=b)[0], x, r)
        # The kernel masks its input in place, which a leaf does not allow.
        record(f"conv_mask_{width}", conv, lambda a, conv=conv: conv(a * 1.0, mask=mask)[0], x)
        # The oldest column of a state is never read, and the kernel gives it no gradient.
        record(f"conv_state_{width}", conv, lambda a, conv=conv: conv(a, output_final_state=True)[1][..., 1:], x)
        found.update({f"conv_decode_{width}.{i}": value for i, value in enumerate(decoded(conv, x))})
    packed = utils.get_unpad_data(mask)
    found.update({"unpad.indices": packed[0], "unpad.cu_seqlens": packed[1], "unpad.longest": torch.tensor(packed[2])})
    record("unpad", None, lambda a: utils.index_first_axis(a.flatten(0, 1), packed[0]), x)
    record("pad", None, lambda a: utils.pad_input(a.flatten(0, 1)[: len(packed[0])], packed[0], 2, 7), x)
    half = [value.half() for value in (x, g)]
    for name, value in (
        ("l2norm", l2norm(half[0])),
        ("l2norm_wide", l2norm(half[0], output_dtype=torch.float32)),
        ("rms", norm(half[0])),
        ("rms_kept", norm(half[0], prenorm=True, residual_in_fp32=True)[1]),
        ("gated", gated(*half)),
    ):
        found[f"half_{name}"] = value.detach()
    return found


@torch.no_grad()
def decoded(conv: Any, x: Tensor) -> list[Tensor]:
    """Outputs of five tokens, then of one at a time with the state, and of the last by `step`."""
    first, state = conv(x[:, :5], output_final_state=True)
    outs = [first]
    one, state = conv(x[:, 5:6], cache=state, output_final_state=True)
    outs.append(one)
    last, state = conv.step(x[:, 6:7], None, state, output_final_state=True)
    return [*outs, last, state]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is a Linux package")
def test_stand_ins_agree_with_the_kernels(tmp_path: Path) -> None:
    from training.fla_compat import modules
    from training.fla_compat.layers import utils
    from training.fla_compat.modules.l2norm import l2norm

    child = [sys.executable, __file__, str(tmp_path / "real.pt")]
    environment = triton_interpreter.environment()
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    real = torch.load(tmp_path / "real.pt")
    ours = results(modules, l2norm, utils)
    assert real.keys() == ours.keys()
    for name, value in real.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


if __name__ == "__main__":
    import fla.layers.utils
    import fla.modules
    from fla.modules.l2norm import l2norm as real_l2norm

    triton_interpreter.prepare()
    torch.save(results(fla.modules, real_l2norm, fla.layers.utils), sys.argv[1])
