"""Designs under way and stored are told apart by what they compute, not by their text alone."""

from __future__ import annotations

from pipeline.designer import DELTA_NET, GATED_DELTA_NET, render
from pipeline.lab import Ideas
from training.architectures import SEEDS


def test_a_seed_rendered_anew_is_still_taken() -> None:
    ideas = Ideas()
    for name, path in SEEDS.items():
        ideas.claim_element(name, path.read_text())
    for genome in (DELTA_NET, GATED_DELTA_NET):
        assert genome.to_json() in ideas.taken()
        assert not ideas.claim("0001", render(genome, "delta_net_other_name"))


def test_one_owner_a_design_and_no_half_claims() -> None:
    ideas = Ideas()
    program = render(DELTA_NET.with_slots(gate="silu"), "delta_net_a")
    assert ideas.claim("0001", program) and ideas.claim("0001", program)
    assert not ideas.claim("0002", program.replace("delta_net_a", "delta_net_b"))
    assert ideas.claim("0002", render(DELTA_NET.with_slots(gate="sigmoid"), "delta_net_c"))
    assert [ideas.claim_name(owner, "n") for owner in ("0001", "0002", "0001")] == ["n", "n_2", "n"]
