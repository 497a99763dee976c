"""The corpus of a profile: text, tokenizer, tokens and scored items, made once and cached; safe for several processes.

The cache is a folder a key; the key is a hash of the profile's data section, the versions of the packages read, the
user's files and the code of this package. A folder appears whole (renamed into place) or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import StoreError, UsageError
from common.files import read_json, sha256_text, write_json
from training.data import extract
from training.data.building import Report, build, cancelled, code_hash, file_hash, go_on, writing
from training.data.fineweb import UNFINISHED
from training.data.fits import needs_symbols, package_versions
from training.data.packing import row_type, write_stream
from training.data.partial import PROGRESS
from training.data.shards import TokenFiles, read_manifest
from training.data.tasks import Item
from training.profiles import Profile

__all__ = ["Corpus", "default_cache", "load_items", "prepare_corpus"]

_TASKS = ("sequences.py", "tasks.py", "tasks_mad.py", "tasks_state.py")
_SOURCES = ("extract.py", "text_files.py", "shards.py", "fineweb.py", "hub.py")
_CODE = (*_SOURCES, "dedup.py", "tokenizer.py", *_TASKS, "building.py", "fits.py")


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
            JobError: `cancel` was set before it was made. StoreError: it is larger than the free disk.
        """
        ended = cancel or threading.Event()
        code = code_hash(("packing.py", *_TASKS))
        shape = f"{profile.train.seq_len} {profile.data.order} {profile.tasks.model_dump_json()}"
        identity = sha256_text(f"{shape} {code}")[:12]
        rows = profile.train.steps * profile.train.batch
        path = self.folder / "streams" / f"{identity}-{rows}-seed{seed}.bin"
        size = rows * (profile.train.seq_len + 1) * row_type(profile.model.vocab).itemsize
        if path.is_file() and path.stat().st_size == size:
            return path
        with writing(path.parent), _locked(self.folder / "streams.lock", lambda line: None, ended):
            if path.is_file() and path.stat().st_size == size:
                return path
            for left in path.parent.glob(".stream-*"):
                left.unlink(missing_ok=True)  # of a process that was killed: whoever holds the lock writes
            if size > (free := shutil.disk_usage(path.parent).free):
                raise StoreError(
                    f"the training stream of profile {profile.name} takes {size / 2**30:,.1f} GiB (steps x batch x "
                    f"seq_len), and {free / 2**30:,.1f} are free where {path.parent} lies",
                    "free disk space, set training.cache_dir to a larger disk, or correct the profile",
                )
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".stream-")
            os.close(handle)
            try:
                write_stream(profile, TokenFiles(self.train), seed, Path(name), self.end, lambda: go_on(ended))
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
        go_on(ended)
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
    # Not by `made.result(0.1)`: a TimeoutError of the work, as of a slow server, would read as "not ready yet".
    while not ended.is_set() and not wait((made,), 0.1).done:
        pass
    if wait((made,), 0.5).done:
        return made.result()
    for left in (root / "corpus").glob(f".building-*-{os.getpid()}-*"):
        shutil.rmtree(left, ignore_errors=True)
    raise cancelled()


def _prepared(profile: Profile, root: Path, text: Sequence[Path], say: Report, ended: threading.Event) -> Corpus:
    go_on(ended)
    folder = root / "corpus" / _key(profile, text)
    if not (folder / "corpus.json").is_file():
        with writing(folder.parent), _locked(folder.parent / f"{folder.name}.lock", say, ended):
            if not (folder / "corpus.json").is_file():
                for left in folder.parent.glob(f".building-{folder.name}-*"):
                    shutil.rmtree(left, ignore_errors=True)  # of a process that was killed: the lock is ours
                _make(profile, root, folder, text, say, ended)
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
        "data": profile.data.model_dump(exclude={"order"}),
        "vocab": profile.model.vocab,
        "tasks": profile.tasks.model_dump(exclude={"share"}),
        "items": [profile.eval.items, profile.eval.benchmarks],
        "code": code_hash(_CODE),
        "tokenizers": extract.package_version("tokenizers"),
    }
    if text:
        facts["text"] = [file_hash(path) for path in text]
    elif profile.data.source == "shards":
        facts["shards"] = read_manifest(Path(profile.data.shards).expanduser())
        facts["symbols"] = needs_symbols(profile)  # whether the shards were looked at for them
    elif profile.data.source == "docstrings":
        facts["packages"] = package_versions(profile.data)
    return sha256_text(json.dumps(facts, sort_keys=True))[:20]


@contextmanager
def _locked(path: Path, say: Report, cancel: threading.Event | None = None) -> Iterator[None]:
    """Holds an exclusive lock on `path`; the kernel releases it when the holder dies.

    The empty file stays: whoever removed it could take it from under one that waits for it, which then holds the lock
    of a file that is gone while a third makes the file anew and holds that.
    """
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
                    go_on(cancel)
                time.sleep(0.1)
        yield


def _make(
    profile: Profile, root: Path, folder: Path, text: Sequence[Path], say: Report, cancel: threading.Event
) -> None:
    """Makes `folder`, whole. What is read of a dataset of the hub, which may take hours, stays beside where it breaks
    off, and the next start goes on from it."""
    resumable = profile.data.source == "fineweb" and not text
    if resumable:
        temporary = folder.parent / f".partial-{folder.name}"
        temporary.mkdir(exist_ok=True)
        for left in temporary.glob(".*"):
            left.unlink()  # of a write that a kill broke off
    else:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".building-{folder.name}-{os.getpid()}-"))
    done = False
    try:
        temporary.chmod(0o755)
        facts = build(profile, root, temporary, text, say, cancel)
        go_on(cancel)
        write_json(temporary / "corpus.json", facts)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        done = True
    except UsageError:
        resumable = False  # it will be refused again
        raise
    finally:
        if not done and not (resumable and (temporary / PROGRESS).is_file()):
            shutil.rmtree(temporary, ignore_errors=True)
    for name in UNFINISHED:
        (folder / name).unlink(missing_ok=True)
