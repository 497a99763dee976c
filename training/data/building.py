"""Makes the corpus of a profile in a folder: text from its source, tokenizer, tokens, scored items."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from common.errors import JobError, StoreError, UsageError
from common.files import read_json, read_regular, sha256_text, write_json
from common.process import spawn, terminate
from training.data import extract, fineweb, shards, text_files, tokenizer
from training.data.dedup import Deduplicator
from training.data.fits import HUB_ADVICE, TEXT_ADVICE, require_length, require_vocabulary
from training.data.tasks import GENERATORS, LONGER, Item, cloze_items, generate_items
from training.profiles import Profile

__all__ = ["ITEM_SEED", "Report", "build", "cancelled", "code_hash", "file_hash", "go_on", "writing"]

ITEM_SEED = 90210
"""Seed of the scored items: the same for every run of a profile, and never a training seed."""
_ONE_IN = 10
"""Of the user's files one character in so many is held out."""
LONGEST_TEXT = 4 << 30
"""Bytes of one of the user's files, which are held in memory."""
Report = Callable[[str], None]


def build(
    profile: Profile, root: Path, folder: Path, text: Sequence[Path], say: Report, cancel: threading.Event
) -> dict[str, object]:
    """Makes tokens, tokenizer and scored items in `folder` and returns the facts of `Corpus`.

    Args:
        root: of the cache, where the docstrings of a package are kept.
        text: the user's own files, in place of the profile's source.

    Raises: as `training.data.corpus.prepare_corpus`; OSError where `folder` cannot be written.
    """
    if profile.data.source == "fineweb" and not text:
        return fineweb.build(profile, folder, say, partial(_items, profile, advice=HUB_ADVICE))
    if profile.data.source == "shards" and not text:
        return _build_shards(profile, folder, say)
    return _build_text(profile, root, folder, text, say, cancel)


def _build_shards(profile: Profile, folder: Path, say: Report) -> dict[str, object]:
    facts, codec = shards.build(Path(profile.data.shards).expanduser(), profile, folder, say)
    counts = {"train": int(str(facts["train_tokens"])), "heldout": int(str(facts["heldout_tokens"]))}
    require_length(profile, counts, "a share", "prepare more text with training/prepare.py")
    tokens = np.fromfile(folder / "heldout.bin", dtype=np.uint16)
    ends = np.flatnonzero(tokens == codec.end)
    documents = [codec.decode(part[part != codec.end].tolist()) for part in np.split(tokens, ends + 1) if len(part) > 1]
    write_json(folder / "items.json", _items(profile, documents))
    return facts


def _build_text(
    profile: Profile, root: Path, folder: Path, text: Sequence[Path], say: Report, cancel: threading.Event
) -> dict[str, object]:
    if text:
        say(f"reading {len(text)} text file{'s' if len(text) > 1 else ''}")
        sides = list(text_files.documents(text, _ONE_IN))
        train, heldout = ([block for block, side in sides if side == wanted] for wanted in ("train", "heldout"))
        sources = {path.name: file_hash(path)[:16] for path in text}
    else:
        packages = _extract_all([*profile.data.train, *profile.data.heldout], root / "docstrings", say, cancel)
        train = extract.sample_documents(
            {name: packages[name] for name in profile.data.train}, profile.data.train_chars
        )
        heldout = extract.sample_documents(
            {name: packages[name] for name in profile.data.heldout}, profile.data.heldout_chars
        )
        sources = {name: extract.package_version(name) for name in packages}
    say(f"removing near-duplicates from {len(train):,} + {len(heldout):,} documents")
    seen = Deduplicator()
    train = seen.filter(train)
    heldout = seen.filter(heldout)
    say(f"training the tokenizer ({profile.model.vocab} entries)")
    if profile.data.tokenizer == "bpe":
        trained = tokenizer.train(train, profile.model.vocab, profile.tasks.symbols, profile.tasks.wider)
    else:
        trained = tokenizer.fetch(profile.data.tokenizer)
        require_vocabulary(profile, tokenizer.count_ids(trained))
    trained.save(str(folder / "tokenizer.json"))
    codec = tokenizer.Codec(folder / "tokenizer.json")
    say(f"encoding {sum(map(len, train)) / 1e6:.1f} + {sum(map(len, heldout)) / 1e6:.1f} MB of text")
    counts = {
        side: _encode(codec, documents, folder / f"{side}.bin", cancel) for side, documents in _sides(train, heldout)
    }
    held_out = f"one part in {_ONE_IN}" if text else "what data.heldout names"
    require_length(profile, counts, held_out, TEXT_ADVICE)
    write_json(folder / "items.json", _items(profile, heldout))
    return {
        "sha256": _text_hash(train, heldout),
        "tokenizer_sha256": sha256_text((folder / "tokenizer.json").read_text(encoding="utf-8")),
        "vocab": codec.size,
        "end": codec.end,
        "train_tokens": counts["train"],
        "heldout_tokens": counts["heldout"],
        "sources": sources,
    }


def _sides(train: list[str], heldout: list[str]) -> tuple[tuple[str, list[str]], ...]:
    return ("train", train), ("heldout", heldout)


def _encode(codec: tokenizer.Codec, documents: list[str], target: Path, cancel: threading.Event) -> int:
    total = 0
    with target.open("wb") as handle:
        for start in range(0, len(documents), 2000):
            go_on(cancel)
            tokens = codec.encode_text(documents[start : start + 2000])
            tokens.tofile(handle)
            total += len(tokens)
    return total


def _items(profile: Profile, heldout: list[str], advice: str = TEXT_ADVICE) -> dict[str, list[Item]]:
    spec, count = profile.tasks, profile.eval.own_items
    names = tokenizer.special_tokens(spec.symbols, spec.wider)
    items: dict[str, list[Item]] = {}
    for task in profile.eval.benchmarks:
        if task in GENERATORS or task in LONGER:
            items[task] = generate_items(task, spec, count, names, ITEM_SEED, profile.train.seq_len)
        elif task == "cloze":
            items[task] = cloze_items(heldout, spec, count, ITEM_SEED)
            if len(items[task]) < 8:
                raise UsageError(
                    f"the held-out text gives only {len(items[task])} cloze items, expected at least 8",
                    f"{advice}, or leave cloze out of the profile's eval.benchmarks",
                )
    return items


def _text_hash(train: list[str], heldout: list[str]) -> str:
    digest = hashlib.sha256()
    for side, documents in _sides(train, heldout):
        digest.update(f"{side} {len(documents)}\0".encode())
        for document in documents:
            digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _extract_all(packages: Sequence[str], cache: Path, say: Report, cancel: threading.Event) -> dict[str, list[str]]:
    """Docstrings of each package, from the cache or read now, two packages at a time."""
    files = {
        name: cache / f"{name}-{extract.package_version(name)}-{code_hash(('extract.py',))[:8]}.json"
        for name in packages
    }
    missing = [name for name in packages if not files[name].is_file()]
    with writing(cache), ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(_extract, name, files[name], cancel) for name in missing}
        for name, job in jobs.items():
            say(f"reading the docstrings of {name}")
            job.result()
    return {name: read_json(file) for name, file in files.items()}


def _extract(package: str, target: Path, cancel: threading.Event) -> None:
    """Extraction is pure Python, so each package gets a process of its own."""
    go_on(cancel)
    command = [sys.executable, "-m", "training.data.extract", package, str(target)]
    process = spawn(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while True:
            try:
                _, said = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                go_on(cancel)
    finally:
        terminate(process)
    if process.returncode != 0:
        raise JobError(f"cannot read the docstrings of {package}: {said.decode('utf-8', 'replace').strip()[-500:]}")


def code_hash(names: Sequence[str]) -> str:
    """Of files of this package."""
    here = Path(__file__).resolve().parent
    return sha256_text("\0".join((here / name).read_text(encoding="utf-8") for name in names))


def file_hash(path: Path) -> str:
    try:
        return hashlib.sha256(read_regular(path, LONGEST_TEXT)).hexdigest()
    except OSError as error:
        raise UsageError(
            f"cannot read the text file {path}: {error.strerror}", "name readable files with --text"
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a failure to write the cache into one clear error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write the corpus cache {folder}: {error.strerror or error}",
            "free disk space, or name another folder with --training.cache_dir",
        ) from error


def go_on(cancel: threading.Event) -> None:
    """Raises:
    JobError: `cancel` is set.
    """
    if cancel.is_set():
        raise cancelled()


def cancelled() -> JobError:
    return JobError("preparing the corpus was cancelled")
