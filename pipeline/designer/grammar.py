"""The grammar of linear-attention mixers: typed slots, the mechanisms that may fill them, and what may stand together.

A `Genome` is one sentence of the grammar. Every field is a slot, every value one of `OPTIONS[slot]`; `problems` lists
the combinations that make no sense, and a genome with a problem cannot be built. Different genomes compute different
functions, so the JSON form is also the canonical form.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from common.errors import UsageError
from pipeline.designer.mechanism import Mechanism
from pipeline.designer.mechanisms_io import AROUND
from pipeline.designer.mechanisms_memory import MEMORY

__all__ = [
    "DELTA_NET",
    "GATED_DELTA_NET",
    "MECHANISMS",
    "OPTIONS",
    "SLOTS",
    "SLOT_TITLES",
    "Genome",
    "describe_change",
    "differing_slots",
    "mechanism_at",
    "mechanisms_of",
    "problems",
]

MECHANISMS: dict[str, Mechanism] = {mechanism.name: mechanism for mechanism in (*MEMORY, *AROUND)}
"""Every mechanism by its name."""

SLOT_TITLES: dict[str, str] = {
    "state": "state form",
    "decay": "decay",
    "beta": "write strength",
    "feature": "feature map",
    "norm": "q/k norm",
    "conv": "convolution",
    "shift": "token shift",
    "path": "parallel path",
    "detail": "read/write detail",
    "out_norm": "output norm",
    "gate": "output gate",
}
SLOTS: tuple[str, ...] = tuple(SLOT_TITLES)
_OPTIONAL = ("decay", "shift", "path", "detail", "gate")  # slots whose "none" is the absence of a mechanism

OPTIONS: dict[str, tuple[str, ...]] = {
    slot: (("none",) if slot in _OPTIONAL else ()) + tuple(m.option for m in MECHANISMS.values() if m.slot == slot)
    for slot in SLOTS
}
"""What may fill each slot."""

_BY_PLACE: dict[tuple[str, str], Mechanism] = {(m.slot, m.option): m for m in MECHANISMS.values()}
_POSITIVE = ("elu1", "relu", "softplus", "hedgehog")
_CHANNEL_DECAYS = ("channel", "bounded")


@dataclass(frozen=True)
class Genome:
    """One architecture; the defaults are DeltaNet.

    Raises:
        UsageError: an unknown option, or options that make no sense together.
    """

    state: str = "delta"
    decay: str = "none"
    beta: str = "sigmoid"
    feature: str = "silu"
    norm: str = "l2"
    conv: str = "short"
    shift: str = "none"
    path: str = "none"
    detail: str = "none"
    out_norm: str = "rms"
    gate: str = "none"

    def __post_init__(self) -> None:
        found = problems(self.slots())
        if found:
            raise UsageError(f"expected a genome whose mechanisms fit together, got one where {'; '.join(found)}")

    def slots(self) -> dict[str, str]:
        return {slot: getattr(self, slot) for slot in SLOTS}

    def with_slots(self, **changes: str) -> Genome:
        """A copy with other options. Raises UsageError when they do not fit together."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The canonical form: one line, slots in the order of `SLOTS`."""
        return json.dumps(self.slots())

    @classmethod
    def from_json(cls, text: str) -> Genome:
        """Reads what `to_json` wrote.

        Raises:
            UsageError: not JSON, not an object of exactly these slots, or not a valid genome.
        """
        try:
            value: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"expected a genome as a JSON object, got text that is not JSON: {error}") from error
        if not isinstance(value, dict) or set(value) != set(SLOTS):
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise UsageError(f"expected a genome with exactly the slots {list(SLOTS)}, got {got}")
        return cls(**value)


def problems(slots: dict[str, str]) -> list[str]:
    """Why these options do not make one architecture; empty when they do."""
    unknown = [
        f"{slot} is {slots[slot]!r} (one of {', '.join(OPTIONS[slot])})"
        for slot in SLOTS
        if slots[slot] not in OPTIONS[slot]
    ]
    if unknown:
        return unknown
    state, decay, detail = slots["state"], slots["decay"], slots["detail"]
    additive = state == "linear"
    rules = (
        (slots["norm"] == "sum" and slots["feature"] not in _POSITIVE, "features that sum to one are not all positive"),
        (
            slots["norm"] == "rms" and not additive,
            "learnt gains could push the keys of an erasing memory past unit length",
        ),
        (slots["beta"] == "negative" and additive, "negative eigenvalues are asked of a memory that never erases"),
        (
            state == "two_timescale" and decay in _CHANNEL_DECAYS,
            "two timescales stand on top of a decay for each channel",
        ),
        (detail == "feedback" and additive, "output feedback is asked of a memory that never erases"),
        (
            detail == "precondition" and not additive,
            "a preconditioner stands on top of the delta rule, which decorrelates already",
        ),
        (
            detail == "coupled" and not (additive and decay in _CHANNEL_DECAYS),
            "coupled gates lack an additive memory with channel decays",
        ),
        (detail == "skip" and slots["path"] in ("value", "multifir"), "the value skips the memory twice"),
    )
    return [text for broken, text in rules if broken]


DELTA_NET = Genome()
GATED_DELTA_NET = Genome(decay="scalar", gate="silu")


def mechanism_at(slot: str, option: str) -> Mechanism | None:
    """The mechanism that `option` names in `slot`; None for an empty slot."""
    return _BY_PLACE.get((slot, option))


def mechanisms_of(genome: Genome) -> tuple[str, ...]:
    """Names of all mechanisms in the genome, in the order of the slots."""
    found = (mechanism_at(slot, option) for slot, option in genome.slots().items())
    return tuple(m.name for m in found if m is not None)


def differing_slots(before: Genome, after: Genome) -> tuple[str, ...]:
    return tuple(slot for slot in SLOTS if getattr(before, slot) != getattr(after, slot))


def describe_change(parent_genome: Genome, genome: Genome) -> str:
    """The change for a table column, for example 'decay: none -> channel'."""
    changed = differing_slots(parent_genome, genome)
    parts = [f"{SLOT_TITLES[s]}: {getattr(parent_genome, s)} -> {getattr(genome, s)}" for s in changed]
    return "; ".join(parts) or "unchanged"
