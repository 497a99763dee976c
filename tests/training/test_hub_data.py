"""Data of the hub, from local folders: what is refused and how, and a preparation that was broken off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from common.errors import JobError, UsageError
from common.process import REPOSITORY
from training import prepare
from training.data import tokenizer
from training.data.corpus import Corpus, load_items, prepare_corpus
from training.data.tokenizer import END, Codec
from training.profiles import Profile, load_profile

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The libraries read these variables when they are imported, which another test may have done before."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def document(number: int) -> str:
    """Forty words that no other document has in this order."""
    values = ((number * 7919 + place * (number + 3)) % 9973 for place in range(40))
    return " ".join("".join(chr(97 + int(digit)) for digit in f"{value:04d}") for value in values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 1,000 documents in two files; fifty are in both."""
    made = tmp_path_factory.mktemp("dataset")
    write(made / "train-0.jsonl", range(450))
    write(made / "train-1.jsonl", range(400, 1000))
    return made


def write(path: Path, numbers: Sequence[int], column: str = "text") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({column: document(number)}) + "\n" for number in numbers))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One document in ten is held out, and what is read is kept every hundred: the datasets here are small."""
    shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.fineweb._ONE_IN", 10)
    monkeypatch.setattr("training.data.fineweb._BATCH", 100)
    monkeypatch.setattr("training.data.tokenizer.TRAINING_CHARACTERS", 20_000)


def of(folder: Path, **data: object) -> Profile:
    profile = load_profile(TINY)
    update = {"source": "fineweb", "dataset": f"{folder}:default", "train_chars": 10_000_000, **data}
    items = profile.eval.model_copy(update={"benchmarks": ["cloze"]})
    return profile.model_copy(update={"data": profile.data.model_copy(update=update), "eval": items})


def hub_tokenizer(tmp_path: Path, name: str, entries: int, end: str = "<|endoftext|>") -> None:
    """Puts a tokenizer of so many entries into the local cache, as the hub's library does."""
    repository = tmp_path / "hub" / f"models--{name}"
    revision = "0" * 40
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    words = {end: 0, **{f"w{number}": number for number in range(1, entries)}}
    model = {"type": "WordLevel", "vocab": words, "unk_token": end}
    split = {"type": "WhitespaceSplit"}
    content = {"version": "1.0", "model": model, "pre_tokenizer": split, "added_tokens": []}
    (repository / "snapshots" / revision / "tokenizer.json").write_text(json.dumps(content))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_both_sizes(folder: Path, tmp_path: Path) -> None:
    hub_tokenizer(tmp_path, "wide", 1475)
    said: list[str] = []
    with pytest.raises(UsageError, match=r"1475 entries, more than model\.vocab = 512"):
        prepare_corpus(of(folder, tokenizer="wide"), tmp_path, report=said.append)
    assert not [line for line in said if "training tokens" in line], "before the dataset was read"


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Made in one go."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        return prepare_corpus(of(folder), tmp_path_factory.mktemp("cache"))


def contents(corpus: Corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.folder.iterdir()}


def test_a_dataset_gives_tokens_and_items(folder: Path, whole: Corpus) -> None:
    items, profile = load_items(whole.items), of(folder)
    assert list(items) == list(profile.eval.benchmarks) and len(items["cloze"]) >= 8
    assert whole.sources == {"dataset": f"{folder}:default"}
    codec = Codec(whole.tokenizer)
    tokens = {path: np.fromfile(path, dtype=np.uint16) for path in (*whole.train, whole.heldout)}
    texts = {path: codec.decode(found.tolist()).split(END)[:-1] for path, found in tokens.items()}
    assert sorted(text for found in texts.values() for text in found) == sorted(map(document, range(1000)))
    assert 60 < len(texts[whole.heldout]) < 140
    assert set(contents(whole)) == {"corpus.json", "tokenizer.json", "train.bin", "heldout.bin", "items.json"}


def test_too_little_held_out_text_is_refused(folder: Path, tmp_path: Path) -> None:
    """One document in a thousand of 3,000 is less than sixteen windows, and may be none at all."""
    with pytest.raises(UsageError, match=r"at least 1,040 held-out tokens, .*got \d+ \(one document in 1000"):
        prepare_corpus(of(folder), tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"is empty: split train holds no document"),
        ([{"content": "words", "id": 1}], r"has no column 'text': its columns are content, id"),
        ([{"text": None}, {"text": 7}], r"document 2 .* is no text: its column 'text' holds int"),
    ],
)
def test_a_dataset_that_is_no_text_is_refused_with_what_it_holds(
    tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=message):
        prepare_corpus(of(tmp_path / "data"), tmp_path)
    assert not list((tmp_path / "corpus").glob(".*")), "nothing is kept of what will be refused again"


def test_a_dataset_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"not reachable: .*\n  fix: correct data\.dataset"):
        prepare_corpus(of(tmp_path / "none"), tmp_path)
    assert not list((tmp_path / "corpus").glob(".*"))


def test_a_change_of_any_code_that_makes_a_corpus_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: set[str] = set()

    def record(names: Sequence[str]) -> str:
        named.update(names)
        return "code"

    monkeypatch.setattr("training.data.corpus.code_hash", record)
    with pytest.raises(JobError):
        prepare_corpus(of(tmp_path / "none"), tmp_path)
    # Those left out make streams and shards, or only keep files.
    apart = {"__init__.py", "corpus.py", "packing.py", "near.py", "sharding.py", "partial.py"}
    assert named == {path.name for path in (REPOSITORY / "training" / "data").glob("*.py")} - apart


def test_an_error_without_words_is_told_by_its_type(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("datasets.load_dataset_builder", silent)
    with pytest.raises(JobError, match="not reachable: TimeoutError"):
        prepare_corpus(of(folder), tmp_path)
    monkeypatch.setattr("tokenizers.Tokenizer", type("Tokenizer", (), {"from_pretrained": silent}))
    with pytest.raises(JobError, match="nor reachable: TimeoutError"):
        tokenizer.fetch("gpt2")


@pytest.mark.parametrize(
    ("entries", "end", "message"),
    [
        (70_000, "<|endoftext|>", "has 70,000 ids, and token files hold at most 65,536"),
        (400, "</s>", "has no token that ends a document: expected one of"),
    ],
)
def test_a_tokenizer_that_token_files_cannot_hold_is_refused(
    tmp_path: Path, entries: int, end: str, message: str
) -> None:
    hub_tokenizer(tmp_path, "odd", entries, end)
    with pytest.raises(UsageError, match=message):
        tokenizer.fetch("odd")


class Lost:
    """Rows of a stream until the connection is lost.

    Attributes:
        read: rows that came.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int | None) -> None:
        import datasets

        original, self.read = datasets.IterableDataset.__iter__, 0

        def rows(dataset: datasets.IterableDataset) -> Iterator[dict[str, object]]:
            for number, row in enumerate(original(dataset)):
                if number == after:
                    raise ConnectionResetError(104, "connection reset by peer")
                self.read += 1
                yield row

        monkeypatch.setattr(datasets.IterableDataset, "__iter__", rows)


def broken_off(folder: Path, cache: Path, after: int) -> Path:
    """Begins a preparation whose connection is lost after so many documents; returns what it keeps."""
    with pytest.MonkeyPatch.context() as patch:
        Lost(patch, after)
        with pytest.raises(JobError, match=r"broke off after [0-9,]+ documents: .*reset by peer") as raised:
            prepare_corpus(of(folder), cache)
    assert "goes on from what is kept" in raised.value.fix and "disk" not in str(raised.value)
    (kept,) = (cache / "corpus").glob(".partial-*")
    return kept


@pytest.mark.usefixtures("small")
def test_a_preparation_that_broke_off_goes_on_to_the_same_bytes(
    folder: Path, whole: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, in both files of the dataset; a kill may leave half a write behind what was kept."""
    for after in (420, 270):
        kept = broken_off(folder, tmp_path, after)
        for path in kept.iterdir():
            if path.name != "progress.json":
                path.write_bytes(path.read_bytes() + b"torn")
    said: list[str] = []
    second = Lost(monkeypatch, None)
    made = prepare_corpus(of(folder), tmp_path, report=said.append)
    assert any("going on behind 650 documents" in line for line in said), said
    assert second.read == 401, "the last document kept is read again, and what follows"
    assert contents(made) == contents(whole)
    assert not list((tmp_path / "corpus").glob(".*"))


@pytest.mark.usefixtures("small")
def test_a_cancelled_preparation_goes_on_behind_the_documents_it_kept(folder: Path, tmp_path: Path) -> None:
    """And one that has enough of the dataset ends in mid-stream, with the same bytes as in one go."""
    profile, cancel, said = of(folder, train_chars=100_000), threading.Event(), list[str]()

    def tell(line: str) -> None:
        said.append(line)
        if len(said) == 4:
            cancel.set()

    with pytest.raises(JobError, match="was cancelled"):
        prepare_corpus(profile, tmp_path, report=tell, cancel=cancel)
    assert said[-1].endswith("M training tokens")
    again: list[str] = []
    made = prepare_corpus(profile, tmp_path, report=again.append)
    assert any("going on behind 400 documents" in line for line in again), again
    assert contents(made) == contents(prepare_corpus(profile, tmp_path / "other"))
    text = Codec(made.tokenizer).decode(np.fromfile(made.train[0], dtype=np.uint16).tolist()).replace(END, "")
    assert 100_000 <= len(text) < 100_000 + len(document(0))


def test_shards_of_a_tokenizer_larger_than_the_vocabulary_are_not_begun(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_tokenizer(tmp_path, "wide", 1475)
    profile = tmp_path / "mine.toml"
    data = f'[data]\nsource = "fineweb"\ndataset = "{folder}:default"\ntokenizer = "wide"'
    text = TINY.read_text().replace("[data]", data).replace("share = 0.3", "share = 0.0")
    profile.write_text(text.replace('"recall", "copying", "induction", "cloze"', '"cloze"'))
    assert prepare.main(["--profile", str(profile), "--out", str(tmp_path / "shards")]) == 2
    assert "1475 entries, more than model.vocab = 512" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["train.bin", "tokenizer.json", "progress.json"])
def test_what_is_damaged_is_told_and_read_again(folder: Path, whole: Corpus, tmp_path: Path, name: str) -> None:
    kept = broken_off(folder, tmp_path, 150)
    content = (kept / name).read_bytes()
    (kept / name).write_bytes(content[:-9] if name == "progress.json" else content[:20] + b"?" + content[21:])
    said: list[str] = []
    assert contents(prepare_corpus(of(folder), tmp_path, report=said.append)) == contents(whole)
    assert any("is damaged; beginning anew" in line for line in said), said


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("touched", [True, False])
def test_a_dataset_that_has_changed_is_told_and_read_from_its_beginning(tmp_path: Path, touched: bool) -> None:
    """By its files' times; where these do not tell, by the document that was read last."""
    data = tmp_path / "data"
    write(data / "train.jsonl", range(1000))
    times = (data / "train.jsonl").stat()
    broken_off(data, tmp_path, 150)
    write(data / "train.jsonl", range(3, 1003))
    os.utime(data / "train.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns + touched * 10**9))
    said: list[str] = []
    made = prepare_corpus(of(data), tmp_path, report=said.append)
    assert any("beginning anew" in line for line in said), said
    assert contents(made) == contents(prepare_corpus(of(data), tmp_path / "other"))


_KILLED = """
import sys
import threading
from pathlib import Path
import pytest
from tests.training.test_hub_data import of, prepare_corpus, shrink
import datasets
shrink(pytest.MonkeyPatch())
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2]) / "datasets"
prepare_corpus(of(Path(sys.argv[1])), Path(sys.argv[2]), report=lambda line: print(line, flush=True))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_killed_preparation_goes_on_to_the_same_bytes(folder: Path, whole: Corpus, tmp_path: Path) -> None:
    for lines in (4, 5, 4):
        command = [sys.executable, "-c", _KILLED, str(folder), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
            assert process.stdout is not None
            for _ in range(lines):
                assert process.stdout.readline(), "it ended before it was killed"
            process.send_signal(signal.SIGKILL)
    said: list[str] = []
    assert contents(prepare_corpus(of(folder), tmp_path, report=said.append)) == contents(whole)
    assert any("going on behind" in line for line in said), said
