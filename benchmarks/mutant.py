"""One planted fault: the structure that both sets of mutants of the verifier's benchmark export."""

from dataclasses import dataclass

__all__ = ["Mutant"]


@dataclass(frozen=True)
class Mutant:
    """A candidate program with one fault planted into it.

    `name` is unique within its set. `text` is the whole program as a file's text. `fault` says in one sentence what is
    wrong with it. `expected` names the checks (as in the verifier's report, for example "causality") that may
    legitimately refuse it; the set must not be empty.
    """

    name: str
    text: str
    fault: str
    expected: frozenset[str]
