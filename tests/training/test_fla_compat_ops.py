"""The stand-ins for fla's operators against definitions in float64, fla's own plain-torch files, and its signatures."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from training.fla_compat import ops
from training.worker import counting

Inputs = dict[str, Tensor]


def inputs(batch: int, length: int, heads: int = 2, keys: int = 4, values: int = 3, strong: float = 1.0) -> Inputs:
    """q, k (of unit length), v, beta in (0, 2), g by head and gk by channel, float64."""
    generator = torch.Generator().manual_seed(length)
    q, k, gk = (torch.randn(batch, length, heads, keys, generator=generator, dtype=torch.float64) for _ in range(3))
    v = torch.randn(batch, length, heads, values, generator=generator, dtype=torch.float64)
    beta = 2 * torch.rand(batch, length, heads, generator=generator, dtype=torch.float64)
    decays = {"g": strong * F.logsigmoid(gk[..., 0]), "gk": strong * F.logsigmoid(gk)}
    return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": beta, **decays}


def constant(g: Tensor) -> Tensor:
    """[B, T, H]: the first decay of each head at every token."""
    return g[:1, :1].expand_as(g)


OPERATORS: dict[str, tuple[Callable[[Inputs], Any], Callable[[Inputs, Tensor], Tensor]]] = {
    "delta_rule": (
        lambda a: (ops.chunk_delta_rule, (a["q"], a["k"], a["v"], a["beta"])),
        lambda a, q: oracles.delta_rule(q, a["k"], a["v"], a["beta"]),
    ),
    "recurrent delta_rule": (
        lambda a: (ops.fused_recurrent_delta_rule, (a["q"], a["k"], a["v"])),
        lambda a, q: oracles.delta_rule(q, a["k"], a["v"], torch.ones_like(a["beta"])),
    ),
    "gated_delta_rule": (
        lambda a: (ops.chunk_gated_delta_rule, (a["q"], a["k"], a["v"], a["g"], a["beta"])),
        lambda a, q: oracles.gated_delta_rule(q, a["k"], a["v"], a["beta"], a["g"]),
    ),
    "recurrent gated_delta_rule": (
        lambda a: (
            functools.partial(ops.fused_recurrent_gated_delta_rule, beta=a["beta"]),
            (a["q"], a["k"], a["v"], a["g"]),
        ),
        lambda a, q: oracles.gated_delta_rule(q, a["k"], a["v"], a["beta"], a["g"]),
    ),
    "linear_attn": (
        lambda a: (functools.partial(ops.chunk_linear_attn, normalize=False), (a["q"], a["k"], a["v"])),
        lambda a, q: oracles.diagonal(q, a["k"], a["v"], torch.zeros_like(a["k"])),
    ),
    "recurrent linear_attn": (
        lambda a: (ops.fused_recurrent_linear_attn, (a["q"], a["k"], a["v"])),
        lambda a, q: oracles.diagonal(q, a["k"], a["v"], torch.zeros_like(a["k"])),
    ),
    "gla": (
        lambda a: (ops.chunk_gla, (a["q"], a["k"], a["v"], a["gk"])),
        lambda a, q: oracles.diagonal(q, a["k"], a["v"], a["gk"]),
    ),
    "recurrent gla": (
        lambda a: (ops.fused_recurrent_gla, (a["q"], a["k"], a["v"], a["gk"])),
        lambda a, q: oracles.diagonal(q, a["k"], a["v"], a["gk"]),
    ),
    "simple_gla": (
        lambda a: (ops.chunk_simple_gla, (a["q"], a["k"], a["v"], a["g"])),
        lambda a, q: oracles.diagonal(q, a["k"], a["v"], a["g"][..., None].expand_as(a["k"])),
    ),
    "simple_gla by head": (
        lambda a: (
            functools.partial(ops.fused_recurrent_simple_gla, g_gamma=a["g"][0, 0]),
            (a["q"], a["k"], a["v"]),
        ),
        lambda a, q: oracles.diagonal(q, a["k"], a["v"], constant(a["g"])[..., None].expand_as(a["k"])),
    ),
}
every = pytest.mark.parametrize("name", list(OPERATORS))


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def gradients(o: Tensor, a: Inputs) -> list[Tensor]:
    weight = torch.linspace(-1.0, 1.0, o.numel(), dtype=o.dtype).view_as(o)
    return list(torch.autograd.grad((o * weight).sum(), list(a.values()), materialize_grads=True))


@every
@pytest.mark.parametrize(("length", "strong"), [(1, 1.0), (37, 1.0), (130, 1.0), (70, 40.0)])
def test_outputs_and_gradients_are_those_of_the_recurrence(name: str, length: int, strong: float) -> None:
    call, oracle = OPERATORS[name]
    a = {key: value.requires_grad_() for key, value in inputs(2, length, strong=strong).items()}
    function, arguments = call(a)
    o, state = function(*arguments)
    want = oracle(a, a["q"] / 2)  # 1 / sqrt(4)
    assert state is None
    same(o, want)
    for got, wanted in zip(gradients(o, a), gradients(want, a), strict=True):
        same(got, wanted)


@every
@settings(max_examples=5, deadline=None)
@given(cut=st.integers(1, 69), scale=st.sampled_from([1.0, 0.3]))
def test_a_state_carries_a_sequence_on(name: str, cut: int, scale: float) -> None:
    a = inputs(2, 70)
    call, oracle = OPERATORS[name]
    parts, state = [], None
    for piece in (slice(None, cut), slice(cut, None)):
        function, arguments = call({**{key: x[:, piece] for key, x in a.items()}, "g": a["g"][:, piece]})
        if "by head" in name:
            function = functools.partial(function.func, g_gamma=a["g"][0, 0])
        o, state = function(*arguments, scale=scale, initial_state=state, output_final_state=True)
        assert state.shape == (2, 2, 4, 3)
        parts.append(o)
    same(torch.cat(parts, dim=1), oracle(a, a["q"] * scale))


def naive(package: str, function: str) -> Any:
    """fla.ops.<package>.naive.<function>, from its file alone."""
    spec = importlib.util.spec_from_file_location(f"naive_{package}", oracles.FLA_OPS / package / "naive.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def test_results_are_those_of_the_naive_forms_of_fla() -> None:
    a = {name: value.float() for name, value in inputs(2, 70).items()}
    q, k, v, g, gk, beta = (a[name] for name in ("q", "k", "v", "g", "gk", "beta"))
    start = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    first = {"initial_state": start, "output_final_state": True}
    heads_first = [x.transpose(1, 2) for x in (q, k, v, beta)]
    delta_o, delta_state = naive("delta_rule", "delta_rule_recurrence")(*heads_first, start, True)
    pairs = [
        (ops.chunk_delta_rule(q, k, v, beta, **first), (delta_o.transpose(1, 2), delta_state)),
        (
            ops.chunk_gated_delta_rule(q, k, v, g, beta, **first),
            naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")(q, k, v, beta, g, **first),
        ),
        (ops.chunk_gla(q, k, v, gk, **first), naive("gla", "naive_recurrent_gla")(q, k, v, gk, **first)),
        (
            ops.chunk_simple_gla(q, k, v, g, **first),
            naive("simple_gla", "naive_recurrent_simple_gla")(q, k, v, g, **first),
        ),
    ]
    for (o, state), (want, wanted_state) in pairs:
        torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state, wanted_state, rtol=1e-4, atol=1e-4)
    positive = {"initial_state": (start, k.abs()[:, :1]), "output_final_state": True, "normalize": True}
    got = ops.chunk_linear_attn(q.abs(), k.abs(), v, **positive)
    wanted = naive("linear_attn", "naive_recurrent_linear_attn")(q.abs(), k.abs(), v, **positive)
    for one, two in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_what_the_kernels_do_inside_is_done_here_too() -> None:
    a = inputs(2, 20)
    q, k, v, g, beta = (a[name] for name in ("q", "k", "v", "g", "beta"))
    unit = {"use_qk_l2norm_in_kernel": True}
    long = ops.chunk_delta_rule(3 * q, 5 * k, v, beta, **unit)[0]
    torch.testing.assert_close(long, ops.chunk_delta_rule(q, k, v, beta, **unit)[0], rtol=1e-5, atol=1e-5)
    a_log, bias = torch.tensor([0.1, -0.3]).double(), torch.tensor([0.5, 1.0]).double()
    inside = ops.chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        use_gate_in_kernel=True,
        A_log=a_log,
        dt_bias=bias,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
    )[0]
    outside = ops.chunk_gated_delta_rule(q, k, v, -a_log.exp() * F.softplus(g + bias), 2 * beta.sigmoid())[0]
    same(inside, outside)
    wide_v, wide_g, wide_beta = (torch.cat([x, 0.5 * x], dim=2) for x in (v, g, beta))
    grouped = ops.chunk_gated_delta_rule(q, k, wide_v, wide_g, wide_beta)[0]
    q4, k4 = (x.repeat_interleave(2, dim=2) for x in (q, k))
    same(grouped, ops.chunk_gated_delta_rule(q4, k4, wide_v, wide_g, wide_beta)[0])
    turned = ops.chunk_gla(q, k, v, a["gk"], output_final_state=True, state_v_first=True)[1]
    assert turned is not None and turned.shape == (2, 2, 3, 4)
    again = ops.chunk_gla(q, k, v, a["gk"], initial_state=turned, state_v_first=True)[0]
    same(again, ops.chunk_gla(q, k, v, a["gk"], initial_state=turned.transpose(-1, -2))[0])


def test_what_cannot_be_met_is_refused_by_name() -> None:
    a = inputs(1, 5)
    q, k, v, g = (a[name] for name in ("q", "k", "v", "g"))
    for call, name in (
        (lambda: ops.chunk_gla(q, k, v, a["gk"], cu_seqlens=torch.tensor([0, 5])), "cu_seqlens"),
        (lambda: ops.fused_recurrent_gla(q, k, v, a["gk"], gv=v), "gv"),
        (lambda: ops.fused_recurrent_linear_attn(q, k, v, reverse=True), "reverse"),
        (lambda: ops.chunk_delta_rule(q, k, v, a["beta"], head_first=True), "head_first"),
        (lambda: ops.chunk_gla(q, k, v, g), "of the shape of k"),
        (lambda: ops.chunk_delta_rule(q, k, v, q), "expected beta of shape"),
        (lambda: ops.chunk_simple_gla(q, k, v, g, g[0, 0]), "got both"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


@every
def test_work_is_linear_and_16_bits_come_back_as_16_bits(name: str) -> None:
    flops = []
    for length in (256, 1024):
        function, arguments = OPERATORS[name][0](inputs(1, length))
        with torch.no_grad(), counting.Count() as counted:
            function(*arguments)
        flops.append(counted.flops + counted.elements)
    assert flops[1] <= 4.1 * flops[0]
    coarse = {key: x if key == "g" else x.bfloat16() for key, x in inputs(1, 40).items()}
    function, arguments = OPERATORS[name][0]({**coarse, "g": coarse["g"].float()})
    o, state = function(*arguments, output_final_state=True)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    function, arguments = OPERATORS[name][0]({key: x.double() for key, x in coarse.items()})
    torch.testing.assert_close(o.double(), function(*arguments)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("package", "name"),
    [
        (package, f"{form}_{package}")
        for package in ("delta_rule", "gated_delta_rule", "linear_attn", "gla", "simple_gla")
        for form in ("chunk", "fused_recurrent")
    ],
)
def test_arguments_stand_in_the_order_of_fla(package: str, name: str) -> None:
    file = "chunk.py" if name.startswith("chunk") else "fused_recurrent.py"
    tree = ast.parse((oracles.FLA_OPS / package / file).read_text(encoding="utf-8"))
    (node,) = [item for item in ast.walk(tree) if isinstance(item, ast.FunctionDef) and item.name == name]
    real = [argument.arg for argument in node.args.args]
    ours = inspect.signature(getattr(ops, name)).parameters.values()
    placed = [item.name for item in ours if item.kind is item.POSITIONAL_OR_KEYWORD]
    assert placed == real[: len(placed)] and len(placed) >= 8
    assert len(placed) == len(real) or any(item.kind is item.VAR_KEYWORD for item in ours)
