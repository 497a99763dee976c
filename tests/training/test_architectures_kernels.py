"""The chunkwise kernels of the architectures against step-by-step recurrences in float64: outputs and gradients,
lengths around chunk edges, decays from none to those that empty the memory; fla's own plain-torch forms beside ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from training.architectures import (
    ARCHITECTURES,
    delta_net,
    delta_net_fir,
    gated_delta_net,
    gated_delta_product,
    gla,
    kimi_delta_attention,
    linear_attention,
    mamba2,
    retnet,
    rwkv7,
)

HEADS, KEYS, VALUES = 2, 4, 3


@dataclass(frozen=True)
class Kernel:
    """A chunkwise form, its definition, and the arguments that both take: letters of `arguments`."""

    run: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    arguments: str


def ssd(c_BTK: Tensor, b_BTK: Tensor, x_BTHV: Tensor, log_decay_BTH: Tensor) -> Tensor:
    c_BTHK, b_BTHK = (t[:, :, None].expand(-1, -1, HEADS, -1) for t in (c_BTK, b_BTK))
    return oracles.diagonal(c_BTHK, b_BTHK, x_BTHV, log_decay_BTH[..., None].expand_as(b_BTHK))


def retention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_BTH: Tensor) -> Tensor:
    return oracles.diagonal(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH[..., None].expand_as(k_BTHK))


def adding(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
    return oracles.diagonal(q_BTHK, k_BTHK, v_BTHV, torch.zeros_like(k_BTHK))


KERNELS = {
    "delta_net": Kernel(delta_net.chunked_delta_rule, oracles.delta_rule, "qkvb"),
    "delta_net_fir": Kernel(delta_net_fir.chunked_delta_rule, oracles.delta_rule, "qkvb"),
    "gated_delta_net": Kernel(gated_delta_net.chunked_gated_delta_rule, oracles.gated_delta_rule, "qkvbg"),
    "linear_attention": Kernel(linear_attention.chunked_linear_attention, adding, "qkv"),
    "retnet": Kernel(retnet.chunked_retention, retention, "qkvg"),
    "mamba2": Kernel(mamba2.chunked_ssd, ssd, "CBvg"),
    "gla": Kernel(gla.chunked_gla, oracles.diagonal, "qkvG"),
    "kimi_delta_attention": Kernel(kimi_delta_attention.chunked_kda, oracles.kimi_delta, "qkvbG"),
    "gated_delta_product": Kernel(gated_delta_product.chunked_gated_delta_product, oracles.delta_product, "q2k2v2bg"),
    "rwkv7": Kernel(rwkv7.chunked_rwkv7, oracles.low_rank_transition, "qwKvae"),
}
every = pytest.mark.parametrize("name", list(KERNELS))


def arguments(name: str, batch: int, length: int, decay: float, seed: int = 0) -> list[Tensor]:
    """Unit keys, write strengths in (0, 2), log decays between 0 and -2 `decay` a token (of RWKV-7: of its bound)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def drawn(letter: str, steps: int) -> Tensor:
        if letter in "CB":
            return draw(batch, steps, KEYS)
        if letter in "bg":
            strength = 2.0 * draw(batch, steps, HEADS).sigmoid()
            return strength if letter == "b" else -decay * strength
        if letter == "v":
            return draw(batch, steps, HEADS, VALUES)
        x = draw(batch, steps, HEADS, KEYS)
        if letter in "kqK":
            return x if letter != "k" else F.normalize(x, dim=-1)
        if letter == "G":
            return -2.0 * decay * x.sigmoid()
        if letter == "w":
            return rwkv7.LEAST_LOG_DECAY * (decay * x).sigmoid()
        return F.normalize(x, dim=-1) if letter == "a" else -F.normalize(x, dim=-1) * draw(1).sigmoid()

    found, steps = [], length
    for letter in KERNELS[name].arguments:
        if letter == "2":
            steps = 2 * length
            continue
        found.append(drawn(letter, steps))
        steps = length
    if name == "rwkv7":  # what is removed is what is read
        found[5] = -found[4] * torch.rand(found[4].shape, generator=generator, dtype=torch.float64)
    return found


def with_gradients(run: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    out = run(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


def test_every_architecture_has_its_kernel_here() -> None:
    assert set(KERNELS) == set(ARCHITECTURES)


@every
@pytest.mark.parametrize("length", [1, 31, 32, 33, 69])
@pytest.mark.parametrize("decay", [0.02, 2.0])
def test_kernel_is_its_recurrence_in_outputs_and_gradients(name: str, length: int, decay: float) -> None:
    given, kernel = arguments(name, 2, length, decay), KERNELS[name]
    for got, want in zip(with_gradients(kernel.run, given), with_gradients(kernel.definition, given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 100),
    decay=st.sampled_from([0.0, 0.1, 5.0, 500.0]),
    seed=st.integers(0, 9),
)
def test_any_length_batch_and_decay(name: str, batch: int, length: int, decay: float, seed: int) -> None:
    given_, kernel = arguments(name, batch, length, decay, seed), KERNELS[name]
    torch.testing.assert_close(kernel.run(*given_), kernel.definition(*given_), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if set("gG") & set(kernel.arguments)])
@pytest.mark.parametrize("decay", [3.0, 60.0, 3000.0])
def test_float32_survives_decays_that_empty_the_memory(name: str, decay: float) -> None:
    given, kernel = arguments(name, 1, 70, decay), KERNELS[name]
    # Strong and weak channels and tokens side by side: what one forgets must not spoil what another keeps.
    gates = next(i for i, letter in enumerate(kernel.arguments.replace("2", "")) if letter in "gG")
    given[gates] = torch.where(torch.arange(70).view(1, -1, *[1] * (given[gates].dim() - 2)) % 7 == 3, given[gates], 0)
    found = with_gradients(kernel.run, [x.float() for x in given])
    for got, want in zip(found, with_gradients(kernel.definition, given), strict=True):
        scale = max(1.0, want.detach().abs().max().item())
        torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "kimi_delta_attention", "gated_delta_product"])
@pytest.mark.parametrize("strength", [1.0, 1.9])
def test_float32_is_exact_where_a_series_for_the_inverse_cancels(name: str, strength: float) -> None:
    given, kernel = arguments(name, 1, 130, 0.01), KERNELS[name]
    for i, letter in enumerate(kernel.arguments.replace("2", "")):
        if letter == "k":  # one direction, again and again
            given[i] = F.normalize(given[i][:, :1] + 0.02 * given[i], dim=-1)
        elif letter == "b":
            given[i] = torch.full_like(given[i], strength)
    want = kernel.definition(*given)
    assert (kernel.run(*(x.float() for x in given)) - want).abs().max() / want.abs().max() < 1e-4


def plain_fla(module: str) -> ModuleType:
    """A pure-torch file of fla executed by itself: importing the package would load Triton kernels for ten seconds."""
    path = oracles.FLA_OPS / module / "naive.py"
    spec = importlib.util.spec_from_file_location(f"plain_fla_{module.replace('/', '_')}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def fla_forms() -> dict[str, tuple[Callable[..., Any], ...]]:
    """Our name -> functions of our arguments that give what fla's files give."""
    delta, gated, kda = plain_fla("delta_rule"), plain_fla("gated_delta_rule"), plain_fla("kda")
    dplr = plain_fla("generalized_delta_rule/dplr")

    def head_first(run: Callable[..., Any], scaled: bool = True) -> Callable[..., Tensor]:
        def call(*given: Tensor) -> Tensor:
            q, *others = (x.transpose(1, 2) for x in given)
            return run(q * q.shape[-1] ** 0.5 if scaled else q, *others)[0].transpose(1, 2)

        return call

    def dplr_order(run: Callable[..., Any]) -> Callable[..., Tensor]:
        return head_first(lambda r, w, k, v, a, b: run(r, k, v, a, b, w))

    def product(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor) -> Tensor:
        run = plain_fla("gated_delta_product").naive_recurrent_gated_delta_product
        return run(q, k, v, g, b, 1.0, num_householder=2)[0]

    return {
        "delta_net": (head_first(delta.delta_rule_recurrence), head_first(delta.delta_rule_chunkwise)),
        "gated_delta_net": (
            lambda *x: gated.naive_recurrent_gated_delta_rule(*x, scale=1.0)[0],
            lambda q, k, v, b, g: gated.naive_chunk_gated_delta_rule(q, k, v, g, b, scale=1.0)[0],
        ),
        "linear_attention": (
            lambda *x: plain_fla("linear_attn").naive_recurrent_linear_attn(*x, scale=1.0)[0],
            lambda *x: plain_fla("linear_attn").naive_chunk_linear_attn(*x, scale=1.0),
        ),
        "retnet": (
            lambda *x: plain_fla("simple_gla").naive_recurrent_simple_gla(*x, scale=1.0)[0],
            lambda *x: plain_fla("simple_gla").naive_chunk_simple_gla(*x, scale=1.0)[0],
            lambda *x: plain_fla("simple_gla").naive_parallel_simple_gla(*x, scale=1.0)[0],
        ),
        "gla": (lambda q, *x: plain_fla("gla").naive_recurrent_gla(q * q.shape[-1] ** 0.5, *x)[0],),
        "kimi_delta_attention": (
            lambda q, k, v, b, g: kda.naive_recurrent_kda(q, k, v, g, b, scale=1.0)[0],
            lambda q, k, v, b, g: kda.naive_chunk_kda(q, k, v, g, b, scale=1.0)[0],
        ),
        "gated_delta_product": (product,),
        "rwkv7": (dplr_order(dplr.dplr_recurrence), dplr_order(dplr.dplr_chunkwise)),
    }


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ("mamba2", "delta_net_fir")])
def test_kernel_agrees_with_the_plain_forms_of_fla(name: str) -> None:
    given = [x.float() for x in arguments(name, 2, 64, 0.2)]
    ours = with_gradients(KERNELS[name].run, given)
    for form in fla_forms()[name]:
        for got, want in zip(with_gradients(form, given), ours, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_retention_decays_as_in_fla() -> None:
    q, k, v, _ = arguments("retnet", 1, 20, 0.0)
    log_decay = torch.log1p(-(2.0 ** (-5.0 - torch.arange(HEADS).double()))).expand(1, 20, HEADS)
    want = plain_fla("retention").naive_retention(*(x.transpose(1, 2).float() for x in (q, k, v))).transpose(1, 2)
    got = retnet.chunked_retention(q, k, v, log_decay) * KEYS**-0.5
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)
