"""State tracking and length: parity, products of transpositions in S3 and S5, and a needle far back.

State tracking asks for the state of a small automaton after a word of random length, so that short words teach what
long ones need. The word problem of S5 is complete for NC1 (Barrington 1989), beyond what a diagonal linear recurrence
can do in one layer (Merrill et al. 2024); parity needs a negative eigenvalue (Grazzi et al. 2024).
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from training.data.sequences import FIRST, SEPARATOR, Sequenced, marker, third
from training.profiles import TaskSpec

__all__ = ["needle", "needle_of", "parity", "permutation_s3", "permutation_s5"]

_PAIRS = 3
"""Key-value pairs in the hay, of which one is asked for."""


def parity(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """Bits, then whether there was an odd number of ones: the symbols 0, 1 and the answers 2 (even), 3 (odd)."""
    bits = random.integers(0, 2, random.integers(1, spec.state_length + 1))
    pool = range(FIRST + 2, FIRST + 4)
    ids = [marker(spec, "parity"), *(FIRST + bits).tolist(), SEPARATOR, pool[int(bits.sum()) % 2]]
    return Sequenced(ids, [len(ids) - 1], pool, pool)


def permutation_s3(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """Swaps of places among three, then a place: which of the three things stands there."""
    return _permutation("permutation_s3", 3, spec, random)


def permutation_s5(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """The same with five."""
    return _permutation("permutation_s5", 5, spec, random)


def _permutation(task: str, size: int, spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """A symbol for each swap, then one for each thing; a place is named by the thing that stands there at first."""
    swaps = list(combinations(range(size), 2))
    word = random.integers(0, len(swaps), random.integers(1, spec.state_length + 1)).tolist()
    standing = list(range(size))
    for number in word:
        one, two = swaps[number]
        standing[one], standing[two] = standing[two], standing[one]
    pool = range(FIRST + len(swaps), FIRST + len(swaps) + size)
    place = int(random.integers(size))
    ids = [marker(spec, task), *(FIRST + number for number in word), SEPARATOR, pool[place], pool[standing[place]]]
    return Sequenced(ids, [len(ids) - 1], pool, pool)


def needle(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """`needle_of` between half of needle_length and all of it."""
    return needle_of(int(random.integers(spec.needle_length // 2, spec.needle_length + 1)), spec, random)


def needle_of(length: int, spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """Pairs of a key and its value scattered in noise, then one of the keys, and its value: `length` tokens."""
    keys = random.choice(third(spec, 0), _PAIRS, replace=False).tolist()
    values = random.choice(third(spec, 1), _PAIRS, replace=False).tolist()
    hay = random.choice(third(spec, 2), length - 4 - 2 * _PAIRS).tolist()
    places = np.sort(random.integers(0, len(hay) + 1, _PAIRS)).tolist()
    body: list[int] = []
    for key, value, start, end in zip(keys, values, [0, *places[:-1]], places, strict=True):
        body += [*hay[start:end], key, value]
    asked = int(random.integers(_PAIRS))
    ids = [marker(spec, "needle"), *body, *hay[places[-1] :], SEPARATOR, keys[asked], values[asked]]
    return Sequenced(ids, [len(ids) - 1], third(spec, 1), values)
