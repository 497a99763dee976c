"""Makes shards (training/data/shards.py) from a stream of documents: tokenised in parallel, near-duplicates dropped,
a share of the documents held out, resumable.

Documents are taken in units of a fixed number, in the order of their source. A shard ends where a unit ends, and
progress.json is replaced after each: a kill costs at most one shard, and the same command goes on behind the last to
the same files. Workers only compute; what is kept and where it goes is decided in one process, in order.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import StoreError, UsageError
from common.files import read_json, sha256_text, write_atomic, write_json
from common.process import exit_with_parent
from training.data.near import PERMUTATIONS, Near, signature
from training.data.shards import MANIFEST, VERSION, file_sha256
from training.data.text_files import Side
from training.data.tokenizer import Codec

__all__ = ["UNIT", "Document", "Plan", "make_shards"]

UNIT = 256
"""Documents of one unit of work."""
_PROGRESS = "progress.json"
_TOKENIZER = "tokenizer.json"
Document = tuple[str, Side | None]
"""A text and its side; None: by its hash."""
Unit = list[tuple[bytes, np.ndarray, np.ndarray, Side | None]]
"""Of each document its SHA-256, its MinHash signature, its tokens and its side."""


@dataclass(frozen=True)
class Plan:
    """What is made.

    Attributes:
        source: what the documents are, for people and for recognising the same plan.
        tokenizer: its name, as in data.tokenizer.
        heldout_one_in: of so many documents without a side one is held out, chosen by its hash.
        heldout_tokens: at most so many; what is chosen beyond is dropped.
        near: overlap from which documents are near-duplicates; None keeps all but exact repeats.
    """

    source: dict[str, Any]
    tokenizer: str
    shard_tokens: int
    train_tokens: int | None
    heldout_tokens: int
    heldout_one_in: int = 100
    near: float | None = 0.8
    workers: int = 1

    def identity(self, tokenizer: str) -> str:
        # Of the tokenizer all of it counts, whatever its name.
        facts = {name: value for name, value in vars(self).items() if name not in ("workers", "tokenizer")}
        return sha256_text(f"{facts} {UNIT} {VERSION} {sha256_text(tokenizer)}")


def make_shards(
    plan: Plan, documents: Iterable[Document], tokenizer: str, out: Path, show: Callable[[int, int], None]
) -> dict[str, Any]:
    """Writes shards and manifest.json into `out`; returns the manifest.

    Args:
        documents: always the same, in the same order.
        tokenizer: its JSON.
        show: told (documents read, training tokens) after each unit.

    Raises:
        UsageError: `out` was begun by another plan, or there is too little text. StoreError: it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    work = _Work.begin(plan, tokenizer, out)
    if (out / MANIFEST).is_file():
        return dict(read_json(out / MANIFEST))
    write_atomic(out / _TOKENIZER, tokenizer)
    units = itertools.islice(_units(documents), work.units, None)
    for unit in _computed(units, out / _TOKENIZER, plan.workers):
        work.take(unit)
        show(work.units * UNIT, work.train_tokens)
        if work.full():
            break
    return work.end(Codec(out / _TOKENIZER))


class _Work:
    """What has been kept so far, and the shard that is being filled."""

    def __init__(self, plan: Plan, identity: str, out: Path) -> None:
        self._plan, self._identity, self._out = plan, identity, out
        self.units, self.shards = 0, []  # type: int, list[dict[str, Any]]
        self._near = Near(plan.near) if plan.near is not None else None
        self._seen: set[bytes] = set()
        self._train: list[np.ndarray] = []
        self._heldout: list[np.ndarray] = []
        self._marks: list[tuple[bytes, np.ndarray]] = []

    @classmethod
    def begin(cls, plan: Plan, tokenizer: str, out: Path) -> _Work:
        """Where an earlier start of the same plan was."""
        work = cls(plan, plan.identity(tokenizer), out)
        if not (out / _PROGRESS).is_file():
            return work
        found = read_json(out / _PROGRESS)
        if found.get("identity") != work._identity:
            raise UsageError(
                f"{out} was begun with other text, tokenizer or settings", f"name another --out, or remove {out}"
            )
        work.units, work.shards = found["units"], found["shards"]
        for number in range(len(work.shards)):
            marks = np.load(out / _marks_name(number), allow_pickle=False)
            for row in marks:
                work._remember(row[:32].tobytes(), row[32:].view(np.uint32))
        if work.shards:
            work._heldout = [np.fromfile(out / f"heldout-{len(work.shards):05d}.part", dtype=np.uint16)]
        return work

    @property
    def train_tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards) + sum(map(len, self._train))

    def full(self) -> bool:
        return self._plan.train_tokens is not None and self.train_tokens >= self._plan.train_tokens

    def take(self, unit: Unit) -> None:
        """Keeps what is new of one unit, and closes the shard when it is long enough."""
        for identity, mark, tokens, given in unit:
            if identity in self._seen or not self._remember(identity, mark):
                continue
            self._marks.append((identity, mark))
            held = int.from_bytes(identity[:8], "big") % self._plan.heldout_one_in == 0
            if given == "train" or (given is None and not held):
                self._train.append(tokens)
            elif sum(map(len, self._heldout)) < self._plan.heldout_tokens:
                self._heldout.append(tokens)
        self.units += 1
        if sum(map(len, self._train)) >= self._plan.shard_tokens:
            self._close()

    def _remember(self, identity: bytes, mark: np.ndarray) -> bool:
        self._seen.add(identity)
        return self._near is None or self._near.add(mark)

    def _close(self) -> None:
        number = len(self.shards)
        path = self._out / f"train-{number:05d}.bin"
        write_atomic(path, np.concatenate(self._train).tobytes())
        marks = [np.frombuffer(identity + mark.tobytes(), np.uint8) for identity, mark in self._marks]
        rows = np.stack(marks) if marks else np.zeros((0, 32 + 4 * PERMUTATIONS), np.uint8)
        write_atomic(self._out / _marks_name(number), _npy(rows))
        write_atomic(self._out / f"heldout-{number + 1:05d}.part", self._held().tobytes())
        self.shards.append({"file": path.name, "tokens": path.stat().st_size // 2, "sha256": file_sha256(path)})
        progress = {"identity": self._identity, "units": self.units, "shards": self.shards}
        write_json(self._out / _PROGRESS, progress)
        (self._out / f"heldout-{number:05d}.part").unlink(missing_ok=True)
        self._train, self._marks, self._heldout = [], [], [self._held()]

    def _held(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.uint16), *self._heldout])

    def end(self, codec: Codec) -> dict[str, Any]:
        if self._train:
            self._close()
        heldout = self._out / "heldout.bin"
        write_atomic(heldout, self._held().tobytes())
        if not self.shards or not heldout.stat().st_size:
            raise UsageError(
                f"the text is too short: {self.train_tokens:,} training and {heldout.stat().st_size // 2:,} held-out "
                "tokens without near-duplicates",
                "name more text, or a smaller --heldout-one-in",
            )
        manifest = {
            "version": VERSION,
            "tokenizer": self._plan.tokenizer,
            "tokenizer_sha256": sha256_text((self._out / _TOKENIZER).read_text(encoding="utf-8")),
            "end": codec.end,
            "vocab": codec.size,
            "sources": self._plan.source,
            "train": self.shards,
            "heldout": {
                "file": heldout.name,
                "tokens": heldout.stat().st_size // 2,
                "sha256": file_sha256(heldout),
            },
        }
        write_json(self._out / MANIFEST, manifest)
        for left in (*self._out.glob("heldout-*.part"), *self._out.glob("marks-*.npy")):
            left.unlink()
        return manifest


def _marks_name(number: int) -> str:
    return f"marks-{number:05d}.npy"


def _npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _units(documents: Iterable[Document]) -> Iterator[list[Document]]:
    remaining = iter(documents)
    while unit := list(itertools.islice(remaining, UNIT)):
        yield unit


def _computed(units: Iterator[list[Document]], tokenizer: Path, workers: int) -> Iterator[Unit]:
    """The units computed in order, a few ahead, so that memory stays bounded whatever the source."""
    if workers == 1:
        _start(str(tokenizer))
        yield from map(_compute, units)
        return
    os.environ["ASI_PARENT_PID"] = str(os.getpid())  # a pool's processes would outlive a killed parent
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (str(tokenizer),)) as pool:
        ahead: deque[Future[Unit]] = deque()
        try:
            for unit in units:
                ahead.append(pool.submit(_compute, unit))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


_codec: Codec | None = None


def _start(tokenizer: str) -> None:
    global _codec
    if multiprocessing.parent_process() is not None:
        exit_with_parent()
    _codec = Codec(Path(tokenizer))


def _compute(documents: list[Document]) -> Unit:
    if _codec is None:
        raise StoreError("the tokenizer was not loaded in this process")
    return [(_sha256(text), signature(text), _codec.encode_text([text]), side) for text, side in documents]


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
