"""The grammar, its programs as text, and the fingerprint: round trips, refusals, what counts as the same program."""

from __future__ import annotations

import json
import re

import pytest
from designs import ARCHITECTURES, genome_with, valid_genomes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UsageError
from pipeline.designer import (
    DELTA_NET,
    GATED_DELTA_NET,
    MECHANISMS,
    OPTIONS,
    SLOTS,
    Genome,
    describe_change,
    fingerprint,
    genome_of,
    mechanisms_of,
    render,
)
from pipeline.designer.grammar import SLOT_TITLES, problems

quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_every_mechanism_is_described_and_has_a_place() -> None:
    assert len(MECHANISMS) >= 14
    for mechanism in MECHANISMS.values():
        assert mechanism.option in OPTIONS[mechanism.slot]
        assert re.fullmatch(r"\d{4}\.\d{4,5}", mechanism.paper), mechanism.name
        for text in (mechanism.why, mechanism.symptom, mechanism.expect, mechanism.risk, mechanism.title):
            assert text and not text.endswith(".")
        assert mechanism.keywords and all(word == word.lower() for word in mechanism.keywords)
        assert mechanism.name in mechanisms_of(genome_with(mechanism.name))
    assert set(SLOTS) == set(SLOT_TITLES) == set(OPTIONS)


@quick
@given(genome=valid_genomes())
def test_a_genome_and_its_program_can_be_read_back(genome: Genome) -> None:
    assert Genome.from_json(genome.to_json()) == genome
    program = render(genome, "delta_net_read_back")
    assert genome_of(program) == genome
    assert render(genome, "delta_net_read_back") == program
    assert fingerprint(program) == fingerprint(render(genome, "delta_net_other_name"))
    assert all(len(line) <= 120 or line.startswith("Genome: ") for line in program.splitlines())


@quick
@given(chosen=st.fixed_dictionaries({slot: st.sampled_from(OPTIONS[slot]) for slot in SLOTS}))
def test_senseless_combinations_cannot_be_built(chosen: dict[str, str]) -> None:
    if problems(chosen):
        with pytest.raises(UsageError, match="fit together"):
            Genome(**chosen)
    else:
        assert Genome(**chosen).slots() == chosen


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[1]",
        "{}",
        json.dumps({**DELTA_NET.slots(), "decay": "never"}),
        json.dumps({**DELTA_NET.slots(), "x": 1}),
        json.dumps({**DELTA_NET.slots(), "decay": 3}),
        json.dumps({**DELTA_NET.slots(), "gate": ["silu"]}),
    ],
)
def test_a_damaged_genome_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Genome.from_json(text)


@quick
@given(position=st.integers(min_value=0, max_value=5000), character=st.sampled_from("x #\n1"))
def test_an_edited_program_is_not_taken_for_the_designers(position: int, character: str) -> None:
    program = render(GATED_DELTA_NET, "delta_net_edited")
    place = position % len(program)
    edited = program[:place] + character + program[place:]
    assert genome_of(edited) in (None, GATED_DELTA_NET)
    if (
        genome_of(edited) is not None
    ):  # only the name in the first line may differ, and then it renders to this very text
        assert render(GATED_DELTA_NET, edited[3:].partition(":")[0]) == edited


def test_a_forged_genome_line_is_not_believed() -> None:
    program = render(DELTA_NET, "delta_net_forged")
    assert genome_of(program.replace(DELTA_NET.to_json(), GATED_DELTA_NET.to_json())) is None
    assert genome_of(program.replace("CHUNK = 32", "import os\nCHUNK = 32")) is None
    assert genome_of("not python (") is None
    assert genome_of("") is None
    with pytest.raises(UsageError, match="name"):
        render(DELTA_NET, "Delta Net")


def test_the_seeds_are_known_by_their_exact_text() -> None:
    for file, genome in (("delta_net.py", DELTA_NET), ("gated_delta_net.py", GATED_DELTA_NET)):
        text = (ARCHITECTURES / file).read_text(encoding="utf-8")
        assert genome_of(text) == genome
        assert genome_of(text + "\n") is None


def test_the_change_reads_like_a_table_cell() -> None:
    assert describe_change(DELTA_NET, DELTA_NET.with_slots(decay="channel")) == "decay: none -> channel"
    assert describe_change(DELTA_NET, DELTA_NET) == "unchanged"


def test_every_neighbour_of_the_seeds_has_its_own_fingerprint() -> None:
    known: dict[str, Genome] = {}
    for base in (DELTA_NET, GATED_DELTA_NET, Genome(state="linear", decay="channel", feature="relu")):
        for slot in SLOTS:
            for option in OPTIONS[slot]:
                if not problems({**base.slots(), slot: option}):
                    genome = base.with_slots(**{slot: option})
                    assert known.setdefault(fingerprint(render(genome, "delta_net_n")), genome) == genome


ORIGINAL = '''
import torch
from torch.nn import functional as F

class Net(torch.nn.Module):
    """Says something."""
    def __init__(self, width: int = 4):
        super().__init__()
        self.proj = torch.nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(3))

    def forward(self, x, scale=1.0):
        # a comment
        hidden = F.silu(self.proj(x)) * self.mask
        pairs = [row + hidden for row in x]
        return self.join(pairs, factor=scale), f"{hidden}"

    def join(self, parts, factor):
        total = sum(parts)
        return total * factor - 1
'''
RENAMED = '''
"""Another docstring."""
import torch as t
import torch.nn.functional as functional

class Other(t.nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.linear = t.nn.Linear(size, size)
        self.register_buffer("keep", t.ones(7))

    def forward(self, inputs, gain: float = 2.0):
        h = functional.silu(self.linear(inputs)) * self.keep
        items = [r + h for r in inputs]
        return self.merge(items, times=gain), f"{h!r}"

    def merge(self, things, times):
        y: "Tensor" = sum(things)
        return y * times - -5
'''


def test_names_comments_and_literals_do_not_count() -> None:
    assert fingerprint(ORIGINAL) == fingerprint(RENAMED)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("F.silu", "F.relu"),
        ("sum(parts)", "max(parts)"),
        ("total * factor", "factor * total"),
        ("row + hidden", "row + row"),
        ("* self.mask", "* self.proj"),
        ("- 1", "+ 1"),
        ("scale=1.0", "*, scale=1.0"),
        (", factor=scale", ", scale"),
    ],
)
def test_another_computation_is_another_fingerprint(old: str, new: str) -> None:
    assert old in ORIGINAL
    assert fingerprint(ORIGINAL) != fingerprint(ORIGINAL.replace(old, new))


@pytest.mark.parametrize("text", ["def f(:", "x = \x00", "(" * 5000, "\ud800 ="])
def test_what_is_not_python_is_a_clear_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected a Python program"):
        fingerprint(text)


@quick
@given(text=st.text(max_size=60))
def test_any_text_has_a_fingerprint_or_a_clear_error(text: str) -> None:
    try:
        assert re.fullmatch(r"[0-9a-f]{64}", fingerprint(text))
    except UsageError as error:
        assert "expected a Python program" in str(error)
