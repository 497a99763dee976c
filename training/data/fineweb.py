"""A Hugging Face dataset as corpus: streamed, tokenised on the way, never held in memory.

One document in a thousand (by hash) is held out until the profile's held-out size is reached; exact repeats of a
document are dropped. No near-duplicate removal: the published system had none, and the dataset is deduplicated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import JobError
from common.files import sha256_text, write_json
from training.data import tokenizer
from training.data.fits import HUB_ADVICE, require_length, require_vocabulary
from training.profiles import Profile

__all__ = ["build", "documents"]

_BATCH = 1000
_ONE_IN = 1000


def build(
    profile: Profile, folder: Path, say: Callable[[str], None], items: Callable[[list[str]], object]
) -> dict[str, object]:
    """Writes tokenizer.json, train.bin, heldout.bin and items.json into `folder`; returns the corpus facts.

    Args:
        items: makes the scored items of the project's own tasks from the held-out documents.

    Raises:
        UsageError: the tokenizer has more entries than `model.vocab`, or the dataset gives too little text.
        JobError: the dataset or the tokenizer can be reached neither on the hub nor in the local cache.
    """
    if profile.data.tokenizer == "bpe":
        made = tokenizer.train(
            documents(profile.data.dataset), profile.model.vocab, profile.tasks.symbols, profile.tasks.wider
        )
    else:
        made = tokenizer.fetch(profile.data.tokenizer)
    made.save(str(folder / "tokenizer.json"))
    codec = tokenizer.Codec(folder / "tokenizer.json")
    require_vocabulary(profile, codec)
    digest = hashlib.sha256()
    kept: list[str] = []
    counts = {"train": 0, "heldout": 0}
    characters = dict(counts)
    limits = {"train": profile.data.train_chars, "heldout": profile.data.heldout_chars}
    with (folder / "train.bin").open("wb") as train, (folder / "heldout.bin").open("wb") as heldout:
        for batch in _batches(profile.data.dataset):
            sides: dict[str, list[str]] = {"train": [], "heldout": []}
            for text in batch:
                identity = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
                digest.update(identity)
                side = "heldout" if int.from_bytes(identity[:4], "big") % _ONE_IN == 0 else "train"
                if characters[side] < limits[side]:
                    characters[side] += len(text)
                    sides[side].append(text)
            kept += sides["heldout"]
            for side, handle in (("train", train), ("heldout", heldout)):
                tokens = codec.encode_text(sides[side])
                tokens.tofile(handle)
                counts[side] += len(tokens)
            say(f"{profile.data.dataset}: {counts['train'] / 1e6:.0f}M training tokens")
            if characters["train"] >= limits["train"]:
                break
    require_length(profile, counts, f"one document in {_ONE_IN}", HUB_ADVICE)
    write_json(folder / "items.json", items(kept))
    return {
        "sha256": digest.hexdigest(),
        "tokenizer_sha256": sha256_text((folder / "tokenizer.json").read_text(encoding="utf-8")),
        "vocab": codec.size,
        "end": codec.end,
        "train_tokens": counts["train"],
        "heldout_tokens": counts["heldout"],
        "sources": {"dataset": profile.data.dataset},
    }


def documents(dataset: str) -> Iterator[str]:
    """Texts of a Hugging Face dataset, NAME:CONFIG, streamed, in its order.

    Raises:
        JobError: it can be reached neither on the hub nor in the local cache.
    """
    name, _, configuration = dataset.partition(":")
    try:
        from datasets import load_dataset

        found = iter(load_dataset(name, configuration, split="train", streaming=True))
        first = next(found)
    except Exception as error:
        raise JobError(
            f"the dataset {name} ({configuration}) is not reachable: {str(error).splitlines()[0]}",
            "connect to huggingface.co, or use --profile cpu, or train on your own files with --training.text FILE",
        ) from error
    yield str(first["text"])
    for document in found:
        yield str(document["text"])


def _batches(dataset: str) -> Iterator[list[str]]:
    """Batches of documents without exact repeats."""
    seen: set[int] = set()
    batch: list[str] = []
    for text in documents(dataset):
        identity = hash(text)
        if identity in seen:
            continue
        seen.add(identity)
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
