"""How one genome becomes another: mutations of one or two slots, crossovers with references, and repairs.

Everything is enumerated in a fixed order; only pair mutations and crossovers draw from the generator they are given.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.designer.grammar import DELTA_NET, OPTIONS, SLOTS, Genome, differing_slots, mechanism_at, problems

__all__ = ["OPERATORS", "Candidate", "candidates", "repairs"]

OPERATORS: tuple[str, ...] = ("swap", "tune", "add", "remove", "pair", "cross_one", "cross_mix")
"""swap: another mechanism in one slot; tune: the next finer or coarser form of the same mechanism; add and remove: fill
or empty a slot; pair: two slots at once; cross_one: one slot from a reference; cross_mix: a random share of the slots
in which a reference differs."""

_LADDERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("decay", ("fixed", "scalar", "channel")),
    ("gate", ("head", "lowrank", "sigmoid")),
    ("beta", ("constant", "sigmoid", "channel")),
    ("conv", ("short", "dilated", "multiscale")),
    ("path", ("value", "fir", "multifir")),
    ("shift", ("static", "dynamic")),
)
_PAIRS = 48  # pair mutations drawn at a time


@dataclass(frozen=True)
class Candidate:
    """A genome and how it was made from the base. `source` is the index of the reference that a crossover used."""

    operator: str
    genome: Genome
    slots: tuple[str, ...]
    source: int | None = None


def _operator(slot: str, before: str, after: str) -> str:
    if before == "none" and slot != "conv":
        return "add"
    if after == "none":
        return "remove"
    for ladder_slot, ladder in _LADDERS:
        if slot == ladder_slot and before in ladder and after in ladder:
            return "tune" if abs(ladder.index(before) - ladder.index(after)) == 1 else "swap"
    return "swap"


def _fitted(base: Genome, changes: dict[str, str]) -> Genome | None:
    """The base with these changes, and with at most one other slot moved where they do not fit; None if that fails."""
    wanted = {**base.slots(), **changes}
    if not problems(wanted):
        return Genome(**wanted)
    for slot in SLOTS:
        if slot in changes:
            continue
        for option in OPTIONS[slot]:
            trial = {**wanted, slot: option}
            if not problems(trial):
                return Genome(**trial)
    return None


def _singles(base: Genome) -> list[Candidate]:
    found = []
    for slot in SLOTS:
        before = getattr(base, slot)
        for option in OPTIONS[slot]:
            genome = _fitted(base, {slot: option}) if option != before else None
            if genome is not None:
                changed = differing_slots(base, genome)
                operator = _operator(slot, before, option) if len(changed) == 1 else "pair"
                found.append(Candidate(operator, genome, changed))
    return found


def _pairs(base: Genome, rng: random.Random) -> list[Candidate]:
    found = []
    for _ in range(_PAIRS):
        first, second = rng.sample(SLOTS, 2)
        changes = {slot: rng.choice(OPTIONS[slot]) for slot in (first, second)}
        if any(changes[slot] == getattr(base, slot) for slot in changes):
            continue
        if not problems({**base.slots(), **changes}):
            genome = base.with_slots(**changes)
            found.append(Candidate("pair", genome, differing_slots(base, genome)))
    return found


def _crossings(base: Genome, references: Sequence[Genome | None], rng: random.Random) -> list[Candidate]:
    found = []
    for index, reference in enumerate(references):
        different = differing_slots(base, reference) if reference is not None else ()
        for slot in different:
            genome = _fitted(base, {slot: getattr(reference, slot)})
            if genome is not None:
                found.append(Candidate("cross_one", genome, differing_slots(base, genome), index))
        for _ in range(4 if len(different) > 2 else 0):
            share = rng.sample(different, rng.randint(2, len(different) - 1))
            genome = _fitted(base, {slot: getattr(reference, slot) for slot in sorted(share)})
            if genome is not None:
                found.append(Candidate("cross_mix", genome, differing_slots(base, genome), index))
    return found


def candidates(base: Genome, references: Sequence[Genome | None], rng: random.Random) -> dict[str, list[Candidate]]:
    """Valid genomes other than the base, by operator. A reference of None (not of this grammar) is passed over."""
    table: dict[str, list[Candidate]] = {operator: [] for operator in OPERATORS}
    for candidate in (*_singles(base), *_pairs(base, rng), *_crossings(base, references, rng)):
        if candidate.slots and candidate not in table[candidate.operator]:
            table[candidate.operator].append(candidate)
    return table


_SUSPECTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    # What a failure text says -> mechanisms that can cause it, the likeliest first.
    (
        r"\bnan\b|\binf|diverg|non-?finite|gradient|overflow|spike",
        (
            ("detail", "precondition"),
            ("feature", "quadratic"),
            ("feature", "hedgehog"),
            ("beta", "negative"),
            ("beta", "channel"),
            ("decay", "channel"),
            ("decay", "bounded"),
            ("detail", "coupled"),
            ("state", "product"),
            ("norm", "rms"),
            ("norm", "soft"),
            ("norm", "sum"),
            ("state", "linear"),
            ("beta", "constant"),
        ),
    ),
    (
        r"causal|future|leak|prefix",
        (
            ("path", "window"),
            ("path", "multifir"),
            ("path", "fir"),
            ("conv", "multiscale"),
            ("conv", "dilated"),
            ("shift", "dynamic"),
            ("shift", "static"),
            ("detail", "precondition"),
        ),
    ),
    (r"\bbatch|\brows?\b|independen", (("path", "window"), ("out_norm", "group"), ("state", "two_timescale"))),
    (
        r"shape|construct|static|einops|size of tensor|length",
        (
            ("state", "two_timescale"),
            ("feature", "quadratic"),
            ("feature", "hedgehog"),
            ("state", "product"),
            ("beta", "channel"),
            ("path", "window"),
        ),
    ),
)
_NAMED: tuple[tuple[str, tuple[str, str]], ...] = (
    # Names of a rendered program in a traceback -> the mechanism they belong to.
    (r"window_attention|sharpness", ("path", "window")),
    (r"spaced_conv|near_taps|far_taps", ("conv", "dilated")),
    (r"taps_15|taps_7", ("conv", "multiscale")),
    (r"fir_taps", ("path", "fir")),
    (r"near_fir|far_fir", ("path", "multifir")),
    (r"k_extra|w_extra|extra_value|k_rows", ("state", "product")),
    (r"self\.quick|k_two", ("state", "two_timescale")),
    (r"square_map", ("feature", "quadratic")),
    (r"feature_map", ("feature", "hedgehog")),
    (r"beta_up", ("beta", "channel")),
    (r"gate_up", ("gate", "lowrank")),
    (r"shift_up|shift_down|step_back", ("shift", "dynamic")),
    (r"ridge|energy", ("detail", "precondition")),
)
_SLOW = re.compile(r"slow|time-?out|timed out|\bcost|quadratic work|(?<!in )\bmemory\b|stall|exponent")


def _suspects(genome: Genome, failure: str) -> list[str]:
    """Slots to give up, the likeliest first: named in the failure, then typical for it, then by their cost in time."""
    text = failure.lower()
    places = [place for pattern, place in _NAMED if re.search(pattern, text)]
    if not _SLOW.search(text):
        places += [place for pattern, group in _SUSPECTS if re.search(pattern, text) for place in group]
    slots = [slot for slot, option in places if getattr(genome, slot) == option]

    def cost(slot: str) -> float:
        mechanism = mechanism_at(slot, getattr(genome, slot))
        return mechanism.cost if mechanism is not None else 0.0

    rest = sorted(differing_slots(DELTA_NET, genome), key=lambda slot: (-cost(slot), SLOTS.index(slot)))
    different = set(rest)
    return [slot for slot in dict.fromkeys([*slots, *rest]) if slot in different]


def repairs(genome: Genome, failure: str) -> list[Genome]:
    """Genomes that give up one suspected mechanism for DeltaNet's own, the likeliest first; empty for DeltaNet."""
    found = []
    for slot in _suspects(genome, failure):
        repaired = _fitted(genome, {slot: getattr(DELTA_NET, slot)})
        if repaired is not None and repaired not in found:
            found.append(repaired)
    return found
