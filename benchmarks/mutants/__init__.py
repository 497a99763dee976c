"""Set one: faults planted into the seeds and into designs of our own designer. It grows with the checks."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants import behaviour, edges, form, hidden, learning, occasions, over_time
from benchmarks.mutants.sweep import SweepMutant, sweep

__all__ = ["SweepMutant", "mutants", "sweep"]


def mutants() -> list[Mutant]:
    """All mutants of set one, in a fixed order, names unique."""
    modules = (edges, over_time, hidden, behaviour, form, learning, occasions)
    return [mutant for module in modules for mutant in module.mutants()]
