"""What the tests of the designer share: one small genome for each mechanism, loading a program, random genomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pipeline.designer import DELTA_NET, MECHANISMS, OPTIONS, SLOTS, Genome, render
from pipeline.designer.grammar import problems

ARCHITECTURES = Path(__file__).resolve().parents[2] / "training" / "architectures"
HIDDEN, HEADS = 32, 2

_NEEDS = {
    "sum_norm": {"feature": "relu"},
    "gained_norm": {"state": "linear"},
    "diagonal_preconditioner": {"state": "linear"},
    "coupled_input_gate": {"state": "linear", "decay": "channel"},
}

KERNEL_DESIGNS = {
    "chunk_linear_attn": Genome(state="linear", feature="elu1"),
    "chunk_simple_gla": Genome(state="linear", decay="fixed", beta="constant", detail="precondition"),
    "chunk_gla": Genome(state="linear", decay="channel", beta="channel", detail="coupled"),
    "chunk_gla, 32 key channels": Genome(state="linear", decay="bounded", feature="hedgehog"),
    "chunk_delta_rule": Genome(beta="constant", detail="feedback"),
    "chunk_delta_rule, 24 key channels": Genome(feature="quadratic", beta="negative"),
    "chunk_gated_delta_rule": Genome(decay="scalar", gate="silu"),
    "chunk_gated_delta_rule, two timescales": Genome(state="two_timescale", decay="fixed"),
    "chunk_kda": Genome(decay="channel", beta="negative"),
    "chunk_gated_delta_product": Genome(state="product", decay="scalar", beta="negative"),
    "chunk_gated_delta_product, no decay": Genome(state="product", beta="constant"),
}
"""Designs that call a kernel of fla on a GPU: each kernel, and calls of it that differ."""


def genome_with(mechanism: str) -> Genome:
    """DeltaNet with this mechanism, and with what the mechanism needs beside it."""
    known = MECHANISMS[mechanism]
    return DELTA_NET.with_slots(**{**_NEEDS.get(mechanism, {}), known.slot: known.option})


def namespace(genome: Genome) -> dict[str, Any]:
    """Everything that the rendered program defines."""
    found: dict[str, Any] = {}
    exec(compile(render(genome, "delta_net_test"), "program", "exec"), found)
    return found


def mixer(genome: Genome, noise: float = 0.0, **arguments: Any) -> torch.nn.Module:
    """A mixer in float64 from a fixed seed, its parameters moved by Gaussian noise."""
    torch.manual_seed(0)
    module = namespace(genome)["DeltaNet"](**{"hidden_size": HIDDEN, "num_heads": HEADS, "layer_idx": 1, **arguments})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return module.double()


def valid_genomes() -> st.SearchStrategy[Genome]:
    slots = st.fixed_dictionaries({slot: st.sampled_from(OPTIONS[slot]) for slot in SLOTS})
    return slots.filter(lambda chosen: not problems(chosen)).map(lambda chosen: Genome(**chosen))


def step_by_step(q: Tensor, k: Tensor | None, w: Tensor, v: Tensor, log_decay: Tensor | None, steps: int = 1) -> Tensor:
    """The recurrence at the top of a rendered program; `steps` rows of k, w and v for each row of q."""
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    outputs = []
    for token in range(q.shape[1]):
        if log_decay is not None:
            state = log_decay[:, token].exp()[..., None] * state
        for row in range(steps * token, steps * token + steps):
            held = torch.einsum("bhkv,bhk->bhv", state, k[:, row]) if k is not None else torch.zeros_like(v[:, row])
            state = state + torch.einsum("bhk,bhv->bhkv", w[:, row], v[:, row] - held)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, token]))
    return torch.stack(outputs, dim=1)
