"""Policies that choose a parent and references from the candidate set, behind one interface."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from common.knobs import Sample

__all__ = ["POLICIES", "RankPolicy", "SamplingPolicy", "Selection", "UniformPolicy"]

T = TypeVar("T")


@dataclass(frozen=True)
class Selection(Generic[T]):
    """One parent, and references that are neither the parent nor each other."""

    parent: T
    references: tuple[T, ...]


class SamplingPolicy(Protocol):
    def choose(self, ranked: Sequence[T], rng: random.Random) -> Selection[T]:
        """Chooses from candidates ranked best first.

        Args:
            ranked: the candidate set; not empty.
            rng: the only source of chance, so that the same seed and set give the same selection.
        """
        ...


@dataclass(frozen=True)
class RankPolicy:
    """The published policy: parent uniform from the top ranks, references uniform from the ranks after them.

    Ranks are over what exists. References that the later ranks cannot give come from the other candidates.
    """

    parent_ranks: int = 10
    reference_ranks: int = 50
    references: int = 4

    def choose(self, ranked: Sequence[T], rng: random.Random) -> Selection[T]:
        position = rng.randrange(min(self.parent_ranks, len(ranked)))
        later = list(range(self.parent_ranks, min(self.reference_ranks, len(ranked))))
        chosen = rng.sample(later, min(self.references, len(later)))
        if len(chosen) < self.references:
            others = [i for i in range(len(ranked)) if i != position and i not in chosen]
            chosen += rng.sample(others, min(self.references - len(chosen), len(others)))
        return Selection(ranked[position], tuple(ranked[i] for i in chosen))


@dataclass(frozen=True)
class UniformPolicy:
    """Parent and references uniform over the whole candidate set: the control against which a policy is measured."""

    references: int = 4

    def choose(self, ranked: Sequence[T], rng: random.Random) -> Selection[T]:
        order = rng.sample(range(len(ranked)), min(self.references + 1, len(ranked)))
        return Selection(ranked[order[0]], tuple(ranked[i] for i in order[1:]))


POLICIES: dict[str, Callable[[Sample], SamplingPolicy]] = {
    "ranks": lambda sample: RankPolicy(sample.parent_ranks, sample.reference_ranks, sample.references),
    "uniform": lambda sample: UniformPolicy(sample.references),
}
