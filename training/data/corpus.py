"""The corpus of a profile: text, tokenizer, tokens and scored items, made once and cached; safe for several processes.

The cache is a folder a key; the key is a hash of the profile's data section, the versions of the packages read, the
user's files and the code of this package. A folder appears whole (renamed into place) or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.errors import JobError, StoreError, UsageError
from common.files import read_json, read_regular, sha256_text, write_json
from common.process import spawn, terminate
from training.data import extract, shards, tokenizer
from training.data.dedup import Deduplicator
from training.data.packing import row_type, write_stream
from training.data.shards import TokenFiles, read_manifest
from training.data.tasks import GENERATORS, LONGER, Item, cloze_items, generate_items
from training.profiles import Profile

__all__ = ["Corpus", "default_cache", "load_items", "prepare_corpus"]

ITEM_SEED = 90210
"""Seed of the scored items: the same for every run of a profile, and never a training seed."""
LONGEST_TEXT = 4 << 30
"""Bytes of one of the user's files, which are held in memory."""
Report = Callable[[str], None]
_TASKS = ("sequences.py", "tasks.py", "tasks_mad.py", "tasks_state.py")
_CODE = ("extract.py", "dedup.py", "tokenizer.py", *_TASKS, "corpus.py", "shards.py")


def default_cache() -> Path:
    """The user's cache folder for this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asi-arch"


@dataclass(frozen=True)
class Corpus:
    """One prepared corpus on disk. `train` may be mounted in the sandbox; `heldout` and `items` never are."""

    folder: Path
    sha256: str
    tokenizer_sha256: str
    vocab: int
    end: int
    train_tokens: int
    heldout_tokens: int
    sources: dict[str, str]

    @property
    def train(self) -> list[Path]:
        """The files of training tokens, in order: one, or the shards."""
        listed = self.folder / "shards.json"
        names = read_json(listed) if listed.is_file() else ["train.bin"]
        return [self.folder / name for name in names]

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.bin"

    @property
    def items(self) -> Path:
        return self.folder / "items.json"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def stream(self, profile: Profile, seed: int, cancel: threading.Event | None = None) -> Path:
        """The packed training stream of one run, made on first use. Any number of processes may ask at once.

        Raises:
            JobError: `cancel` was set before it was made.
        """
        ended = cancel or threading.Event()
        code = _code_hash(("packing.py", *_TASKS))
        identity = sha256_text(f"{profile.train.seq_len} {profile.tasks.model_dump_json()} {code}")[:12]
        rows = profile.train.steps * profile.train.batch
        path = self.folder / "streams" / f"{identity}-{rows}-seed{seed}.bin"
        size = rows * (profile.train.seq_len + 1) * row_type(profile.model.vocab).itemsize
        if path.is_file() and path.stat().st_size == size:
            return path
        with _writing(path.parent), _locked(self.folder / "streams.lock", lambda line: None, ended):
            if path.is_file() and path.stat().st_size == size:
                return path
            for left in path.parent.glob(".stream-*"):
                left.unlink(missing_ok=True)  # of a process that was killed: whoever holds the lock writes
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".stream-")
            os.close(handle)
            try:
                write_stream(profile, TokenFiles(self.train), seed, Path(name), self.end, lambda: _go_on(ended))
                Path(name).chmod(0o644)
                Path(name).replace(path)
            finally:
                Path(name).unlink(missing_ok=True)
        return path


def load_items(file: Path) -> dict[str, list[Item]]:
    """The scored items of each of the project's own tasks."""
    items: dict[str, list[Item]] = read_json(file)
    return items


def prepare_corpus(
    profile: Profile,
    cache: Path | None = None,
    text: Sequence[Path] = (),
    report: Report | None = None,
    cancel: threading.Event | None = None,
) -> Corpus:
    """The corpus of `profile`, from the cache or made now; about 10-60 s the first time.

    Args:
        text: the user's own files, which replace the docstrings.
        report: told in one line what is being done.
        cancel: once set, it ends within about a second; nothing half-made stays.

    Raises:
        UsageError: the user's files are unreadable or too short.
        JobError: a package, dataset or tokenizer is not there, or it was cancelled.
        StoreError: the cache cannot be written.
    """
    root, ended = cache or default_cache(), cancel or threading.Event()
    tell = report or (lambda line: None)

    def say(line: str) -> None:
        _go_on(ended)
        tell(line)

    made: Future[Corpus] = Future()

    def make() -> None:
        try:
            made.set_result(_prepared(profile, root, text, say, ended))
        except BaseException as error:  # noqa: BLE001 - the boundary of a thread: raised again below
            made.set_exception(error)

    # Tokenising, hashing and a dataset's server cannot be interrupted, but they can be left behind: this thread, which
    # may be the one that hears signals, only waits.
    threading.Thread(target=make, name="corpus", daemon=True).start()
    while True:
        try:
            return made.result(0.1)
        except TimeoutError:
            if ended.is_set():
                break
    with contextlib.suppress(TimeoutError):
        return made.result(0.5)
    for left in (root / "corpus").glob(f".building-*-{os.getpid()}-*"):
        shutil.rmtree(left, ignore_errors=True)
    raise _cancelled()


def _prepared(profile: Profile, root: Path, text: Sequence[Path], say: Report, ended: threading.Event) -> Corpus:
    _go_on(ended)
    folder = root / "corpus" / _key(profile, text)
    if not (folder / "corpus.json").is_file():
        with _writing(folder.parent), _locked(folder.parent / f"{folder.name}.lock", say, ended):
            if not (folder / "corpus.json").is_file():
                for left in folder.parent.glob(f".building-{folder.name}-*"):
                    shutil.rmtree(left, ignore_errors=True)  # of a process that was killed: the lock is ours
                _build(profile, root, folder, text, say, ended)
    return _open(folder)


def _open(folder: Path) -> Corpus:
    try:
        corpus = Corpus(folder=folder, **read_json(folder / "corpus.json"))
    except TypeError as error:
        raise StoreError(f"the cached corpus {folder} is damaged: {error}", f"remove {folder}") from error
    for paths, tokens in ((corpus.train, corpus.train_tokens), ([corpus.heldout], corpus.heldout_tokens)):
        if not all(path.is_file() for path in paths) or sum(path.stat().st_size for path in paths) != 2 * tokens:
            raise StoreError(
                f"the cached corpus {folder} is damaged: {paths[0].name} is incomplete", f"remove {folder}"
            )
    return corpus


def _key(profile: Profile, text: Sequence[Path]) -> str:
    facts: dict[str, object] = {
        "data": profile.data.model_dump(),
        "vocab": profile.model.vocab,
        "tasks": profile.tasks.model_dump(exclude={"share"}),
        "items": [profile.eval.items, profile.eval.benchmarks],
        "code": _code_hash(_CODE),
        "tokenizers": extract.package_version("tokenizers"),
    }
    if text:
        facts["text"] = [_file_hash(path) for path in text]
    elif profile.data.source == "shards":
        facts["shards"] = read_manifest(Path(profile.data.shards).expanduser())
    elif profile.data.source == "docstrings":
        packages = [*profile.data.train, *profile.data.heldout]
        facts["packages"] = {name: extract.package_version(name) for name in packages}
    return sha256_text(json.dumps(facts, sort_keys=True))[:20]


def _code_hash(names: Sequence[str]) -> str:
    here = Path(__file__).resolve().parent
    return sha256_text("\0".join((here / name).read_text(encoding="utf-8") for name in names))


def _file_hash(path: Path) -> str:
    try:
        return hashlib.sha256(read_regular(path, LONGEST_TEXT)).hexdigest()
    except OSError as error:
        raise UsageError(
            f"cannot read the text file {path}: {error.strerror}", "name readable files with --text"
        ) from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns a failure to write the cache into one clear error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write the corpus cache {folder}: {error.strerror or error}",
            "free disk space, or name another folder with --training.cache_dir",
        ) from error


def _go_on(cancel: threading.Event) -> None:
    if cancel.is_set():
        raise _cancelled()


def _cancelled() -> JobError:
    return JobError("preparing the corpus was cancelled")


@contextmanager
def _locked(path: Path, say: Report, cancel: threading.Event | None = None) -> Iterator[None]:
    """Holds an exclusive lock on `path`; the kernel releases it when the holder dies."""
    with path.open("w") as handle:
        said = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    say("another process is preparing this corpus; waiting for it")
                said = True
                if cancel is not None:
                    _go_on(cancel)
                time.sleep(0.1)
        yield


def _build(
    profile: Profile, root: Path, folder: Path, text: Sequence[Path], say: Report, cancel: threading.Event
) -> None:
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".building-{folder.name}-{os.getpid()}-"))
    try:
        temporary.chmod(0o755)
        if profile.data.source == "fineweb" and not text:
            from training.data.fineweb import build as build_fineweb

            facts = build_fineweb(profile, temporary, say, partial(_items, profile))
        elif profile.data.source == "shards" and not text:
            facts = _build_shards(profile, temporary, say)
        else:
            facts = _build_text(profile, root, temporary, text, say, cancel)
        _go_on(cancel)
        write_json(temporary / "corpus.json", facts)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build_shards(profile: Profile, folder: Path, say: Report) -> dict[str, object]:
    facts, codec = shards.build(Path(profile.data.shards).expanduser(), profile.model.vocab, folder, say)
    _refuse_short(profile, {"train": int(str(facts["train_tokens"])), "heldout": int(str(facts["heldout_tokens"]))})
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
        train, heldout = extract.file_blocks(text)
        sources = {path.name: _file_hash(path)[:16] for path in text}
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
    trained.save(str(folder / "tokenizer.json"))
    codec = tokenizer.Codec(folder / "tokenizer.json")
    if codec.size > profile.model.vocab:
        raise UsageError(
            f"the tokenizer has {codec.size} entries, more than model.vocab = {profile.model.vocab}",
            f"set model.vocab of profile {profile.name} to at least {codec.size}",
        )
    say(f"encoding {sum(map(len, train)) / 1e6:.1f} + {sum(map(len, heldout)) / 1e6:.1f} MB of text")
    counts = {
        side: _encode(codec, documents, folder / f"{side}.bin", cancel) for side, documents in _sides(train, heldout)
    }
    _refuse_short(profile, counts)
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
            _go_on(cancel)
            tokens = codec.encode_text(documents[start : start + 2000])
            tokens.tofile(handle)
            total += len(tokens)
    return total


def _refuse_short(profile: Profile, counts: dict[str, int]) -> None:
    windows, length = profile.eval.heldout_sequences, profile.train.seq_len
    need = {
        "train": (4 * (length + 1), "training tokens"),
        # Windows that overlap would count tokens twice, and show one another's future (training/scorer/audit.py).
        "heldout": (windows * (length + 1), f"held-out tokens, so that the {windows} scored windows do not overlap"),
    }
    for side, (least, what) in need.items():
        if counts[side] < least:
            raise UsageError(
                f"the text is too short for profile {profile.name}: expected at least {least:,} {what}, got "
                f"{counts[side]:,} (every tenth part is held out, duplicates are removed)",
                "name more text with --text",
            )


def _items(profile: Profile, heldout: list[str]) -> dict[str, list[Item]]:
    spec, count = profile.tasks, profile.eval.items
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
                    "name more text with --text, or leave cloze out of the profile's eval.benchmarks",
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
        name: cache / f"{name}-{extract.package_version(name)}-{_code_hash(('extract.py',))[:8]}.json"
        for name in packages
    }
    missing = [name for name in packages if not files[name].is_file()]
    with _writing(cache), ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(_extract, name, files[name], cancel) for name in missing}
        for name, job in jobs.items():
            say(f"reading the docstrings of {name}")
            job.result()
    return {name: read_json(file) for name, file in files.items()}


def _extract(package: str, target: Path, cancel: threading.Event) -> None:
    """Extraction is pure Python, so each package gets a process of its own."""
    _go_on(cancel)
    command = [sys.executable, "-m", "training.data.extract", package, str(target)]
    process = spawn(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while True:
            try:
                _, said = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                _go_on(cancel)
    finally:
        terminate(process)
    if process.returncode != 0:
        raise JobError(f"cannot read the docstrings of {package}: {said.decode('utf-8', 'replace').strip()[-500:]}")
