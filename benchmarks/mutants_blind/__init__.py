"""The blind set of the verifier's benchmark: written by someone who had not read the checks; run once, then frozen.

    from benchmarks.mutants_blind import honest, mutants

`mutants` are programs with one fault each, `honest` are sound programs that look suspicious. Every fault shows itself
under the condition that its sentence states; some of these conditions no black box can be sure to meet.
"""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.cost import costs
from benchmarks.mutants_blind.evasive import evasive
from benchmarks.mutants_blind.faults import faults
from benchmarks.mutants_blind.forms import forms
from benchmarks.mutants_blind.hidden import hidden_leaks
from benchmarks.mutants_blind.honest import honest_over_time
from benchmarks.mutants_blind.leaks import leaks
from benchmarks.mutants_blind.subtle import subtle_leaks
from benchmarks.mutants_blind.training import training_faults
from benchmarks.mutants_blind.unusual import honest_in_form

__all__ = ["honest", "mutants"]


def mutants() -> list[Mutant]:
    """Programs with one fault each, by kind."""
    parts = (leaks, subtle_leaks, hidden_leaks, evasive, faults, training_faults, costs, forms)
    return [mutant for part in parts for mutant in part()]


def honest() -> list[Mutant]:
    """Sound programs; `fault` says what looks suspicious about them, `expected` is empty."""
    return [*honest_over_time(), *honest_in_form()]
