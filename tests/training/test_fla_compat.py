"""The stand-ins for fla's modules against definitions in float64, and the names under which they are installed."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from common.errors import JobError
from training.fla_compat import install
from training.fla_compat.layers.utils import get_unpad_data, index_first_axis, pad_input
from training.fla_compat.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from training.fla_compat.modules.l2norm import l2norm

ROOT = Path(__file__).resolve().parents[2]


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_l2norm_has_its_epsilon_inside_the_root() -> None:
    x = tokens(2, 5, 8)
    same(l2norm(x), x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt())
    assert l2norm(x.bfloat16()).dtype == torch.bfloat16
    assert l2norm(x.bfloat16(), output_dtype=torch.float32).dtype == torch.float32
    assert torch.equal(l2norm(torch.zeros(1, 4)), torch.zeros(1, 4))


@pytest.mark.parametrize("bias", [False, True])
def test_rms_norm_with_residual_and_prenorm(bias: bool) -> None:
    norm, x, residual = RMSNorm(8, bias=bias, eps=1e-3, dtype=torch.float64), tokens(2, 5, 8), tokens(2, 5, 8, seed=2)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(tokens(8, seed=3))
    shift = 0 if norm.bias is None else norm.bias
    same(norm(x), oracles.rms(x, 1e-3) * norm.weight + shift)
    out, stream = norm(x, residual=residual, prenorm=True)
    same(out, oracles.rms(x + residual, 1e-3) * norm.weight + shift)
    same(stream, x + residual)
    assert not list(RMSNorm(8, elementwise_affine=False).parameters())


def test_residual_stream_keeps_its_own_dtype() -> None:
    norm, x = RMSNorm(8), tokens(2, 8).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert norm(x, prenorm=True)[1].dtype == torch.bfloat16
    assert norm(x, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    assert norm(x, residual=x.float(), prenorm=True)[1].dtype == torch.float32


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
def test_gated_norm_normalises_before_the_gate(activation: str) -> None:
    norm, x, g = (
        FusedRMSNormGated(8, eps=1e-3, activation=activation).double(),
        tokens(2, 5, 8),
        tokens(2, 5, 8, seed=2),
    )
    gate = torch.sigmoid(g) if activation == "sigmoid" else g * torch.sigmoid(g)
    same(norm(x, g), oracles.rms(x, 1e-3) * gate)
    out, stream = norm(x, g, residual=g, prenorm=True)
    same(out, oracles.rms(x + g, 1e-3) * gate)
    same(stream, x + g)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 9), width=st.integers(1, 5), bias=st.booleans(), silu=st.booleans()
)
def test_convolution_and_its_state(batch: int, length: int, width: int, bias: bool, silu: bool) -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(6, width, bias=bias, activation="silu" if silu else None).double()
    x, residual = tokens(batch, length, 6), tokens(batch, length, 6, seed=2)
    want = oracles.depthwise_conv(x, conv.weight[:, 0], conv.bias)
    want = F.silu(want) if silu else want
    whole, nothing = conv(x)
    assert nothing is None and conv.state_size == 6 * width
    same(whole, want)
    same(conv(x, residual=residual)[0], want + residual)
    for cut in range(1, length):  # in two parts, and then token by token
        first, state = conv(x[:, :cut], output_final_state=True)
        assert state.shape == (batch, 6, width)
        same(torch.cat([first, conv(x[:, cut:], cache=state)[0]], dim=1), want)
    with torch.no_grad():
        state, steps = torch.zeros(batch, 6, width, dtype=torch.float64), []
        for t in range(length):  # the state is also updated in place, as a decoder expects
            steps.append(conv.step(x[:, t : t + 1], None, state)[0])
        same(torch.cat(steps, dim=1), want)


def test_convolution_masks_padding_and_leaves_its_input_alone() -> None:
    conv, x = ShortConvolution(6, 4).double(), tokens(2, 7, 6)
    mask, before = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]), x.clone()
    same(conv(x, mask=mask)[0][0, 2:], conv(x[:1, 2:])[0][0])
    assert torch.equal(x, before)


def test_autocast_changes_neither_precision_nor_dtype() -> None:
    x = tokens(2, 7, 6).float()
    modules = [RMSNorm(6), lambda t: FusedRMSNormGated(6)(t, t), lambda t: conv(t)[0], l2norm]
    conv = ShortConvolution(6, 4)
    for module in modules:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside, narrow = module(x), module(x.bfloat16())
        assert torch.equal(inside, module(x)) and narrow.dtype == torch.bfloat16


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(ValueError, match="cu_seqlens must be None"):
        ShortConvolution(6, 4)(torch.zeros(1, 8, 6), cu_seqlens=torch.tensor([0, 4, 8]))
    with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', got 'gelu'"):
        ShortConvolution(6, 4, activation="gelu")
    with pytest.raises(ValueError, match="got 'relu'"):
        FusedRMSNormGated(6, activation="relu")


@settings(max_examples=30, deadline=None)
@given(mask=st.integers(1, 4).flatmap(lambda t: st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=1)))
def test_unpadding_and_back(mask: list[list[bool]]) -> None:
    mask_BT = torch.tensor(mask)
    x = tokens(*mask_BT.shape, 3).requires_grad_()
    indices, cu_seqlens, longest = get_unpad_data(mask_BT)
    lengths = [sum(row) for row in mask]
    assert cu_seqlens.dtype == torch.int32 and longest == max(lengths)
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    packed = index_first_axis(x.flatten(0, 1), indices)
    assert packed.shape == (sum(lengths), 3)
    back = pad_input(packed, indices, *mask_BT.shape)
    same(back, x * mask_BT[..., None])
    same(torch.autograd.grad(back.sum(), x)[0], mask_BT[..., None].double().expand_as(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for devices without CUDA")
def test_installed_names_are_ours_and_nothing_of_fla_is_imported() -> None:
    code = """
import sys
from training.fla_compat import NAMES, install
assert install() and install()
from fla.layers.utils import get_unpad_data, index_first_axis, pad_input
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.modules.convolution import ShortConvolution as same_convolution
from fla.modules.fused_norm_gate import FusedRMSNormGated as same_gate
from fla.modules.l2norm import l2_norm, l2norm
from fla.modules.layernorm import RMSNorm as same_norm
assert (same_convolution, same_gate, same_norm) == (ShortConvolution, FusedRMSNormGated, RMSNorm) and l2norm is l2_norm
import fla.modules
assert fla.modules.RMSNorm is RMSNorm and RMSNorm.__module__.startswith("training.fla_compat.")
assert all(sys.modules[name].__name__.startswith("training.fla_compat") for name in NAMES)
from fla.ops import chunk_gla
from fla.ops.gla import chunk_gla as same_gla
assert chunk_gla is same_gla and fla.ops.gla.chunk_gla is chunk_gla
try:
    import fla.ops.kda
except ModuleNotFoundError as error:
    print(error)
assert "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fla.ops.kda needs a CUDA device; without one there are fla.modules, ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for devices without CUDA")
def test_stand_ins_are_not_mixed_with_the_real_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    with pytest.raises(JobError, match=r"expected fla not to be imported yet(.|\n)*fix: call .*install"):
        install()
