"""Generated tasks: associative recall, selective copying, induction, and the wider set (tasks_mad.py, tasks_state.py);
and cloze items from held-out text.

A task sequence is a list of token ids with a flag for each: whether the token is an answer (predicted and trained on)
or part of the question (random, so training on it would only add noise). The same generators make the training
sequences and, from other seeds, the scored multiple-choice items.

After Arora et al. 2023 (multi-query associative recall), Gu and Dao 2023 (selective copying), Olsson et al. 2022
(induction heads).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TypedDict

import numpy as np

from training.data.sequences import COPY, FIRST, INDUCE, NOISE, RECALL, SEPARATOR, Sequenced
from training.data.tasks_mad import compression, context_recall, fuzzy_recall, memorisation, noisy_recall
from training.data.tasks_state import needle, needle_of, parity, permutation_s3, permutation_s5
from training.profiles import TaskSpec

__all__ = ["GENERATORS", "LONGER", "Item", "cloze_items", "generate_items"]


class Item(TypedDict):
    """One multiple-choice question: the likelier continuation of `context` is the model's answer."""

    context: str
    choices: list[str]
    answer: int


def recall(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """Key-value pairs, then every key twice more in random order, each followed by its value."""
    half = spec.symbols // 2
    keys = FIRST + random.choice(half, spec.recall_pairs, replace=False)
    values = FIRST + half + random.choice(half, spec.recall_pairs, replace=False)
    pairs = list(zip(keys.tolist(), values.tolist(), strict=True))
    order = random.permutation(2 * spec.recall_pairs) % spec.recall_pairs
    ids = [RECALL, *chain.from_iterable(pairs), SEPARATOR]
    start = len(ids)
    ids += chain.from_iterable(pairs[at] for at in order.tolist())
    return Sequenced(ids, list(range(start + 1, len(ids), 2)), range(FIRST + half, FIRST + 2 * half))


def copying(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """Symbols scattered in noise, then the symbols alone in their order."""
    content = FIRST + random.choice(spec.symbols, spec.copy_items, replace=False)
    places = sorted(random.choice(spec.copy_length, spec.copy_items, replace=False).tolist())
    symbols, body = content.tolist(), [NOISE] * spec.copy_length
    for place, symbol in zip(places, symbols, strict=True):
        body[place] = symbol
    ids = [COPY, *body, SEPARATOR, *symbols]
    return Sequenced(ids, list(range(len(ids) - spec.copy_items, len(ids))), range(FIRST, FIRST + spec.symbols))


def induction(spec: TaskSpec, random: np.random.Generator) -> Sequenced:
    """Random symbols of random number, then the same once more; the first of the repetition cannot be known."""
    length = int(random.integers(spec.induction_length // 2, spec.induction_length + 1))
    segment = (FIRST + random.choice(spec.symbols, length, replace=False)).tolist()
    pool = range(FIRST, FIRST + spec.symbols)
    return Sequenced([INDUCE, *segment, *segment], list(range(length + 2, 2 * length + 1)), pool)


GENERATORS: dict[str, Callable[[TaskSpec, np.random.Generator], Sequenced]] = {
    "recall": recall,
    "copying": copying,
    "induction": induction,
    "context_recall": context_recall,
    "fuzzy_recall": fuzzy_recall,
    "noisy_recall": noisy_recall,
    "compression": compression,
    "memorisation": memorisation,
    "parity": parity,
    "permutation_s3": permutation_s3,
    "permutation_s5": permutation_s5,
    "needle": needle,
}
"""By name, the newest last: items are drawn from a seed that the place in this table is part of."""
LONGER = {"needle_2x": 2, "needle_4x": 4}
"""The needle in sequences of so many training lengths, scored only."""


def generate_items(
    task: str, spec: TaskSpec, count: int, symbols: Sequence[str], seed: int, seq_len: int = 0
) -> list[Item]:
    """`count` items of a generated task, one question from each of `count` sequences.

    Half of the wrong choices (rounded down) are other answers of the same sequence, the rest are symbols that the
    sequence does not hold: remembering which symbols occurred lifts a model above chance, and only knowing which one
    follows takes it to the top. A task with few possible answers offers all of them.

    Args:
        symbols: text of each special token, by id.
        seq_len: training length, of which the tasks in LONGER are multiples.
    """
    random = np.random.default_rng([seed, 7, [*GENERATORS, *LONGER].index(task)])
    generate = partial(needle_of, LONGER[task] * seq_len) if task in LONGER else GENERATORS[task]
    items: list[Item] = []
    for _ in range(count):
        sequence = generate(spec, random)
        place = int(random.choice(sequence.answers))
        true = sequence.ids[place]
        rivals = sequence.rivals if sequence.rivals is not None else [sequence.ids[at] for at in sequence.answers]
        inside = random.permutation(sorted(set(rivals) - {true})).tolist()
        outside = random.permutation(sorted(set(sequence.pool) - set(sequence.ids) - set(rivals))).tolist()
        half = (spec.choices - 1) // 2
        wrong = inside[:half] + outside + inside[half:]
        choices = [true, *wrong[: spec.choices - 1]]
        order = random.permutation(len(choices)).tolist()
        items.append(
            Item(
                context="".join(symbols[token] for token in sequence.ids[:place]),
                choices=[symbols[choices[at]] for at in order],
                answer=order.index(0),
            )
        )
    return items


def cloze_items(documents: Sequence[str], spec: TaskSpec, count: int, seed: int) -> list[Item]:
    """`count` items from held-out documents: which words come next, the true ones or others of the same document.

    The wrong choices are spans of as many words from elsewhere in the document, of the nearest length in characters,
    so that neither topic nor length gives the answer away. Fewer items are returned when the text is too short.
    """
    random = np.random.default_rng([seed, 11])
    items: list[Item] = []
    known: set[tuple[str, ...]] = set()
    for attempt in range(4):
        for number in random.permutation(len(documents)).tolist():
            if len(items) >= count:
                return items
            item = _cloze_of(documents[number], spec, random)
            if item is None:
                continue
            same = (item["context"], *item["choices"], str(item["answer"]))
            if attempt == 0 or same not in known:
                known.add(same)
                items.append(item)
    return items


def _cloze_of(document: str, spec: TaskSpec, random: np.random.Generator) -> Item | None:
    spans: dict[str, int] = {}
    words = document.split(" ")
    for at in range(spec.cloze_context // 2, len(words) - spec.cloze_span):
        span = words[at : at + spec.cloze_span]
        if all(word.isalpha() and word.isascii() for word in span) and sum(map(len, span)) > 3 * spec.cloze_span:
            spans.setdefault(" ".join(span), at)
    usable = list(spans.items())
    if len(usable) < 3 * spec.choices:
        return None
    true, place = usable[int(random.integers(len(usable)))]
    after = words[place - 1].lower()
    # A span whose previous word is the same could be just as right.
    rivals = [text for text, at in usable if text.lower() != true.lower() and words[at - 1].lower() != after]
    random.shuffle(rivals)
    rivals.sort(key=lambda text: abs(len(text) - len(true)))
    choices = [true, *rivals[: spec.choices - 1]]
    if len(choices) < spec.choices:
        return None
    order = random.permutation(len(choices)).tolist()
    context = " ".join(words[max(0, place - spec.cloze_context) : place])
    return Item(context=context, choices=[" " + choices[at] for at in order], answer=order.index(0))
