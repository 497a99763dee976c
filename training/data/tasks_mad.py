"""The mechanistic tasks of MAD (Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures"), as
sequences of one language model: in-context recall, fuzzy recall, noisy recall, compression, memorisation. The sixth,
selective copying, is `training.data.tasks.copying`.

Keys, values and noise are three parts of the symbols, so what a token is can be seen and what follows it cannot.
Another form than MAD's where a language model needs it: compression there decodes a whole sequence from one vector;
here single positions of it are asked for, in random order, after it has gone by.
"""

from __future__ import annotations

import numpy as np

from training.data.sequences import SEPARATOR, Sequenced, marker, third
from training.profiles import TaskSpec

__all__ = ["compression", "context_recall", "facts", "fuzzy_recall", "memorisation", "noisy_recall"]

FACTS_SEED = 1729
"""Of the mapping that is to be memorised: one and the same in training and in scoring."""
_NOISE_SHARE = 0.3


def context_recall(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """Pairs of a key and its value, keys drawn again and again; a value is asked for where its key occurred before."""
    return _recall("context_recall", spec, random, noise=0.0)


def noisy_recall(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """The same with noise between the pairs."""
    return _recall("noisy_recall", spec, random, noise=_NOISE_SHARE)


def _recall(task: str, spec: TaskSpec, random: np.random.Generator, noise: float) -> Sequenced:
    keys = random.choice(third(spec, 0), spec.mad_pairs, replace=False).tolist()
    values = random.choice(third(spec, 1), spec.mad_pairs, replace=False).tolist()
    ids, answers = [marker(spec, task), keys[0], values[0]], list[int]()
    known = {0}
    while len(ids) + 4 <= spec.mad_length:
        if random.random() < noise:
            ids.append(int(random.choice(third(spec, 2))))
            continue
        number = int(random.integers(spec.mad_pairs))
        if number in known:
            answers.append(len(ids) + 1)
        known.add(number)
        ids += [keys[number], values[number]]
    last = int(random.choice(sorted(known)))  # so that every sequence asks for something
    ids += [keys[last], values[last]]
    return Sequenced(ids, [*answers, len(ids) - 1], third(spec, 1))


def fuzzy_recall(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """Keys and values of one or two tokens, every pair twice; both tokens of the second value are asked for.

    No two keys begin alike, so where a key ends can be known.
    """
    count = spec.mad_pairs
    heads = random.choice(third(spec, 0), count, replace=False).tolist()
    keys = [[head, *_maybe(random, third(spec, 0))] for head in heads]
    values = [[int(random.choice(third(spec, 1))), *_maybe(random, third(spec, 1))] for _ in range(count)]
    ids, answers = [marker(spec, "fuzzy_recall")], list[int]()
    for number in range(count):
        ids += [*keys[number], *values[number]]
    ids.append(SEPARATOR)
    for number in random.permutation(count).tolist():
        ids += keys[number]
        answers += range(len(ids), len(ids) + len(values[number]))
        ids += values[number]
    return Sequenced(ids, answers, third(spec, 1))


def _maybe(random: np.random.Generator, part: range) -> list[int]:
    return [int(random.choice(part))] if random.random() < 0.5 else []


def compression(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """A sequence without repetition, then its positions in random order, each followed by what stood there."""
    count = spec.mad_pairs
    names, values = third(spec, 0)[:count], random.choice(third(spec, 1), count, replace=False).tolist()
    ids = [marker(spec, "compression"), *values, SEPARATOR]
    answers = []
    for place in random.permutation(count).tolist():
        ids += [names[place], values[place]]
        answers.append(len(ids) - 1)
    return Sequenced(ids, answers, third(spec, 1))


def facts(spec: TaskSpec) -> dict[int, int]:
    """Key -> value of the mapping that is to be memorised: nothing in a sequence tells it."""
    values = np.random.default_rng([FACTS_SEED, spec.symbols]).permutation(third(spec, 1)).tolist()
    return dict(zip(third(spec, 0), values, strict=True))


def memorisation(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """Different keys, each followed by the value that it has in every sequence: a fact in the weights."""
    known = facts(spec)
    keys = random.choice(third(spec, 0), spec.mad_pairs, replace=False).tolist()
    ids = [marker(spec, "memorisation"), *(token for key in keys for token in (key, known[key]))]
    return Sequenced(ids, list(range(2, len(ids), 2)), third(spec, 1))
