"""The seeds against step-by-step definitions in float64, and the properties that every mixer of ours must have."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from training.architectures import ARCHITECTURES, SEEDS
from training.environment import seed_programs
from training.references import REFERENCES

ROOT = Path(__file__).resolve().parents[2]
ALL: dict[str, ModuleType] = {
    **{name: importlib.import_module(f"training.architectures.{name}") for name in ARCHITECTURES},
    **{name: importlib.import_module(f"training.references.{name}") for name in REFERENCES},
}
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}

both = pytest.mark.parametrize("name", list(SEEDS))
linear = pytest.mark.parametrize("name", list(ARCHITECTURES))
every = pytest.mark.parametrize("name", list(ALL))


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    return ALL[name].DeltaNet(**{"hidden_size": 16, "num_heads": 2, **config}).to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slow_layer(name: str, net: Any, x_BTD: Tensor, config: dict[str, Any]) -> Tensor:
    """The whole layer from the weights of `net`, written from the papers with the recurrences of oracles.py."""
    heads = config.get("num_heads", 2)

    key_dim = int(16 * config.get("expand_k", 1.0))
    qkv = x_BTD @ net.qkv_proj.weight.T
    if config.get("use_short_conv", True):
        qkv = oracles.depthwise_conv(qkv, net.qkv_conv.weight[:, 0], net.qkv_conv.bias)
    activation = ACTIVATIONS[config.get("qk_activation", "silu")]
    q, k, v = (
        activation(qkv[..., :key_dim]),
        activation(qkv[..., key_dim : 2 * key_dim]),
        F.silu(qkv[..., 2 * key_dim :]),
    )
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
    if config.get("qk_norm", "l2") == "l2":
        q, k = (t / (t.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    else:
        q, k = (t / t.abs().sum(-1, keepdim=True).clamp(min=1e-6) for t in (q, k))
    beta = torch.sigmoid(x_BTD @ net.b_proj.weight.T) if config.get("use_beta", True) else torch.ones_like(v[..., 0])
    if config.get("allow_neg_eigval", False):
        beta = 2 * beta
    if name == "gated_delta_net":
        step = torch.log1p(torch.exp(x_BTD @ net.a_proj.weight.T + net.dt_bias))
        o = oracles.gated_delta_rule(q, k, v, beta, -net.A_log.exp() * step)
    else:
        o = oracles.delta_rule(q, k, v, beta)
    if config.get("use_output_norm", True):
        o = oracles.rms(o, config.get("norm_eps", 1e-5)) * net.o_norm.weight
    o = o.flatten(-2)
    if config.get("use_gate", False) or name == "gated_delta_net":
        o = o * F.silu(x_BTD @ net.g_proj.weight.T)
    return o @ net.o_proj.weight.T


def with_gradients(net: nn.Module, out: Tensor, x: Tensor) -> list[Tensor]:
    weights = tokens(*out.shape, seed=7)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *net.parameters()])]


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@both
@pytest.mark.parametrize("length", [1, 2, 17, 63, 70])
@pytest.mark.parametrize(("heads", "negative"), [(2, False), (4, True)])
def test_layer_is_its_recurrence_in_outputs_and_gradients(name: str, length: int, heads: int, negative: bool) -> None:
    config = {"num_heads": heads, "allow_neg_eigval": negative, "use_gate": True, "conv_bias": True}
    net, x = build(name, **config), tokens(2, length, 16).requires_grad_()
    fast = with_gradients(net, net(x)[0], x)
    assert_same(fast, with_gradients(net, slow_layer(name, net, x, config), x), 1e-9)


CONFIGS = st.fixed_dictionaries(
    {
        "num_heads": st.sampled_from([1, 2, 4]),
        "expand_k": st.sampled_from([0.5, 1.0, 2.0]),
        "expand_v": st.sampled_from([0.5, 1.0, 2.0]),
        "use_beta": st.booleans(),
        "use_gate": st.booleans(),
        "use_short_conv": st.booleans(),
        "conv_size": st.integers(1, 5),
        "conv_bias": st.booleans(),
        "allow_neg_eigval": st.booleans(),
        "qk_activation": st.sampled_from(list(ACTIVATIONS)),
        "qk_norm": st.sampled_from(["l2", "sum"]),
        "use_output_norm": st.booleans(),
    }
)


@both
@settings(max_examples=25, deadline=None)
@given(config=CONFIGS, batch=st.integers(1, 3), length=st.integers(1, 50), seed=st.integers(0, 9))
def test_every_option_is_honoured(name: str, config: dict[str, Any], batch: int, length: int, seed: int) -> None:
    net, x = build(name, seed, **config), tokens(batch, length, 16, seed=seed + 10)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[0], slow_layer(name, net, x, config), rtol=1e-7, atol=1e-7)


@every
def test_a_position_sees_only_itself_and_what_came_before(name: str) -> None:
    net, x = build(name, use_gate=True), tokens(2, 70, 16)
    with torch.no_grad():
        whole = net(x)[0]
        for cut in (1, 2, 31, 32, 33, 64, 69):
            torch.testing.assert_close(net(x[:, :cut])[0], whole[:, :cut], rtol=1e-9, atol=1e-9)
            other = torch.cat([x[:, :cut], tokens(2, 70 - cut, 16, seed=5)], dim=1)
            torch.testing.assert_close(net(other)[0][:, :cut], whole[:, :cut], rtol=1e-9, atol=1e-9)


@every
def test_sequences_of_a_batch_do_not_mix(name: str) -> None:
    net, x = build(name), tokens(3, 40, 16)
    with torch.no_grad():
        alone = torch.cat([net(row)[0] for row in x.split(1)])
        torch.testing.assert_close(net(x)[0], alone, rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_tokens(name: str, side: str) -> None:
    net, x, junk = build(name, use_gate=True, conv_bias=True), tokens(2, 37, 16), 9 * tokens(2, 5, 16, seed=5)
    ones, zeros = torch.ones(2, 37, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    order = (junk, x) if side == "left" else (x, junk)
    mask = torch.cat((zeros, ones) if side == "left" else (ones, zeros), dim=1)
    padded = torch.cat(order, dim=1).requires_grad_()
    out = net(padded, attention_mask=mask)[0][mask.bool()].unflatten(0, (2, 37))
    bias_free = build(name, use_gate=True, conv_bias=True)  # the same weights: a convolution bias must not leak either
    torch.testing.assert_close(out, bias_free(x)[0], rtol=1e-9, atol=1e-9)
    assert torch.autograd.grad(out.sum(), padded)[0].isfinite().all()


# The filter of delta_net_fir counts positions, padding included.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "delta_net_fir"])
def test_padding_between_tokens_neither_writes_nor_forgets(name: str) -> None:
    net, x = build(name, use_short_conv=False), tokens(2, 40, 16)
    kept = torch.arange(40) % 3 != 1
    with torch.no_grad():
        out = net(x, attention_mask=kept.expand(2, 40))[0][:, kept]
        torch.testing.assert_close(out, net(x[:, kept])[0], rtol=1e-9, atol=1e-9)


@every
def test_wrong_masks_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] = \[2, 5\], got \[5\]"):
        build(name)(tokens(2, 5, 16), attention_mask=torch.ones(5))


@every
@pytest.mark.parametrize("length", [1, 2, 17, 63, 200])
def test_bfloat16_runs_and_stays_close(name: str, length: int) -> None:
    net, x = build(name, dtype=torch.float32), tokens(2, length, 16, dtype=torch.float32)
    want = net(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = net(x)[0]
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.1 * want.abs().max()
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    whole = build(name, dtype=torch.bfloat16)(x.bfloat16())[0]
    assert whole.dtype == torch.bfloat16 and (whole - want).abs().max() < 0.1 * want.abs().max()


@every
def test_cache_and_flags_pass_through(name: str) -> None:
    cache = object()
    net, x = build(name), tokens(1, 3, 16)
    out, extra, handed_back = net(x, past_key_values=cache, use_cache=True, output_attentions=True, cu_seqlens=None)
    assert extra is None and handed_back is cache
    torch.testing.assert_close(out, net(x)[0])


WITHOUT = {"mamba2": {"qk_norm"}, "rwkv7": {"qk_norm", "qk_activation", "conv_size"}}
"""Arguments that a mechanism accepts without effect, whatever their value."""


@linear
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 10, "num_heads": 4}, "num_heads must divide .* 10 and .*10, got 4"),
        ({"hidden_size": 16, "num_heads": 4, "expand_v": 0.1}, "num_heads must divide"),
        ({"num_heads": 0}, "num_heads must divide"),
        ({"qk_norm": "l3"}, r"qk_norm must be one of \['l2', 'sum'\], got 'l3'"),
        ({"qk_activation": "gelu"}, "qk_activation must be one of .*, got 'gelu'"),
        ({"conv_size": 0}, "conv_size must be at least 1, got 0"),
    ],
)
def test_impossible_arguments_are_refused(name: str, config: dict[str, Any], message: str) -> None:
    if set(config) & WITHOUT.get(name, set()):
        build(name, **config)
        return
    with pytest.raises(ValueError, match=message):
        build(name, **config)


@pytest.mark.parametrize("name", ["softmax_attention", "retnet"])
def test_rotation_refuses_odd_keys(name: str) -> None:
    with pytest.raises(ValueError, match=r"half the key width 6 .* got 2"):
        build(name, hidden_size=6, num_heads=2)


def test_corrections_a_token_are_counted() -> None:
    with pytest.raises(ValueError, match="num_householder must be at least 1, got 0"):
        build("gated_delta_product", num_householder=0)


@every
def test_signature_is_the_published_contract(name: str) -> None:
    parameters = inspect.signature(ALL[name].DeltaNet.__init__).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert defaults == {
        **({"num_householder": 2} if name == "gated_delta_product" else {}),
        "mode": "chunk1",
        "d_model": None,
        "hidden_size": 1024,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "num_heads": 4,
        "use_beta": True,
        "use_gate": False,
        "use_short_conv": True,
        "conv_size": 4,
        "conv_bias": False,
        "allow_neg_eigval": False,
        "layer_idx": None,
        "qk_activation": "silu",
        "qk_norm": "l2",
        "norm_eps": 1e-5,
    }
    assert list(parameters)[-1] == "kwargs"
    assert list(inspect.signature(ALL[name].DeltaNet.forward).parameters) == [
        *("self", "hidden_states", "attention_mask", "past_key_values", "use_cache", "output_attentions", "kwargs")
    ]
    assert build(name, hidden_size=999, d_model=16)(tokens(1, 2, 16))[0].shape == (1, 2, 16)


def test_programs_are_single_files_that_import_fla_only_where_a_kernel_is_called() -> None:
    for path in (*ARCHITECTURES.values(), *REFERENCES.values()):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kernels = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("fla_")]
        inside = {id(node) for kernel in kernels for node in ast.walk(kernel)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                allowed = {"fla"} if id(node) in inside else {"__future__", "typing", "math", "torch", "einops"}
                assert name is not None and name.split(".")[0] in allowed, (path.name, name)
        assert len(kernels) == (path.stem in ARCHITECTURES), path.name


def test_only_the_seeds_are_roots_and_part_of_a_baseline() -> None:
    assert list(SEEDS) == list(seed_programs()) == ["delta_net", "gated_delta_net"]
    folder = next(iter(SEEDS.values())).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(ARCHITECTURES)


def test_listing_the_programs_needs_no_torch() -> None:
    code = "import sys, training.architectures, training.references; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class _CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@linear
def test_work_is_linear_in_length_and_sequential_only_between_chunks(name: str) -> None:
    net = build(name, dtype=torch.float32)
    flops, calls = [], []
    for length in (256, 512, 1024):
        x = tokens(1, length, 16, dtype=torch.float32)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _CountCalls() as counted:
            net(x)
        flops.append(counter.get_total_flops())
        calls.append(counted.calls)
    assert flops[2] / flops[1] == pytest.approx(2.0, rel=0.01)
    assert (calls[2] - calls[1]) / (512 / 32) <= 2  # operations a chunk of 32 tokens


def test_attention_is_softmax_over_the_past_with_rotary_positions() -> None:
    net, x = build("softmax_attention"), tokens(2, 13, 16).requires_grad_()
    q, k, v = ((x @ p.weight.T).unflatten(-1, (2, -1)) for p in (net.q_proj, net.k_proj, net.v_proj))  # type: ignore[union-attr]
    want = oracles.softmax_attention(q, k, v).flatten(-2) @ net.o_proj.weight.T  # type: ignore[union-attr]
    assert_same(with_gradients(net, net(x)[0], x), with_gradients(net, want, x), 1e-9)
