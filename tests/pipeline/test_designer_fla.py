"""Designs that hand their memory to fla's kernels: where they do, that the call computes the same, and that elsewhere
nothing has changed.

No GPU is needed: the device is called "cpu", and under fla's names stand the stand-ins of `training/fla_compat` behind
the signatures of the installed fla; for the two operators that have none, definitions step by step.
"""

from __future__ import annotations

import inspect
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from designs import namespace, step_by_step
from torch import Tensor, nn

from pipeline.designer import OPTIONS, SLOTS, Genome, genome_of, render
from pipeline.designer.grammar import problems
from tests.training import oracles
from tests.training.kernel_modules import Calls, Compute, kernel_modules
from training.fla_compat import ops

HIDDEN, HEADS, LENGTH = 64, 2, 35
MEMORY = ("state", "decay", "beta", "feature", "detail")
"""Slots that decide what the memory is called with and how wide it is; the others only change numbers."""


def shipped(function: str) -> Compute:
    """A stand-in of fla_compat as the whole of a kernel."""
    found: Callable[..., tuple[Tensor, Any]] = getattr(ops, function)
    names = ("q", "k", "v", "g", "beta", "normalize")

    def compute(given: dict[str, Any]) -> Tensor:
        return found(**{name: given[name] for name in names if name in given}, scale=1.0)[0]

    return compute


def product(given: dict[str, Any]) -> Tensor:
    assert given["num_householder"] == 2
    g = torch.zeros_like(given["q"][..., 0]) if given["g"] is None else given["g"]
    return oracles.delta_product(given["q"], given["k"], given["v"], given["beta"], g)


KERNELS: list[tuple[str, str, Compute]] = [
    *((name, f"chunk_{name}", shipped(f"chunk_{name}")) for name in ("linear_attn", "simple_gla", "gla", "delta_rule")),
    ("gated_delta_rule", "chunk_gated_delta_rule", shipped("chunk_gated_delta_rule")),
    ("kda", "chunk_kda", lambda a: oracles.kimi_delta(a["q"], a["k"], a["v"], a["beta"], a["g"])),
    ("gated_delta_product", "chunk_gated_delta_product", product),
]
BY_STATE_AND_DECAY = {
    ("linear", "none"): "chunk_linear_attn",
    ("linear", "scalar"): "chunk_simple_gla",
    ("linear", "channel"): "chunk_gla",
    ("delta", "none"): "chunk_delta_rule",
    ("delta", "scalar"): "chunk_gated_delta_rule",
    ("delta", "channel"): "chunk_kda",
    ("two_timescale", "none"): "chunk_gated_delta_rule",
    ("two_timescale", "scalar"): "chunk_gated_delta_rule",
    ("product", "none"): "chunk_gated_delta_product",
    ("product", "scalar"): "chunk_gated_delta_product",
}


def kind_of(genome: Genome) -> str:
    """One number a head, one a channel, or none."""
    return {"fixed": "scalar", "bounded": "channel"}.get(genome.decay, genome.decay)


def kernel_of(genome: Genome) -> str | None:
    """The kernel that must be called, None for the chunk form alone."""
    if genome.state != "linear" and genome.beta == "channel":
        return None
    return BY_STATE_AND_DECAY.get((genome.state, kind_of(genome)))


def memories() -> Iterator[Genome]:
    """Each valid choice for the slots of `MEMORY`; the other slots at random."""
    rng = random.Random(11)
    for chosen in itertools.product(*(OPTIONS[slot] for slot in MEMORY)):
        for _ in range(100):
            slots = {slot: rng.choice(OPTIONS[slot]) for slot in SLOTS} | dict(zip(MEMORY, chosen, strict=True))
            if not problems(slots):
                yield Genome(**slots)
                break


def sample() -> list[Genome]:
    """One genome for each state and kind of decay with a kernel, the write strengths and the rest at random."""
    genomes = [genome for genome in memories() if kernel_of(genome) is not None]
    random.Random(40).shuffle(genomes)
    return list({(genome.state, kind_of(genome)): genome for genome in genomes}.values())


SAMPLE = sample()
sampled = pytest.mark.parametrize("genome", SAMPLE, ids=lambda g: f"{g.state}-{g.decay}-{g.beta}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return kernel_modules(monkeypatch, KERNELS)


def build(genome: Genome, hidden: int = HIDDEN, kernels: bool = True) -> tuple[dict[str, Any], nn.Module]:
    found: dict[str, Any] = {}
    exec(compile(render(genome, "delta_net_test", kernels), "program", "exec"), found)
    torch.manual_seed(0)
    return found, found["DeltaNet"](hidden_size=hidden, num_heads=HEADS, layer_idx=1)


def tokens(hidden: int = HIDDEN) -> Tensor:
    return torch.randn(2, LENGTH, hidden, generator=torch.Generator().manual_seed(1))


def results(net: nn.Module, x: Tensor, **given: Any) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    leaf = x.clone().requires_grad_()
    out = net.tokens(leaf, given["remember"]) if given else net(leaf)[0]  # type: ignore[operator]
    weights = torch.linspace(-1.0, 1.0, out.numel()).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [leaf, *net.parameters()])]


def slow_memory(genome: Genome, memory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The recurrence, token after token, with the arguments of `memory`."""
    names = [name.split("_BTH")[0] for name in inspect.signature(memory).parameters]

    def remember(*tensors: Tensor) -> Tensor:
        given: dict[str, Any] = {"k": None, "log_decay": None, **dict(zip(names, tensors, strict=True))}
        return step_by_step(**given, steps=2 if genome.state == "product" else 1)

    return remember


def assert_three_forms_agree(genome: Genome, calls: Calls) -> None:
    """Kernel call, chunks and recurrence, in float64: outputs and all gradients of the whole design."""
    program, net = build(genome)
    net.double()
    x = tokens().double()
    chunks = results(net, x)
    slow = results(net, x, remember=slow_memory(genome, program["memory"]))
    assert not calls
    program["runs_fla"] = lambda *_: True
    called = results(net, x)
    assert [function for function, _ in calls] == [kernel_of(genome)], genome
    calls.clear()
    names = ["output", "input", *(name for name, _ in net.named_parameters())]
    for what, one, two, three in zip(names, called, chunks, slow, strict=True):
        for other in (two, three):
            assert (one - other).norm() <= 1e-8 * (other.norm() + 1.0), (genome, what)


def assert_nothing_has_changed_without_a_gpu(genome: Genome) -> None:
    """Bit for bit what the design was before it called kernels, in float32 and under autocast; both texts are known."""
    _, now = build(genome)
    _, before = build(genome, kernels=False)
    assert before.state_dict().keys() == now.state_dict().keys()
    assert all(
        torch.equal(one, two) for one, two in zip(results(now, tokens()), results(before, tokens()), strict=True)
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(now(tokens())[0], before(tokens())[0])
    for kernels in (True, False):
        assert genome_of(render(genome, "delta_net_test", kernels)) == genome


def test_the_sample_has_every_kernel_state_decay_and_write_strength() -> None:
    assert {kernel_of(genome) for genome in SAMPLE} == {function for _, function, _ in KERNELS}
    for slot in ("state", "decay", "beta"):
        assert {getattr(genome, slot) for genome in SAMPLE} == set(OPTIONS[slot]), slot


@sampled
def test_kernel_chunks_and_recurrence_agree(genome: Genome, calls: Calls) -> None:
    assert_three_forms_agree(genome, calls)
    assert_nothing_has_changed_without_a_gpu(genome)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_memory_with_a_kernel_agrees(calls: Calls) -> None:
    genomes = [genome for genome in memories() if kernel_of(genome) is not None]
    for genome in genomes:
        assert_three_forms_agree(genome, calls)
        assert_nothing_has_changed_without_a_gpu(genome)
    print(f"{len(genomes)} designs: kernel call, chunks and recurrence within 1e-8; bit for bit as before on the CPU")


@sampled
def test_16_bit_projections_on_the_device_of_the_kernels_go_to_fla(genome: Genome, calls: Calls) -> None:
    program, net = build(genome)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = net(tokens())[0]
        assert not calls
        program["FLA_DEVICE"] = "cpu"
        got = results(net, tokens())
    [(function, given)] = calls
    assert function == kernel_of(genome) and given["scale"] == 1.0 and given.get("normalize", False) is False
    assert {given[name].dtype for name in "qkv"} == {torch.bfloat16}
    assert all(given[name].dtype == torch.float32 for name in ("g", "beta") if given.get(name) is not None)
    assert got[0].dtype == own.dtype and (got[0] - own).abs().max() < 0.03 * own.abs().max()
    assert all(gradient.isfinite().all() for gradient in got)


@sampled
def test_wide_values_narrow_heads_and_steps_stay_with_the_own_form(genome: Genome, calls: Calls) -> None:
    program, net = build(genome)
    program["FLA_DEVICE"] = "cpu"
    net(tokens())
    if hasattr(net, "step"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net.step(tokens()[:, :1])  # type: ignore[operator]
    net.double()(tokens().double())
    program, narrow = build(genome, hidden=16)
    program["FLA_DEVICE"] = "cpu"
    narrow.bfloat16()(tokens(16).bfloat16())
    assert not calls


def test_without_a_gpu_nothing_of_fla_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, _, _ in KERNELS:
        monkeypatch.setitem(sys.modules, f"fla.ops.{package}", None)  # importing it raises
    program, net = build(Genome(decay="scalar"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(tokens())
        program["FLA_DEVICE"] = "cpu"
        with pytest.raises(ImportError, match=r"None in sys\.modules"):
            net(tokens())


def test_a_memory_without_a_kernel_is_the_text_it_was() -> None:
    for slots in ({"beta": "channel"}, {"state": "product", "decay": "channel"}):
        genome = Genome(**slots)
        assert kernel_of(genome) is None and "fla" not in namespace(genome)["memory"].__code__.co_names
        assert render(genome, "delta_net_test") == render(genome, "delta_net_test", kernels=False)
        assert "fla" not in render(genome, "delta_net_test").replace("flat", "")
