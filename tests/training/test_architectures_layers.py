"""Whole baseline layers, from their weights, against slow definitions written from the papers, in float64.

Every option, outputs and gradients. The seeds stand in test_architectures.py.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from training.architectures import ARCHITECTURES, SEEDS

HIDDEN = 16
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}
Config = dict[str, Any]


def unit(x: Tensor, kind: str = "l2") -> Tensor:
    if kind == "l2":
        return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    return x / x.abs().sum(-1, keepdim=True).clamp(min=1e-6)


def linear(layer: Any, x: Tensor) -> Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def through(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = linear(layer, x)
    return x


def streams(net: Any, x: Tensor, config: Config, keys: int = 2, values: int = 1) -> list[Tensor]:
    """q, every k and every v [B, T, H, D] of the layers that share DeltaNet's frame; features and norms applied."""
    heads, kind = config["num_heads"], config["qk_norm"]
    key_dim = int(HIDDEN * config["expand_k"])
    qkv = linear(net.qkv_proj, x)
    if config["use_short_conv"]:
        qkv = oracles.depthwise_conv(qkv, net.qkv_conv.weight[:, 0], net.qkv_conv.bias)
    qk, v = qkv[..., : keys * key_dim], qkv[..., keys * key_dim :]
    activation = ACTIVATIONS[config["qk_activation"]]
    found = [unit(activation(part).unflatten(-1, (heads, -1)), kind) for part in qk.chunk(keys, dim=-1)]
    return [*found, *(F.silu(part).unflatten(-1, (heads, -1)) for part in v.chunk(values, dim=-1))]


def strength(net: Any, x: Tensor, config: Config, steps: int = 1) -> Tensor:
    heads = config["num_heads"]
    beta = torch.sigmoid(linear(net.b_proj, x)) if config["use_beta"] else x.new_ones(*x.shape[:2], steps * heads)
    return (2 if config["allow_neg_eigval"] else 1) * beta


def finish(net: Any, o: Tensor, config: Config, gate: Tensor | None) -> Tensor:
    if config["use_output_norm"]:
        o = oracles.rms(o, 1e-5) * net.o_norm.weight
    o = o.flatten(-2)
    return linear(net.o_proj, o if gate is None else o * gate)


def linear_attention(net: Any, x: Tensor, config: Config) -> Tensor:
    q, k, v = streams(net, x, config)
    o = torch.einsum("bthk,bshk,bshv,ts->bthv", q, k, v, torch.ones(x.shape[1], x.shape[1]).double().tril())
    return finish(net, o, config, F.silu(linear(net.g_proj, x)) if config["use_gate"] else None)


def retnet(net: Any, x: Tensor, config: Config) -> Tensor:
    q, k, v = streams(net, x, config)
    gamma_H = 1 - 2.0 ** (-5 - torch.arange(config["num_heads"]).double())
    log_decay = gamma_H.log()[:, None].expand_as(k)
    o = oracles.diagonal(oracles.rotary(q), oracles.rotary(k), v, log_decay)
    return finish(net, o, config, F.silu(linear(net.g_proj, x)))


def gla(net: Any, x: Tensor, config: Config) -> Tensor:
    q, k, v = streams(net, x, config)
    decay = torch.sigmoid(through(net.a_proj, x)).pow(1 / 16).unflatten(-1, (config["num_heads"], -1))
    return finish(net, oracles.diagonal(q, k, v, decay.log()), config, F.silu(linear(net.g_proj, x)))


def kimi_delta_attention(net: Any, x: Tensor, config: Config) -> Tensor:
    q, k, v = streams(net, x, config)
    step = torch.log1p(torch.exp(through(net.a_proj, x) + net.dt_bias)).unflatten(-1, (config["num_heads"], -1))
    o = oracles.kimi_delta(q, k, v, strength(net, x, config), -net.A_log.exp()[:, None] * step)
    return finish(net, o, config, torch.sigmoid(through(net.g_proj, x)))


def gated_delta_product(net: Any, x: Tensor, config: Config) -> Tensor:
    n, heads = net.num_householder, config["num_heads"]
    found = streams(net, x, config, 1 + n, n)
    q, k, v = found[0], torch.stack(found[1 : 1 + n], dim=2), torch.stack(found[1 + n :], dim=2)
    beta = strength(net, x, config, n).unflatten(-1, (n, heads))
    log_decay = -net.A_log.exp() * torch.log1p(torch.exp(linear(net.a_proj, x) + net.dt_bias))
    o = oracles.delta_product(q, k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2), log_decay)
    return finish(net, o, config, F.silu(linear(net.g_proj, x)))


def delta_net_fir(net: Any, x: Tensor, config: Config) -> Tensor:
    q, k, v = streams(net, x, config)
    read = oracles.delta_rule(q, k, v, strength(net, x, config))
    local = oracles.depthwise_conv(v.flatten(-2), net.taps).unflatten(-1, (config["num_heads"], -1))
    share = torch.sigmoid(linear(net.f_proj, x))[..., None]
    gate = F.silu(linear(net.g_proj, x)) if config["use_gate"] else None
    return finish(net, (1 - share) * read + share * local, config, gate)


def mamba2(net: Any, x: Tensor, config: Config) -> Tensor:
    heads, state = config["num_heads"], int(HIDDEN * config["expand_k"]) // config["num_heads"]
    bcx = linear(net.bcx_proj, x)
    if config["use_short_conv"]:
        bcx = oracles.depthwise_conv(bcx, net.bcx_conv.weight[:, 0], net.bcx_conv.bias)
    b, c = (ACTIVATIONS[config["qk_activation"]](t) for t in (bcx[..., :state], bcx[..., state : 2 * state]))
    values = F.silu(bcx[..., 2 * state :]).unflatten(-1, (heads, -1))
    step = torch.log1p(torch.exp(linear(net.dt_proj, x) + net.dt_bias))
    rate = (-net.A_log.exp() * step)[..., None].expand(*step.shape, state)
    b_all, c_all = (t[:, :, None].expand(-1, -1, heads, -1) for t in (b, c))
    y = oracles.diagonal(c_all, b_all, step[..., None] * values, rate) + net.D[:, None] * values
    y = y.flatten(-2) * F.silu(linear(net.z_proj, x))
    return linear(net.o_proj, oracles.rms(y, 1e-5) * net.o_norm.weight if config["use_output_norm"] else y)


def rwkv7(net: Any, x: Tensor, config: Config) -> Tensor:
    heads = config["num_heads"]
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1) if config["use_short_conv"] else x
    r_in, w_in, k_in, v_in, a_in, g_in = (x + (before - x) * share for share in net.shift)
    r, k, v = linear(net.r_proj, r_in), linear(net.k_proj, k_in), linear(net.v_proj, v_in)
    w = linear(net.w_map.up, torch.tanh(linear(net.w_map.down, w_in)))
    rate = torch.sigmoid(linear(net.a_map.up, linear(net.a_map.down, a_in)))
    gate = linear(net.g_map.up, torch.sigmoid(linear(net.g_map.down, g_in)))
    removal = unit((k * net.removal_scale).unflatten(-1, (heads, -1)))
    k = k * (1 + (rate - 1) * net.rate_mix)
    log_w = -math.exp(-0.5) * torch.sigmoid(w)
    r, log_w, k, rate, v = (t.unflatten(-1, (heads, -1)) for t in (r, log_w, k, rate, v))
    o = oracles.low_rank_transition(r, log_w, k, v, -removal, rate * removal)
    if config["use_output_norm"]:
        centred = o - o.mean(-1, keepdim=True)
        o = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5 * o.shape[-1]).sqrt()
        o = o * net.norm_weight.unflatten(0, (heads, -1)) + net.norm_bias.unflatten(0, (heads, -1))
    o = o + (r * k * net.bonus).sum(-1, keepdim=True) * v
    return linear(net.o_proj, o.flatten(-2) * gate)


DEFINITIONS: dict[str, Callable[[Any, Tensor, Config], Tensor]] = {
    "linear_attention": linear_attention,
    "retnet": retnet,
    "gla": gla,
    "mamba2": mamba2,
    "delta_net_fir": delta_net_fir,
    "gated_delta_product": gated_delta_product,
    "kimi_delta_attention": kimi_delta_attention,
    "rwkv7": rwkv7,
}
every = pytest.mark.parametrize("name", list(DEFINITIONS))
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
FULL: Config = {
    "num_heads": 2,
    "expand_k": 1.0,
    "expand_v": 2.0,
    "use_beta": True,
    "use_gate": True,
    "use_short_conv": True,
    "conv_size": 4,
    "conv_bias": True,
    "allow_neg_eigval": True,
    "qk_activation": "silu",
    "qk_norm": "l2",
    "use_output_norm": True,
}


def build(name: str, config: Config, seed: int = 0) -> nn.Module:
    """A layer whose parameters are moved, so that none is zero or one and hides a mistake."""
    torch.manual_seed(seed)
    net = importlib.import_module(f"training.architectures.{name}").DeltaNet(hidden_size=HIDDEN, **config).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def tokens(batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, HIDDEN, generator=generator, dtype=torch.float64)


def test_every_baseline_has_its_definition_here() -> None:
    assert set(DEFINITIONS) == set(ARCHITECTURES) - set(SEEDS)


@every
@pytest.mark.parametrize("length", [1, 37])
def test_layer_is_its_definition_in_outputs_and_gradients(name: str, length: int) -> None:
    net, x = build(name, FULL), tokens(2, length, 1).requires_grad_()
    weights = tokens(2, length, 2)
    found = []
    for out in (net(x)[0], DEFINITIONS[name](net, x, FULL)):
        found.append([out, *torch.autograd.grad((out * weights).sum(), [x, *net.parameters()])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@every
@settings(max_examples=10, deadline=None)
@given(config=CONFIGS, batch=st.integers(1, 3), length=st.integers(1, 40), seed=st.integers(0, 9))
def test_every_option_is_honoured(name: str, config: Config, batch: int, length: int, seed: int) -> None:
    net, x = build(name, config, seed), tokens(batch, length, seed + 10)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[0], DEFINITIONS[name](net, x, config), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_corrections_a_token(count: int) -> None:
    config = {**FULL, "num_householder": count}
    net, x = build("gated_delta_product", config), tokens(2, 33, 3)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[0], gated_delta_product(net, x, config), rtol=1e-8, atol=1e-8)
