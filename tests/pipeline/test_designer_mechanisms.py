"""Every mechanism as a running program: shapes, causality, independence of rows, gradients, precision and cost."""

from __future__ import annotations

import pytest
import torch
from designs import HEADS, HIDDEN, genome_with, mixer, namespace, valid_genomes
from hypothesis import HealthCheck, given, settings
from torch.utils.flop_counter import FlopCounterMode

from pipeline.designer import MECHANISMS, Genome

TOLERANCE = 1e-9  # of float64


def check_behaviour(genome: Genome) -> None:
    """Right shapes, strictly causal whatever the parameters, rows and lengths independent of each other."""
    module = mixer(genome, noise=0.3)
    x = torch.randn(2, 100, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        whole, extra, cache = module(x, past_key_values="kept")
        assert extra is None
        assert cache == "kept"
        assert whole.shape == x.shape
        assert torch.isfinite(whole).all()
        for length in (1, 17, 64, 65):
            part = module(hidden_states=x[:, :length])[0]
            assert part.shape == (2, length, HIDDEN)
            torch.testing.assert_close(part, whole[:, :length], rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(module(x[1:])[0], whole[1:], rtol=TOLERANCE, atol=TOLERANCE)
    for cut in (1, 16, 33, 64):  # not even rounding carries a later token into an earlier output
        x = x[:1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(module(x)[0][:, :cut].sum(), x)
        assert gradient[:, :cut].abs().max() > 0.0
        assert gradient[:, cut:].abs().max() == 0.0


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism_is_causal_and_independent_of_batch_and_length(name: str) -> None:
    check_behaviour(genome_with(name))


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism_trains_and_every_parameter_gets_a_gradient(name: str) -> None:
    module = mixer(genome_with(name)).float()
    x = torch.randn(2, 50, HIDDEN)
    target = torch.randn(2, 50, HIDDEN)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (module(x)[0] - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        for parameter, value in module.named_parameters():
            assert value.grad is not None, parameter
            assert torch.isfinite(value.grad).all(), parameter
            assert value.grad.abs().max() > 0.0, parameter
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism_stays_finite_and_exact_in_float32_and_bf16_autocast(name: str) -> None:
    exact = mixer(genome_with(name), noise=0.1)
    x = torch.randn(2, 70, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        wanted = exact(x)[0]
        single = exact.float()
        torch.testing.assert_close(single(x.float())[0].double(), wanted, rtol=1e-3, atol=1e-3)
        assert torch.isfinite(single(100.0 * x.float())[0]).all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = single(x.float())[0]
        assert torch.isfinite(low).all()
        assert (low.double() - wanted).abs().mean() < 0.1 * wanted.abs().mean() + 0.02
        half = single.bfloat16()(x.bfloat16())[0]
        assert half.dtype == torch.bfloat16
        assert torch.isfinite(half).all()


@pytest.mark.parametrize("name", [m.name for m in MECHANISMS.values() if m.slot in ("state", "path", "decay", "conv")])
def test_work_grows_linearly_with_length(name: str) -> None:
    module = mixer(genome_with(name)).float()
    counts = []
    for length in (256, 512):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(torch.randn(1, length, HIDDEN))
        counts.append(counter.get_total_flops())
    assert 1.9 < counts[1] / counts[0] < 2.1


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(genome=valid_genomes())
def test_any_valid_genome_is_causal(genome: Genome) -> None:
    check_behaviour(genome)


@pytest.mark.parametrize("name", ["delta_rule", "channel_decay", "householder_product", "layer_bounded_decay"])
def test_gates_at_their_extremes_stay_finite(name: str) -> None:
    genome = genome_with(name).with_slots(decay="channel") if name == "householder_product" else genome_with(name)
    module = mixer(genome).float()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "bias" in key or "up" in key:
                parameter.mul_(50.0)
    x = (10.0 * torch.randn(2, 96, HIDDEN)).requires_grad_()
    module(x)[0].square().mean().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    module = mixer(Genome(decay="scalar"))
    x = torch.randn(2, 40, HIDDEN, dtype=torch.float64)
    mask = torch.ones(2, 40)
    mask[:, 30:] = 0.0
    with torch.no_grad():
        torch.testing.assert_close(module(x, attention_mask=mask)[0][:, :30], module(x[:, :30])[0])


def test_the_published_arguments_are_taken_and_bad_sizes_are_refused() -> None:
    create = namespace(Genome())["DeltaNet"]
    module = create(
        mode="chunk1",
        d_model=48,
        hidden_size=64,
        expand_k=0.5,
        expand_v=2.0,
        num_heads=3,
        use_beta=True,
        use_gate=False,
        use_short_conv=True,
        conv_size=3,
        layer_idx=0,
        qk_norm="l2",
        qk_activation="silu",
        norm_eps=1e-5,
        use_output_norm=True,
    )
    output = module(
        torch.randn(2, 5, 48), attention_mask=None, past_key_values=None, use_cache=False, output_attentions=False
    )
    assert output[0].shape == (2, 5, 48)
    with pytest.raises(ValueError, match=r"num_heads must divide hidden_size.*got 5"):
        create(hidden_size=64, num_heads=5)
    with pytest.raises(ValueError, match="even for two timescales"):
        namespace(Genome(state="two_timescale"))["DeltaNet"](hidden_size=6, num_heads=HEADS)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_step_is_a_token_of_forward(name: str) -> None:
    genome = genome_with(name)
    made = mixer(genome, noise=0.1)
    x_BTD = torch.randn(2, 40, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if genome.path == "window" or genome.detail == "precondition":
        assert not hasattr(made, "step"), "what it sees has no end, or is not written yet"
        return
    with torch.no_grad():
        whole, state, parts, sizes = made(x_BTD)[0], None, [], set()
        for token in x_BTD.split(1, dim=1):
            out, state = made.step(token, state)  # type: ignore[operator]
            parts.append(out)
            sizes.add(sum(tensor.numel() for tensor in state))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
    assert len(sizes) == 1, "the state does not grow"
