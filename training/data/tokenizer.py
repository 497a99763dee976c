"""The tokenizer: byte-level BPE trained on the training text, with the symbols of the generated tasks in its
vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import JobError, StoreError, UsageError, first_line
from training.profiles import FIRST_TASKS, MOST_IDS, STREAM_TASKS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["END", "MARKERS", "WIDER_MARKERS", "Codec", "count_ids", "fetch", "special_tokens", "train"]

END = "<|end|>"
_ENDS = (END, "<|endoftext|>")
MARKERS = ("<|noise|>", "<|sep|>", "<|recall|>", "<|copy|>", "<|induce|>")
WIDER_MARKERS = {task: f"<|{task}|>" for task in STREAM_TASKS if task not in FIRST_TASKS}
"""Of the wider set of tasks: in the vocabulary of profiles that name one of them."""
TRAINING_CHARACTERS = 4_000_000
"""Merges stop changing long before the whole text is counted."""


def special_tokens(symbols: int, wider: bool = False) -> list[str]:
    """END, the task markers, `symbols` task symbols, and the markers of the wider set, in the order of their ids (0, 1,
    ...)."""
    return [END, *MARKERS, *(f"<|s{number}|>" for number in range(symbols)), *(WIDER_MARKERS.values() if wider else ())]


def train(documents: Iterable[str], vocab: int, symbols: int, wider: bool = False) -> Tokenizer:
    """Trains byte-level BPE of `vocab` entries; ids start with the special tokens. Deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special_tokens(symbols, wider),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_up_to(documents, TRAINING_CHARACTERS), trainer)
    return tokenizer


def _up_to(documents: Iterable[str], characters: int) -> Iterable[str]:
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def fetch(name: str) -> Tokenizer:
    """A published tokenizer from the Hugging Face hub or its local cache.

    Raises:
        JobError: it can be reached in neither.
        UsageError: its ids do not fit the token files, or it has no end token.
    """
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_pretrained(name)
    # A foreign library, which raises whatever those below it do.
    except Exception as error:
        raise JobError(
            f"the tokenizer {name!r} is neither in the local Hugging Face cache nor reachable: {first_line(error)}",
            "connect to huggingface.co or set HF_HOME to a cache that has it; profiles cpu-smoke and cpu need neither",
        ) from error
    if (ids := count_ids(found)) > MOST_IDS:
        raise UsageError(
            f"the tokenizer {name!r} has {ids:,} ids, and token files hold at most {MOST_IDS:,} (16 bits)",
            "name a smaller one in data.tokenizer, or 'bpe'",
        )
    if _end(found) is None:
        raise UsageError(
            f"the tokenizer {name!r} has no token that ends a document: expected one of {', '.join(_ENDS)}",
            "name another in data.tokenizer, or 'bpe'",
        )
    return found


def count_ids(tokenizer: Tokenizer) -> int:
    """One more than the highest id: a published vocabulary may leave some out."""
    return 1 + max(tokenizer.get_vocab().values())


def _end(tokenizer: Tokenizer) -> int | None:
    return next((token for token in map(tokenizer.token_to_id, _ENDS) if token is not None), None)


class Codec:
    """Text to token ids and back.

    `encode_text` treats special tokens that occur in the text as ordinary characters; `encode_items` reads them as
    the symbols they are: benchmark items of generated tasks are written with them.
    """

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self._items: Tokenizer = Tokenizer.from_file(str(file))
        self._text: Tokenizer = Tokenizer.from_file(str(file))
        self._text.encode_special_tokens = True
        end = _end(self._items)
        if end is None:
            raise StoreError(f"{file} has no token that ends a document", f"remove the folder {file.parent}")
        self.end: int = end
        self.size: int = count_ids(self._items)

    def encode_text(self, documents: Sequence[str]) -> np.ndarray:
        """uint16 [tokens]: the documents, each followed by the end token."""
        parts: list[np.ndarray] = []
        for encoding in self._text.encode_batch(list(documents), add_special_tokens=False):
            parts.append(np.asarray([*encoding.ids, self.end], dtype=np.uint16))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)

    def encode_items(self, text: str) -> list[int]:
        ids: list[int] = self._items.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._items.decode(list(ids), skip_special_tokens=False)
        return text
