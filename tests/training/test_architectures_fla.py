"""Which form an architecture runs: fla's kernel for 16-bit values on the device where it runs, its own form elsewhere.

No GPU is needed: the device is called "cpu" and modules under fla's names stand for the kernels. Each function in them
has the signature of the pinned fla's, read from its source, and computes the recurrence step by step. That the real
kernels compute the same is for tests/gpu.
"""

from __future__ import annotations

import importlib
import sys
import types

import oracles
import pytest
import torch
from torch import Tensor

from tests.training.kernel_modules import Calls, Compute, kernel_modules
from training.architectures import ARCHITECTURES


def additive(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    decay = torch.zeros_like(k) if g is None else g if g.dim() == 4 else g[..., None].expand_as(k)
    return oracles.diagonal(q, k, v, decay)


KERNELS: dict[str, tuple[str, str, Compute]] = {
    "delta_net": ("delta_rule", "chunk_delta_rule", lambda a: oracles.delta_rule(a["q"], a["k"], a["v"], a["beta"])),
    "gated_delta_net": (
        "gated_delta_rule",
        "chunk_gated_delta_rule",
        lambda a: oracles.gated_delta_rule(a["q"], a["k"], a["v"], a["beta"], a["g"]),
    ),
    "linear_attention": ("linear_attn", "chunk_linear_attn", lambda a: additive(a["q"], a["k"], a["v"], None)),
    "retnet": ("simple_gla", "chunk_simple_gla", lambda a: additive(a["q"], a["k"], a["v"], a["g"])),
    "mamba2": ("simple_gla", "chunk_simple_gla", lambda a: additive(a["q"], a["k"], a["v"], a["g"])),
    "gla": ("gla", "chunk_gla", lambda a: additive(a["q"], a["k"], a["v"], a["g"])),
    "kimi_delta_attention": (
        "kda",
        "chunk_kda",
        lambda a: oracles.kimi_delta(a["q"], a["k"], a["v"], a["beta"], a["g"]),
    ),
    "gated_delta_product": (
        "gated_delta_product",
        "chunk_gated_delta_product",
        lambda a: oracles.delta_product(a["q"], a["k"], a["v"], a["beta"], a["g"]),
    ),
    "rwkv7": (
        "rwkv7",
        "chunk_rwkv7",
        lambda a: oracles.low_rank_transition(*(a[letter] for letter in "rwkvab")),
    ),
}
KERNELS["delta_net_fir"] = KERNELS["delta_net"]
every = pytest.mark.parametrize("name", list(ARCHITECTURES))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Calls of kernels, while modules of ours stand where `from fla.ops.X import f` looks."""
    return kernel_modules(monkeypatch, KERNELS.values())


def build(name: str, hidden: int = 32) -> tuple[types.ModuleType, torch.nn.Module]:
    module = importlib.import_module(f"training.architectures.{name}")
    torch.manual_seed(0)
    return module, module.DeltaNet(hidden_size=hidden, num_heads=2)


def tokens(hidden: int = 32) -> Tensor:
    return torch.randn(2, 37, hidden, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("masked", [False, True])
@every
def test_16_bit_values_on_the_device_of_the_kernels_go_to_fla(
    name: str, masked: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, net = build(name)
    mask = (torch.arange(37) < 30).expand(2, 37).long() if masked else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = net(tokens(), attention_mask=mask)[0]
        assert not calls
        monkeypatch.setattr(module, "FLA_DEVICE", "cpu")
        got = net(tokens(), attention_mask=mask)[0]
    [(function, given)] = calls
    assert function == KERNELS[name][1] and given["scale"] == 1.0 and given["v"].dtype == torch.bfloat16
    assert given["v"].shape[2:] == (2, 16) and given["v"].shape[1] % 37 == 0
    assert got.dtype == own.dtype and (got - own).abs().max() < 0.03 * own.abs().max()
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@every
def test_wide_values_and_narrow_heads_stay_with_the_own_form(
    name: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, net = build(name)
    _, narrow = build(name, hidden=16)
    monkeypatch.setattr(module, "FLA_DEVICE", "cpu")
    net(tokens())
    net.double()(tokens().double())
    narrow.bfloat16()(tokens(16).bfloat16())
    assert not calls


@every
def test_without_a_gpu_nothing_of_fla_is_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, _, _ in KERNELS.values():
        monkeypatch.setitem(sys.modules, f"fla.ops.{package}", None)  # importing it raises
    module, net = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(tokens())[0].float().sum().backward()
        monkeypatch.setattr(module, "FLA_DEVICE", "cpu")
        with pytest.raises(ImportError, match=r"None in sys\.modules"):
            net(tokens())
