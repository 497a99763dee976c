"""Data of the hub, from local folders: what is refused and how, and a preparation that was broken off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.errors import UsageError
from common.process import REPOSITORY
from training.data.corpus import load_items, prepare_corpus
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
    """Sixty words that no other document has in this order."""
    values = ((number * 7919 + place * (number + 3)) % 997 for place in range(60))
    return " ".join("".join(chr(97 + int(digit)) for digit in f"{value:04d}") for value in values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 3,000 documents in two files."""
    made = tmp_path_factory.mktemp("dataset")
    write(made / "train-0.jsonl", range(1400))
    write(made / "train-1.jsonl", range(1400, 3000))
    return made


def write(path: Path, numbers: Sequence[int], column: str = "text") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({column: document(number)}) + "\n" for number in numbers))


@pytest.fixture
def few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in twenty, since the datasets here are small."""
    monkeypatch.setattr("training.data.fineweb._ONE_IN", 20)


def of(folder: Path, **data: object) -> Profile:
    profile = load_profile(TINY)
    update = {"source": "fineweb", "dataset": f"{folder}:default", "train_chars": 10_000_000, **data}
    return profile.model_copy(update={"data": profile.data.model_copy(update=update)})


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
    with pytest.raises(UsageError, match="1475 entries, more than model.vocab = 512"):
        prepare_corpus(of(folder, tokenizer="wide"), tmp_path, report=said.append)
    assert not [line for line in said if "training tokens" in line], "before the dataset was read"


@pytest.mark.usefixtures("few_held_out")
def test_a_dataset_gives_tokens_and_items(folder: Path, tmp_path: Path) -> None:
    profile = of(folder)
    made = prepare_corpus(profile, tmp_path)
    items = load_items(made.items)
    assert list(items) == list(profile.eval.benchmarks) and len(items["cloze"]) >= 8
    assert made.sources == {"dataset": f"{folder}:default"}


def test_too_little_held_out_text_is_refused(folder: Path, tmp_path: Path) -> None:
    """One document in a thousand of 3,000 is less than sixteen windows, and may be none at all."""
    with pytest.raises(UsageError, match=r"at least 1,040 held-out tokens, .*got \d+ \(one document in 1000"):
        prepare_corpus(of(folder), tmp_path)
