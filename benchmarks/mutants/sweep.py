"""Leaks swept in strength, position and kind, for the detection curve."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.mutant import Mutant
from benchmarks.mutants.bases import DELTA, GATED, inserted

__all__ = ["KINDS", "POSITIONS", "STRENGTHS", "SweepMutant", "sweep"]

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Size of the leak relative to the root mean square of the token's own output, for inputs of unit variance."""

POSITIONS = {"early": "3", "chunk edge": "31", "between": "100", "last": "x.shape[1] - 2"}
"""Name -> the token that sees the token after it; all others see none."""

KINDS = ("plain", "detached", "in bfloat16")
"""plain: with a gradient, into DeltaNet. detached: without, into Gated DeltaNet. in bfloat16: without a gradient, and
the output is rounded to bfloat16 (8 bits) before the leak is added, as in programs that hard-code bfloat16."""


@dataclass(frozen=True)
class SweepMutant:
    """One point of the sweep."""

    kind: str
    position: str
    strength: float
    mutant: Mutant


def sweep() -> list[SweepMutant]:
    """Every kind at every position with every strength."""
    return [
        SweepMutant(kind, position, strength, _leak(kind, position, strength))
        for kind in KINDS
        for position in POSITIONS
        for strength in STRENGTHS
    ]


def _leak(kind: str, position: str, strength: float) -> Mutant:
    seen = "x" if kind == "plain" else "x.detach()"
    rounded = "o = o.bfloat16().to(o.dtype)\n" if kind == "in bfloat16" else ""
    lines = (
        f"{rounded}here = (torch.arange(x.shape[1]) == {POSITIONS[position]})[:, None]\n"
        "size = o.detach().square().mean(-1, keepdim=True).sqrt()\n"
        f"o = o + {strength:g} * here * size * F.pad({seen}, (0, 0, -1, 1))"
    )
    name = f"{kind} {position} {strength:g}".replace(" ", "_")
    fault = f"a {kind} leak of {strength:g} from the next token, at the {position} token"
    return inserted(name, DELTA if kind == "plain" else GATED, fault, "causality", lines)
