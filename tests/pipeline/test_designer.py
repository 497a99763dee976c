"""The designer: repeatable, never repeating itself, led by insights and by what helped before, able to repair."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from designs import ARCHITECTURES

from common.errors import UsageError
from pipeline.designer import (
    DELTA_NET,
    GATED_DELTA_NET,
    MECHANISMS,
    OPTIONS,
    SLOTS,
    Design,
    Designer,
    Genome,
    Outcome,
    Source,
    describe_change,
    fingerprint,
    genome_of,
    mechanisms_of,
    render,
)
from pipeline.designer.grammar import problems
from pipeline.designer.operators import OPERATORS, candidates, repairs

ROOT = Path(__file__).resolve().parents[2]


def seed_source(name: str = "delta_net") -> Source:
    return Source(name, (ARCHITECTURES / f"{name}.py").read_text(encoding="utf-8"), "a seed", 1.0)


def source_of(genome: Genome, name: str) -> Source:
    return Source(name, render(genome, name), "because", 1.5)


def ten(seed: int) -> list[Design]:
    """Ten designs as a run makes them: each becomes a possible parent of later ones."""
    pool, history, avoid, designs = [seed_source(), seed_source("gated_delta_net")], [], set(), []
    for index in range(10):
        parent = pool[index % len(pool)]
        references = [source for source in pool if source is not parent][:4]
        design = Designer(seed).propose(parent, references, "", history, avoid, f"experiment-{index}")
        designs.append(design)
        avoid |= {design.fingerprint, design.genome.to_json()}
        history.append(design.outcome([0.02, -0.01, None][index % 3]))
        pool.append(Source(design.name, design.program, design.motivation, 1.5))
    return designs


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ten_designs_differ_in_structure_and_cover_many_mechanisms(seed: int) -> None:
    designs = ten(seed)
    assert len({design.fingerprint for design in designs}) == 10
    assert len({design.genome for design in designs}) == 10
    assert len({design.name for design in designs}) == 10
    introduced = {m for d in designs for m in d.mechanisms if MECHANISMS[m].slot in d.slot.split("+")}
    assert len(introduced) >= 8
    for design in designs:
        assert re.fullmatch(r"delta_net_[a-z0-9_]{1,50}", design.name)
        assert genome_of(design.program) == design.genome
        assert fingerprint(design.program) == design.fingerprint != design.parent_fingerprint
        assert design.mechanisms == mechanisms_of(design.genome)
        assert design.base is not None and design.change == describe_change(design.base, design.genome)
        assert design.operator in OPERATORS


def test_motivations_state_the_change_its_reason_and_differ_in_words() -> None:
    designs = ten(1)
    words = []
    for design in designs:
        for name in design.mechanisms:
            if MECHANISMS[name].slot in design.slot.split("+"):
                assert MECHANISMS[name].paper in design.motivation
                assert MECHANISMS[name].title in design.motivation
        assert "Expected:" in design.motivation
        words.append(set(re.findall(r"[a-z]{4,}", design.motivation.lower())))
    for index, first in enumerate(words):
        for second in words[:index]:
            assert len(first & second) / len(first | second) < 0.7


PROPOSALS = """
import sys; sys.path.insert(0, sys.argv[1])
from pipeline.designer import GATED_DELTA_NET, Designer, Genome, Outcome, Source, render
parent = Source("delta_net_p", render(Genome(conv="dilated"), "delta_net_p"), "because", 1.5)
others = [Source("delta_net_r", render(GATED_DELTA_NET, "delta_net_r")), Source("by_hand", "x = 1")]
history = [Outcome("add", "gate", ("silu_gate", "delta_rule"), 0.1), Outcome("swap", "beta", ("channel_beta",), None)]
avoid = {Genome(gate="head").to_json(), Genome(shift="static").to_json(), "a", "b", "c"}
for key in ("two", "six", "seven"):
    design = Designer(1).propose(parent, others, "a sliding window, a Hedgehog map, a forget gate", history, avoid, key)
    print(repr(design), repr(Designer(1).repair(design, "nan", avoid, key)))
"""


def test_same_arguments_same_design_in_any_process() -> None:
    answers = set()
    for hash_seed in ("0", "1", "1234"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", PROPOSALS, str(ROOT)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        answers.add(done.stdout)
    assert len(answers) == 1
    assert answers.pop().count("Design(") == 6


def test_seed_key_and_history_each_change_the_draw() -> None:
    parent = seed_source()
    outcomes = [Outcome("add", "decay", ("scalar_decay",), 0.1)]
    designs = {
        Designer(seed).propose(parent, [], "", history, set(), key).name
        for seed, history, key in [(s, h, k) for s in range(3) for h in ([], outcomes) for k in ("a", "b")]
    }
    assert len(designs) >= 6


def test_it_never_returns_what_is_to_be_avoided() -> None:
    parent = source_of(DELTA_NET.with_slots(decay="fixed"), "delta_net_parent")
    reference = source_of(DELTA_NET.with_slots(decay="scalar"), "delta_net_reference")
    avoid: set[str] = {DELTA_NET.with_slots(decay="bounded").to_json()}
    forbidden = {genome_of(parent.program), genome_of(reference.program), DELTA_NET.with_slots(decay="bounded")}
    for index in range(25):
        design = Designer(5).propose(parent, [reference], "", [], avoid, str(index))
        assert design.genome not in forbidden
        forbidden.add(design.genome)
        avoid.add(design.fingerprint if index % 2 else design.genome.to_json())


def test_when_everything_near_is_taken_it_says_so() -> None:
    changes = [{slot: option} for slot in SLOTS for option in OPTIONS[slot]]
    pairs = [{**DELTA_NET.slots(), **one, **two} for one in changes for two in changes]
    taken = {Genome(**slots).to_json() for slots in pairs if not problems(slots)}
    with pytest.raises(UsageError, match="not proposed before"):
        Designer(0).propose(seed_source(), [], "", [], taken, "k")


def test_insights_pull_towards_the_mechanisms_they_name() -> None:
    text = (
        "### DESIGN_INSIGHT_HIGH: A sliding window branch restores precise local lookups\n"
        "Local attention over a small window beside the recurrence helps when copying at short distance fails."
    )
    hits = [Designer(seed).propose(seed_source(), [], text, [], set(), "k") for seed in range(12)]
    blind = [Designer(seed).propose(seed_source(), [], "", [], set(), "k") for seed in range(12)]
    named = sum("window_path" in design.mechanisms for design in hits)
    assert named >= 3
    assert named > sum("window_path" in design.mechanisms for design in blind)
    quoted = next(design for design in hits if "window_path" in design.mechanisms)
    assert "A sliding window branch restores precise local lookups" in quoted.motivation


def test_mechanisms_that_helped_are_chosen_more_often_than_those_that_hurt() -> None:
    everything = [Outcome("swap", m.slot, (m.name,), 0.0) for m in MECHANISMS.values()]
    good = [Outcome("add", "gate", ("head_gate",), 0.3)] * 8
    bad = [Outcome("add", "gate", ("silu_gate",), -0.3)] * 8
    designs = [Designer(seed).propose(seed_source(), [], "", everything + good + bad, set(), "k") for seed in range(24)]
    liked = sum("head_gate" in design.mechanisms for design in designs)
    disliked = sum("silu_gate" in design.mechanisms for design in designs)
    assert liked >= 4
    assert disliked <= 1
    assert any(
        "tried 8 times" in d.motivation or "tried 9 times" in d.motivation
        for d in designs
        if "head_gate" in d.mechanisms
    )


def test_crossovers_take_slots_from_references() -> None:
    base = DELTA_NET.with_slots(path="fir")
    other = Genome(state="linear", decay="channel", feature="hedgehog", gate="head", detail="coupled")
    table = candidates(base, [None, other], random.Random(3))
    assert table["cross_one"] and table["cross_mix"]
    for candidate in (*table["cross_one"], *table["cross_mix"]):
        assert candidate.source == 1
        taken = [s for s in candidate.slots if getattr(candidate.genome, s) == getattr(other, s)]
        assert len(candidate.slots) - len(taken) <= 1  # at most one slot moved so that the rest fits
    for group in table.values():
        assert all(candidate.genome != base for candidate in group)


def test_a_parent_written_by_hand_is_answered_from_the_grammar() -> None:
    parent = Source(
        "delta_net_by_hand", "import torch\n\n\nclass DeltaNet(torch.nn.Module):\n    pass\n", "by hand", None
    )
    design = Designer(1).propose(parent, [source_of(GATED_DELTA_NET, "delta_net_ref")], "", [], set(), "k")
    assert genome_of(design.program) == design.genome
    assert "not written in the grammar" in design.motivation
    with pytest.raises(UsageError, match="syntax error"):
        Designer(1).propose(Source("broken", "def f(:"), [], "", [], set(), "k")


@pytest.mark.parametrize(
    ("genome", "failure", "slot"),
    [
        (Genome(path="window", gate="silu"), "causality: position 40 changed when token 80 was replaced", "path"),
        (Genome(feature="quadratic", gate="silu"), "loss is nan at step 12", "feature"),
        (Genome(state="product", gate="silu"), "slow: 3.1 times its peers", "state"),
        (Genome(state="linear", detail="precondition", decay="scalar"), "gradients: not finite", "detail"),
        (Genome(conv="dilated", gate="silu"), "RuntimeError: line 71, in spaced_conv", "conv"),
        (Genome(beta="channel", decay="scalar"), "crashed: line 130, in memory\n self.beta_up(beta)", "beta"),
    ],
)
def test_repair_gives_up_the_likeliest_mechanism(genome: Genome, failure: str, slot: str) -> None:
    design = Designer(1).repair(genome, failure, set(), "k")
    assert design is not None
    assert getattr(design.genome, slot) == getattr(DELTA_NET, slot)
    assert design.operator == "repair"
    assert genome_of(design.program) == design.genome
    assert failure.split(":")[0] in design.motivation


def test_repair_ends_when_nothing_sensible_is_left() -> None:
    assert repairs(DELTA_NET, "nan") == []
    assert Designer(1).repair(DELTA_NET, "nan", set(), "k") is None
    assert Designer(1).repair(Genome(gate="silu"), "nan", set(), "k") is None  # only the plain seed is left
    design = Designer(1).propose(seed_source(), [], "", [], set(), "k")
    current: Design | None = design
    for _ in range(4):
        current = Designer(1).repair(current, "nan", {design.fingerprint}, "k") if current else None
        assert current is None or current.genome not in (design.genome, DELTA_NET)
    assert current is None


def test_a_repair_is_never_the_parent_and_keeps_its_story() -> None:
    parent = source_of(Genome(gate="silu", path="fir"), "delta_net_parent")
    for index in range(8):
        design = Designer(index).propose(parent, [], "", [], set(), "k")
        repaired = Designer(index).repair(design, "nan", set(), "k")
        assert repaired is not None
        assert repaired.genome != genome_of(parent.program)
        assert design.motivation in repaired.motivation
        assert repaired.parent_fingerprint == design.parent_fingerprint
