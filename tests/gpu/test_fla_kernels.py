"""On a CUDA device: architectures and designs compute the same by fla's kernel as by their own form, both passes.

python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.designer import render
from tests.pipeline.designs import KERNEL_DESIGNS
from training.architectures import ARCHITECTURES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def build(name: str, **config: Any) -> tuple[ModuleType, nn.Module]:
    module = importlib.import_module(f"training.architectures.{name}")
    torch.manual_seed(0)
    return module, module.DeltaNet(hidden_size=128, num_heads=2, use_gate=True, **config).cuda()


def results(net: nn.Module, x: Tensor, mask: Tensor | None, weights: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = net(leaf, attention_mask=mask)[0]
    return [out.float(), *torch.autograd.grad((out.float() * weights).sum(), [leaf, *net.parameters()])]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize(("length", "masked"), [(1, False), (63, True), (200, False), (1024, False)])
def test_kernel_and_own_form_agree(name: str, length: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, net = build(name)
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(2, length, 128, generator=generator).cuda() for _ in range(2))
    mask = torch.arange(length, device="cuda").expand(2, -1) < length - 7 if masked else None
    by_kernel = results(net, x, mask, weights if mask is None else weights * mask[..., None])
    monkeypatch.setattr(module, "FLA_DEVICE", "none")
    by_own = results(net, x, mask, weights if mask is None else weights * mask[..., None])
    names = ["output", "input", *(parameter for parameter, _ in net.named_parameters())]
    for what, got, want in zip(names, by_kernel, by_own, strict=True):
        scale = want.norm()
        assert got.isfinite().all(), what
        # bfloat16 has 8 bits: what both forms round differs by about 1 %.
        assert (got - want).norm() <= 0.05 * scale + 1e-3, (what, float((got - want).norm() / scale))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_kernel_is_causal_and_keeps_rows_apart(name: str) -> None:
    _, net = build(name)
    x = torch.randn(2, 130, 128, generator=torch.Generator().manual_seed(2)).cuda()
    other = torch.cat([x[:, :65], torch.randn_like(x[:, 65:])], dim=1)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        whole = net(x)[0]
        assert torch.equal(net(other)[0][:, :65], whole[:, :65])
        torch.testing.assert_close(net(x[:1])[0], whole[:1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", list(KERNEL_DESIGNS))
def test_designs_by_kernel_and_by_their_own_form_agree(name: str) -> None:
    program: dict[str, Any] = {}
    exec(compile(render(KERNEL_DESIGNS[name], "delta_net_test"), "program", "exec"), program)
    torch.manual_seed(0)
    net = program["DeltaNet"](hidden_size=128, num_heads=2, layer_idx=1).cuda()
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(2, 200, 128, generator=generator).cuda() for _ in range(2))
    by_kernel = results(net, x, None, weights)
    program["FLA_DEVICE"] = "none"
    by_own = results(net, x, None, weights)
    assert any(not torch.equal(got, want) for got, want in zip(by_kernel, by_own, strict=True)), "no kernel was called"
    names = ["output", "input", *(parameter for parameter, _ in net.named_parameters())]
    for what, got, want in zip(names, by_kernel, by_own, strict=True):
        assert got.isfinite().all(), what
        # The last term is for parameters of one number a head, whose gradient may nearly cancel.
        assert (got - want).norm() <= 0.05 * want.norm() + 0.05, (what, float((got - want).norm() / want.norm()))


@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule", "gla", "linear_attn", "simple_gla"])
@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
def test_operators_and_their_stand_ins_agree(name: str, form: str) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 200, 2, 64, generator=generator) for _ in range(3))
    q, k = (nn.functional.normalize(x, dim=-1).abs() for x in (q, k))
    g = nn.functional.logsigmoid(torch.randn(2, 200, 2, 64, generator=generator)) / 8
    beta = torch.rand(2, 200, 2, generator=generator)
    given = {
        "delta_rule": {"beta": beta},
        "gated_delta_rule": {"g": g[..., 0], "beta": beta},
        "gla": {"gk" if form == "fused_recurrent" else "g": g},
        "linear_attn": {"normalize": True},
        "simple_gla": {"g": g[..., 0]},
    }[name]
    cuda = {key: x.cuda().bfloat16() if isinstance(x, Tensor) else x for key, x in given.items()}
    real = getattr(importlib.import_module(f"fla.ops.{name}"), f"{form}_{name}")
    own = getattr(importlib.import_module(f"training.fla_compat.ops.{name}"), f"{form}_{name}")
    values = [x.cuda().bfloat16() for x in (q, k, v)]
    got, want = real(*values, **cuda)[0].float(), own(*values, **cuda)[0].float()
    assert got.isfinite().all() and (got - want).norm() <= 0.03 * want.norm()
