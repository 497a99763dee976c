"""What lm-eval logged of every item, as the score of each and the bits per byte of its correct answer.

Bits per byte: -log2 of the probability of the correct answer's text given the question, over its UTF-8 bytes (of a task
symbol, the bytes of its name). It falls long before the accuracy leaves chance, and can be compared between programs on
the same items, since it does not depend on the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.items import packed

__all__ = ["MOST_NATS", "item_scores", "perplexity_of"]

MOST_NATS = 700.0
"""Logarithm of the largest perplexity that is told: exp is infinite a little above."""


def item_scores(samples: Sequence[Mapping[str, Any]], metric: str, output_type: str) -> dict[str, Any]:
    """{items: as packed, and for multiple choice bits_per_byte: {value, n, se}} of one task.

    Args:
        samples: lm-eval's log of one task, a mapping an item.
        metric: the one that is reported, such as "acc".
    """
    logged = {sample["doc_id"]: sample for sample in samples if metric in sample}  # one filter has the metric
    ordered = [logged[number] for number in sorted(logged)]
    scores = [float(sample[metric]) for sample in ordered]
    if output_type != "multiple_choice":
        return {"items": packed(scores, None)}
    bits = [_bits_per_byte(sample) for sample in ordered]
    known = [value for value in bits if value is not None]
    if len(known) < len(bits) or not bits:
        return {"items": packed(scores, None)}
    se = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    mean = {"value": math.fsum(known) / len(known), "n": len(known), "se": se}
    return {"items": packed(scores, known), "bits_per_byte": mean}


def perplexity_of(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{perplexity: {value, n: documents or items, se}} where a task logs log-likelihoods: exp of minus their sum over
    the number of words (word_perplexity), or over the items (perplexity); {} for any other task, and where it is over
    exp(MOST_NATS).

    The standard error is that of a ratio of sums over documents, carried through exp.
    """
    for metric in ("word_perplexity", "perplexity"):
        logged = [sample[metric] for sample in samples if metric in sample]
        if logged:
            pairs = np.array([one if isinstance(one, tuple | list) else (one, 1) for one in logged], dtype=np.float64)
            mean, n = float(pairs[:, 0].sum() / pairs[:, 1].sum()), len(pairs)
            if not -mean <= MOST_NATS:
                return {}
            value, spread = math.exp(-mean), pairs[:, 0] - mean * pairs[:, 1]
            se = value * float(np.sqrt((spread**2).sum() * n / (n - 1))) / float(pairs[:, 1].sum()) if n > 1 else None
            return {"perplexity": {"value": value, "n": n, "se": se if se is not None and math.isfinite(se) else None}}
    return {}


def _bits_per_byte(sample: Mapping[str, Any]) -> float | None:
    """None where the correct answer cannot be told, as where several are."""
    texts = [str(arguments[1]) for arguments in sample["arguments"]]
    target = sample["target"]
    if isinstance(target, str):
        found = [number for number, text in enumerate(texts) if text.strip() == target.strip()]
        target = found[0] if len(found) == 1 else None
    if not isinstance(target, int) or not 0 <= target < len(texts):
        return None
    size = len(texts[target].encode())
    log_p = float(sample["filtered_resps"][target][0])
    return -log_p / math.log(2) / size if size and math.isfinite(log_p) else None
