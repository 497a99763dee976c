"""What every generated task is made of: a sequence of token ids, its answers, and the ids of markers and symbols.

Ids: see `training.data.tokenizer.special_tokens`. The markers of the first tasks come before the symbols, those of the
wider set after them, so that a profile without the wider set keeps its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.data.tokenizer import MARKERS, WIDER_MARKERS
from training.profiles import TaskSpec

__all__ = ["COPY", "FIRST", "INDUCE", "NOISE", "RECALL", "SEPARATOR", "Sequenced", "marker", "third"]

NOISE, SEPARATOR, RECALL, COPY, INDUCE = range(1, 1 + len(MARKERS))
FIRST = 1 + len(MARKERS)
"""Id of the first task symbol."""


@dataclass(frozen=True)
class Sequenced:
    """Token ids of one sequence, at which positions an answer stands, and the ids that answers are drawn from.

    Attributes:
        rivals: ids that are as good as wrong choices as the answers of the same sequence; None: those answers.
    """

    ids: list[int]
    answers: list[int]
    pool: range
    rivals: Sequence[int] | None = None


def marker(spec: TaskSpec, task: str) -> int:
    """Id of the token that begins a sequence of a task of the wider set."""
    return FIRST + spec.symbols + list(WIDER_MARKERS).index(task)


def third(spec: TaskSpec, number: int) -> range:
    """The symbols' ids in three equal parts: 0 keys, 1 values, 2 noise."""
    size = spec.symbols // 3
    return range(FIRST + number * size, FIRST + (number + 1) * size)
