"""A Hugging Face dataset as corpus: streamed, tokenised on the way, never held in memory.

One document in a thousand (by hash) is held out until the profile's held-out size is reached; exact repeats of a
document are dropped. No near-duplicate removal: the published system had none, and the dataset is deduplicated.

What is read is kept after every thousand documents, so that a preparation that was broken off, by the network or by a
kill, goes on there and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.files import sha256_text, write_json
from training.data import tokenizer
from training.data.fits import HUB_ADVICE, require_length, require_vocabulary
from training.data.hub import HubDataset, MovedError, Place
from training.data.partial import PROGRESS, Partial
from training.profiles import Profile

__all__ = ["UNFINISHED", "build"]

_BATCH = 1000
_ONE_IN = 1000
_TOKENIZER, _TRAIN, _SEEN, _HELDOUT = "tokenizer.json", "train.bin", "seen.bin", "heldout.jsonl"
UNFINISHED = (PROGRESS, _SEEN, _HELDOUT)
"""Files that only a preparation under way needs."""
Report = Callable[[str], None]
MakeItems = Callable[[list[str]], object]


def build(profile: Profile, folder: Path, say: Report, items: MakeItems) -> dict[str, object]:
    """Writes tokenizer.json, train.bin, heldout.bin and items.json into `folder`; returns the corpus facts.

    Args:
        folder: may hold what an earlier start kept, which is gone on from.
        items: makes the scored items of the project's own tasks from the held-out documents.

    Raises:
        UsageError: the tokenizer has more entries than `model.vocab`, or the dataset gives too little text, or none.
        JobError: the dataset or the tokenizer can be reached neither on the hub nor in the local cache, or the stream
            broke off: what was read is kept.
    """
    name = profile.data.dataset
    say(f"opening the dataset {name}")
    try:
        return _build(profile, HubDataset(name), folder, say, items)
    except MovedError:
        say(f"{name}: other documents than at the last start; beginning anew")
        (folder / PROGRESS).unlink()
        return _build(profile, HubDataset(name), folder, say, items)


def _build(profile: Profile, source: HubDataset, folder: Path, say: Report, items: MakeItems) -> dict[str, object]:
    with Partial(folder, (_TOKENIZER, _TRAIN, _SEEN, _HELDOUT), source.revision) as partial:
        if partial.note is not None:
            say(f"{source.name}: {partial.note}; beginning anew")
        if partial.kept is None:
            partial.append(_TOKENIZER, _tokenizer(profile, source).to_str(pretty=True).encode())
            partial.flush()
        codec = tokenizer.Codec(folder / _TOKENIZER)
        if profile.data.tokenizer != "bpe":  # ours has as many entries as were asked for, or as the text gives
            require_vocabulary(profile, codec.size)
        taken = _Taken(profile, partial, codec)
        if taken.place is not None:
            say(f"{source.name}: going on behind {taken.place.documents:,} documents")
        for batch in taken.batches(source):
            taken.take(batch)
            if taken.full():
                break
            assert source.place is not None
            taken.keep(source.place)
            say(f"{source.name}: {taken.train_tokens / 1e6:.1f}M training tokens")
    heldout = codec.encode_text(taken.heldout)
    heldout.tofile(folder / "heldout.bin")
    counts = {"train": taken.train_tokens, "heldout": len(heldout)}
    require_length(profile, counts, f"one document in {_ONE_IN}", HUB_ADVICE)
    write_json(folder / "items.json", items(taken.heldout))
    return {
        "sha256": taken.digest.hexdigest(),
        "tokenizer_sha256": sha256_text((folder / _TOKENIZER).read_text(encoding="utf-8")),
        "vocab": codec.size,
        "end": codec.end,
        "train_tokens": counts["train"],
        "heldout_tokens": counts["heldout"],
        "sources": {"dataset": source.name},
    }


def _tokenizer(profile: Profile, source: HubDataset) -> Any:
    if profile.data.tokenizer != "bpe":
        return tokenizer.fetch(profile.data.tokenizer)
    return tokenizer.train(source.texts(), profile.model.vocab, profile.tasks.symbols, profile.tasks.wider)


class _Taken:
    """What was taken from the dataset so far, from an earlier start on.

    Attributes:
        place: where the dataset is gone on from; None: from its beginning.
        digest: of the documents, in order.
    """

    def __init__(self, profile: Profile, partial: Partial, codec: tokenizer.Codec) -> None:
        self._partial, self._codec = partial, codec
        self._limits = {"train": profile.data.train_chars, "heldout": profile.data.heldout_chars}
        self._characters = {"train": 0, "heldout": 0}
        self.train_tokens = 0
        self.place: Place | None = None
        kept = partial.kept
        if kept is not None:
            self._characters, self.train_tokens = dict(kept["characters"]), int(kept["train_tokens"])
            self.place = Place(**kept["place"])
        identities = partial.read(_SEEN)
        self.digest = hashlib.sha256(identities)
        self._seen = {_short(identities[at : at + 32]) for at in range(0, len(identities), 32)}
        self.heldout: list[str] = [json.loads(line) for line in partial.read(_HELDOUT).splitlines()]

    def batches(self, source: HubDataset) -> Iterator[list[tuple[str, bytes]]]:
        """Documents without exact repeats, each with its hash, so many at a time."""
        batch: list[tuple[str, bytes]] = []
        for text, identity in source.documents(self.place):
            if _short(identity) in self._seen:
                continue
            self._seen.add(_short(identity))
            batch.append((text, identity))
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def take(self, batch: list[tuple[str, bytes]]) -> None:
        """Keeps of each document what its side still lacks."""
        sides: dict[str, list[str]] = {"train": [], "heldout": []}
        for text, identity in batch:
            self.digest.update(identity)
            self._partial.append(_SEEN, identity)
            side = "heldout" if int.from_bytes(identity[:4], "big") % _ONE_IN == 0 else "train"
            if self._characters[side] < self._limits[side]:
                self._characters[side] += len(text)
                sides[side].append(text)
        self.heldout += sides["heldout"]
        for text in sides["heldout"]:
            self._partial.append(_HELDOUT, json.dumps(text).encode() + b"\n")
        tokens = self._codec.encode_text(sides["train"])
        self._partial.append(_TRAIN, tokens.tobytes())
        self.train_tokens += len(tokens)

    def keep(self, place: Place) -> None:
        """The next start goes on from `place`, behind the last batch taken."""
        facts = {"place": vars(place), "characters": self._characters, "train_tokens": self.train_tokens}
        self._partial.commit(facts)

    def full(self) -> bool:
        return self._characters["train"] >= self._limits["train"]


def _short(identity: bytes) -> int:
    """Eight bytes tell the documents of any dataset apart, and are a quarter of the memory."""
    return int.from_bytes(identity[:8], "big")
