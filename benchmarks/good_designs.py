"""Honest programs that the verifier must accept: the seeds, every mechanism of our designer, crossovers, oddities."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from benchmarks.mutants.bases import DELTA, GATED, designed, edited, inserted
from pipeline.designer import DELTA_NET, MECHANISMS, OPTIONS, SLOTS, Designer, Genome, Source, render
from pipeline.designer.grammar import problems

__all__ = ["GoodDesign", "good_designs"]

_NEEDS = {
    "sum_norm": {"feature": "relu"},
    "gained_norm": {"state": "linear"},
    "diagonal_preconditioner": {"state": "linear"},
    "coupled_input_gate": {"state": "linear", "decay": "channel"},
}
"""What a mechanism needs beside it to make a valid genome."""


@dataclass(frozen=True)
class GoodDesign:
    """A program without a fault, and why it is worth checking."""

    name: str
    text: str
    about: str


def good_designs(crossovers: int = 24, seed: int = 0) -> list[GoodDesign]:
    """The seeds, one design a mechanism, `crossovers` designs that mix many, and what real accepted programs do."""
    seeds = [GoodDesign("delta_net", DELTA, "seed"), GoodDesign("gated_delta_net", GATED, "seed")]
    single = [GoodDesign("designed_delta_net", render(DELTA_NET, "delta_net_good"), "the mechanisms of DeltaNet")]
    single += [
        GoodDesign(name, render(_genome_with(name), "delta_net_good"), f"mechanism {known.slot}: {known.option}")
        for name, known in MECHANISMS.items()
        if _genome_with(name) != DELTA_NET
    ]
    return [*seeds, *single, *_crossovers(crossovers, seed), *_oddities()]


def _genome_with(mechanism: str) -> Genome:
    known = MECHANISMS[mechanism]
    return DELTA_NET.with_slots(**{**_NEEDS.get(mechanism, {}), known.slot: known.option})


@functools.cache
def _crossovers(count: int, seed: int) -> tuple[GoodDesign, ...]:
    """What the designer proposes from random parents with two random references."""
    rng, designer = random.Random(seed), Designer(seed)
    found = []
    for number in range(count):
        parent, *references = (
            Source(f"random_{number}_{index}", render(_random_genome(rng), f"delta_net_{index}")) for index in range(3)
        )
        design = designer.propose(parent, references, "", [], [], f"good {number}")
        found.append(GoodDesign(f"crossover_{number}", design.program, f"{design.operator}: {design.change}"))
    return tuple(found)


def _random_genome(rng: random.Random) -> Genome:
    while True:
        slots = {slot: rng.choice(OPTIONS[slot]) for slot in SLOTS}
        if not problems(slots):
            return Genome(**slots)


def _oddities() -> list[GoodDesign]:
    """Habits of real accepted programs that look like faults and are none."""
    mutants = [
        inserted(
            "step_counter", DELTA, "counts its training steps and warms a share up", "any",
            "if self.training:\n    self.steps += 1\no = o * (1.0 - 0.5 / (1.0 + self.steps))", init="self.steps = 0",
        ),
        inserted(
            "loop_over_tokens", GATED, "a running average by a Python loop over tokens", "any",
            "rows, state = [], torch.zeros_like(x[:, 0])\nfor t in range(x.shape[1]):\n"
            "    state = torch.lerp(state, x[:, t], 0.1)\n    rows.append(state)\n"
            "o = o + 0.1 * torch.stack(rows, dim=1)",
        ),
        inserted(
            "zero_initialised_branch", DELTA, "a causal branch behind a zero gate: no gradient at first", "any",
            "o = o + self.share * self.extra(F.pad(x, (0, 0, 1, -1)))",
            init="self.share = nn.Parameter(torch.zeros(1))\nself.extra = nn.Linear(hidden_size, hidden_size // 4 * 4)",
        ),
        inserted("small_unused_parameter", GATED, "a bias that nothing reads", "any", "",
                 init="self.spare = nn.Parameter(torch.zeros(hidden_size))"),
        inserted("hard_coded_bfloat16", DELTA, "computes its last product in bfloat16", "any",
                 "o = o + 0.1 * (x.bfloat16() * 2.0).to(o.dtype)"),
        inserted("auxiliary_loss", GATED, "returns a scalar beside the output", "any", "aux = o.square().mean()"),
        inserted(
            "fourier_filter_padded", DELTA, "a long causal filter by Fourier transform, padded with zeros", "any",
            "length = 2 * x.shape[1]\n"
            "taps = self.taps * torch.exp(-0.1 * torch.arange(x.shape[1], dtype=x.dtype))[:, None]\n"
            "spectrum = torch.fft.rfft(x.float(), n=length, dim=1) * torch.fft.rfft(taps.float(), n=length, dim=0)\n"
            "o = o + 0.1 * torch.fft.irfft(spectrum, n=length, dim=1)[:, : x.shape[1]].to(o.dtype)",
            init="self.taps = nn.Parameter(torch.randn(hidden_size))",
        ),
        inserted("dropout_in_training", GATED, "dropout in train mode", "any", "o = F.dropout(o, 0.1, self.training)"),
        inserted("deeper_layers_differ", DELTA, "a share that depends on layer_idx", "any", "o = o * self.depth",
                 init="self.depth = 1.0 / (1.0 + 0.1 * (layer_idx or 0))"),
        inserted("refuses_the_gate", designed(state="linear"), "raises for use_gate=True: not supported", "any", "",
                 init="if use_gate:\n    raise NotImplementedError('use_gate is not supported')"),
        edited("chunk_of_64", DELTA, "works in chunks of 64", "any", ("CHUNK = 32", "CHUNK = 64")),
        inserted(
            "running_mean", GATED, "a running mean from the start of the sequence", "any",
            "count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]\no = o + 0.1 * x.cumsum(1) / count",
        ),
        inserted(
            "rotary_positions", DELTA, "absolute positions by sines", "any",
            "angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.rates.to(x.dtype)\n"
            "o = o + 0.1 * angle.sin()",
            init="self.register_buffer('rates', 10000.0 ** -torch.linspace(0, 1, hidden_size), persistent=False)",
        ),
        inserted(
            "causal_maximum", designed(gate="head"), "the largest value so far", "any",
            "o = o + 0.1 * x.cummax(dim=1).values",
        ),
        inserted(
            "mask_cached_by_length", GATED, "keeps a buffer by length, which holds no data", "any",
            "key = x.shape[1]\nif key not in RAMPS:\n    RAMPS[key] = torch.linspace(0.0, 1.0, 64)\n"
            "o = o + 0.0 * RAMPS[key].mean().to(o.dtype) + 0.01 * x", top="RAMPS = {}",
        ),
        inserted(
            "keyword_only_switches", DELTA, "more arguments than the reference's", "any", "o = o * self.sharpness",
            init="self.sharpness = float(kwargs.get('sharpness', 1.0))",
        ),
        inserted(
            "sums_without_own_chunk", GATED, "running sums over chunks from which the own chunk is taken again", "any",
            "parts = F.pad(x, (0, 0, 0, -x.shape[1] % 32)).unflatten(1, (-1, 32)).square().sum(2)\n"
            "before = (parts.cumsum(1) - parts).repeat_interleave(32, dim=1)[:, : x.shape[1]]\n"
            "o = o + 0.1 * torch.tanh(before / (1 + torch.arange(x.shape[1], dtype=x.dtype))[:, None])",
        ),
        inserted(
            "pools_the_last_eight",
            GATED,
            "a mean over the last eight tokens, by pooling",
            "any",
            "o = o + 0.1 * F.avg_pool1d(F.pad(x.transpose(1, 2), (7, 0)), 8, 1).transpose(1, 2)",
        ),
        inserted("output_from_zero", DELTA, "its output projection starts at zero", "any", "",
                 init="nn.init.zeros_(self.o_proj.weight)"),
        edited("chunk_of_48", DELTA, "works in chunks of 48", "any", ("CHUNK = 32", "CHUNK = 48")),
        edited("chunk_of_100", GATED, "works in chunks of 100", "any", ("CHUNK = 32", "CHUNK = 100")),
    ]  # fmt: skip
    return [GoodDesign(item.name, _finished(item.name, item.text), f"oddity: {item.fault}") for item in mutants]


def _finished(name: str, text: str) -> str:
    return (
        text.replace("return o, None, past_key_values", "return o, aux, past_key_values")
        if name.startswith("auxiliary")
        else text
    )
