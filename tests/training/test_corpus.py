"""Corpus: what is extracted, what is removed, what is held out, and the cache under several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import JobError, StoreError, UsageError
from common.process import REPOSITORY
from training import prepare
from training.data import extract, tokenizer
from training.data.corpus import Corpus, load_items, prepare_corpus
from training.data.dedup import LINE, Deduplicator, shingles
from training.data.tokenizer import Codec
from training.profiles import Profile, load_profile
from training.scorer.scoring import heldout_windows

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"
WORDS = ("gate", "state", "decay", "key", "value", "mixer", "chunk", "norm", "layer", "head", "token", "loss", "width")


def prose(seed: int, words: int) -> str:
    random = np.random.default_rng(seed)
    parts: list[str] = []
    for number in range(words):
        parts.append(WORDS[int(random.integers(len(WORDS)))] + ("s" if random.random() < 0.3 else ""))
        parts.append("\n" if number % 12 == 11 else " ")
    return "".join(parts)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n\n".join(prose(seed, 120) for seed in range(120)))
    return path


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile(TINY)


@pytest.fixture(scope="module")
def corpus(profile: Profile, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare_corpus(profile, tmp_path_factory.mktemp("cache"), [text_file])


def test_docstrings_are_read_without_importing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "asi_sample_package"
    (package / "tests").mkdir(parents=True)
    long, short = "It does this and that. " * 12, "Short."
    (package / "__init__.py").write_text(f'"""{long}"""\nraise RuntimeError("imported")\n')
    (package / "a.py").write_text(
        f'class A:\n    """{short}"""\n    if True:\n        def f(self):\n            """Method. {long}"""\n'
    )
    (package / "broken.py").write_text('"""' + long + '"""\ndef (:\n')
    (package / "tests" / "test_a.py").write_text(f'"""Test. {long}"""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    found = extract.docstrings("asi_sample_package")
    assert [text.split()[0] for text in found] == ["It", "Method."]


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(JobError, match="no_such_package_here"):
        extract.docstrings("no_such_package_here")


@pytest.mark.parametrize(
    ("name", "fix"), [("numpyy", "did you mean numpy"), ("xqzxqz", "Correct data.train"), ("numpy.linalg", "Correct")]
)
def test_a_training_package_that_is_not_there_is_wrong_usage(
    profile: Profile, tmp_path: Path, name: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = profile.data.model_copy(update={"train": [name]})
    with pytest.raises(UsageError, match=rf"data\.train names '{name}'.*\n  fix: .*{fix}"):
        prepare_corpus(profile.model_copy(update={"data": data}), tmp_path)
    mine = tmp_path / "mine.toml"
    mine.write_text(TINY.read_text().replace('train = ["numpy"]', f'train = ["{name}"]'))
    assert prepare.main(["--profile", str(mine), "--out", str(tmp_path / "shards")]) == 2
    assert "data.train" in capsys.readouterr().err


def test_sampling_keeps_the_same_share_of_every_package() -> None:
    packages = {name: [f"{name} {number} " + prose(number, 40) for number in range(400)] for name in ("a", "b")}
    total = sum(len(text) for texts in packages.values() for text in texts)
    kept = extract.sample_documents(packages, total // 4)
    shares = [sum(text.startswith(name) for text in kept) / 400 for name in ("a", "b")]
    assert all(0.15 < share < 0.35 for share in shares)
    assert kept == extract.sample_documents(
        {name: list(reversed(texts)) for name, texts in packages.items()}, total // 4
    )


line = st.lists(st.sampled_from(WORDS), min_size=1, max_size=16).map(" ".join)
document = st.lists(line, min_size=1, max_size=14).map("\n".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(document, max_size=8), st.lists(document, max_size=6))
def test_no_long_line_and_no_twelve_words_occur_in_two_documents(first: list[str], second: list[str]) -> None:
    seen = Deduplicator()
    kept = seen.filter(first) + seen.filter(second)
    for number, one in enumerate(kept):
        for other in kept[number + 1 :]:
            assert not shingles(one) & shingles(other)
            long = {line.strip() for line in one.splitlines() if len(line.strip()) >= LINE}
            assert not long & {line.strip() for line in other.splitlines()}


def test_text_that_does_not_repeat_is_kept_as_it_is() -> None:
    documents = [prose(1, 200).strip(), prose(2, 200).strip()]
    assert Deduplicator().filter(documents) == documents


def test_heldout_text_is_not_in_the_training_text(corpus: Corpus) -> None:
    codec = tokenizer.Codec(corpus.tokenizer)
    train, heldout = (codec.decode(np.fromfile(file, np.uint16).tolist()) for file in (corpus.train[0], corpus.heldout))
    seen = {gram for part in train.split(tokenizer.END) for gram in shingles(part)}
    assert corpus.heldout_tokens > 1000
    assert not any(gram in seen for part in heldout.split(tokenizer.END) for gram in shingles(part))


def test_the_same_files_give_the_same_corpus(corpus: Corpus, profile: Profile, text_file: Path, tmp_path: Path) -> None:
    again = prepare_corpus(profile, tmp_path, [text_file])
    assert (again.sha256, again.tokenizer_sha256) == (corpus.sha256, corpus.tokenizer_sha256)
    for name in ("train.bin", "heldout.bin", "items.json"):
        assert (again.folder / name).read_bytes() == (corpus.folder / name).read_bytes()
    assert again.stream(profile, 3).read_bytes() == corpus.stream(profile, 3).read_bytes()
    assert again.stream(profile, 4).read_bytes() != corpus.stream(profile, 3).read_bytes()


def test_a_time_out_of_the_work_itself_ends_it(
    profile: Profile, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no word of "not ready yet", for which one waits."""

    def slow(name: str) -> str:
        raise TimeoutError("the file server does not answer")

    monkeypatch.setattr("training.data.extract.package_version", slow)
    cancel = threading.Event()
    late = threading.Timer(5, cancel.set)
    late.start()
    try:
        with pytest.raises(TimeoutError, match="file server"):
            prepare_corpus(profile, tmp_path, [text_file], cancel=cancel)
    finally:
        late.cancel()


def test_two_processes_at_once_make_one_corpus(profile: Profile, text_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from training.data.corpus import prepare_corpus;"
        "from training.profiles import load_profile;"
        f"p = load_profile({str(TINY)!r}); c = prepare_corpus(p, Path({str(tmp_path)!r}), [Path({str(text_file)!r})]);"
        "print(c.sha256, c.stream(p, 0).stat().st_size)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(2)]
    said = [run.communicate(timeout=60)[0] for run in runs]
    assert said[0] == said[1] and said[0]
    left = [path.name for path in (tmp_path / "corpus").iterdir() if path.name.startswith(".")]
    assert left == []


def test_what_a_killed_process_left_is_swept(profile: Profile, text_file: Path, tmp_path: Path) -> None:
    made = prepare_corpus(profile, tmp_path, [text_file])
    left = [made.folder.parent / f".building-{made.folder.name}-x", made.folder / "streams" / ".stream-x"]
    other = made.folder.parent / ".building-other-x"  # may be at work
    for path in (left[0], other):
        path.mkdir()
        (path / "train.bin").write_text("x")
    (made.folder / "corpus.json").unlink()
    made = prepare_corpus(profile, tmp_path, [text_file])
    left[1].parent.mkdir(exist_ok=True)
    left[1].write_text("x")
    made.stream(profile, 0)
    assert not any(path.exists() for path in left) and other.exists()


def test_special_tokens_in_text_are_ordinary_characters(corpus: Corpus) -> None:
    codec = tokenizer.Codec(corpus.tokenizer)
    assert codec.encode_items("<|s3|>") == [tokenizer.special_tokens(16).index("<|s3|>")]
    ids = codec.encode_text(["see <|s3|> and <|end|>"])
    assert ids[-1] == corpus.end and corpus.end not in ids[:-1] and len(ids) > 5


def test_items_have_one_right_answer_among_different_choices(corpus: Corpus, profile: Profile) -> None:
    items = load_items(corpus.items)
    assert list(items) == ["recall", "copying", "induction"] + (["cloze"] if "cloze" in items else [])
    for each in items.values():
        for item in each:
            assert len(set(item["choices"])) == profile.tasks.choices
            assert 0 <= item["answer"] < profile.tasks.choices


def test_text_that_is_too_short_is_refused(profile: Profile, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words only.")
    with pytest.raises(UsageError, match=r"expected at least 260 training tokens, got \d+"):
        prepare_corpus(profile, tmp_path / "cache", [short])
    short.write_text("\n\n".join(prose(seed, 120) for seed in range(50)))
    with pytest.raises(UsageError, match=r"at least 1,040 held-out tokens, so that the 16 .* overlap, got \d{3} "):
        prepare_corpus(profile, tmp_path / "cache", [short])
    with pytest.raises(UsageError, match="missing"):
        prepare_corpus(profile, tmp_path / "cache", [tmp_path / "missing.txt"])
    os.mkfifo(tmp_path / "pipe.txt")
    for path, kind in ((tmp_path / "pipe.txt", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(UsageError, match=f"expected a regular file, got {kind}"):
            prepare_corpus(profile, tmp_path / "cache", [path])


def test_scored_windows_of_the_shortest_text_do_not_overlap() -> None:
    windows = heldout_windows(np.arange(16 * 65), 16, 64)
    assert windows.shape == (16, 65) and len(set(windows.ravel().tolist())) == 16 * 65


def test_a_cache_that_cannot_be_written_is_one_clear_error(profile: Profile, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cache"):
        prepare_corpus(profile, tmp_path / "file", [text_file])


def test_a_damaged_cache_is_noticed(profile: Profile, text_file: Path, tmp_path: Path) -> None:
    made = prepare_corpus(profile, tmp_path, [text_file])
    made.train[0].write_bytes(made.train[0].read_bytes()[:-2])
    with pytest.raises(StoreError, match="damaged"):
        prepare_corpus(profile, tmp_path, [text_file])


def test_the_default_corpus_comes_from_installed_packages(profile: Profile, tmp_path: Path) -> None:
    said: list[str] = []
    corpus = prepare_corpus(profile, tmp_path, report=said.append)
    assert set(corpus.sources) == {"numpy", "sklearn"} and corpus.train_tokens > 50_000
    assert any("docstrings of sklearn" in line for line in said)
    said.clear()
    assert prepare_corpus(profile, tmp_path, report=said.append) == corpus and said == []


def test_a_cancelled_preparation_ends_at_once_even_while_text_is_encoded(
    profile: Profile, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding is foreign code that hears no signal: it is left behind, with nothing half-made in the cache."""
    cancel, encoded = threading.Event(), threading.Event()

    def slow(self: Codec, documents: Sequence[str]) -> np.ndarray:
        cancel.set()
        encoded.wait(60)
        raise AssertionError("nobody waits for this")

    monkeypatch.setattr(Codec, "encode_text", slow)
    begun = time.monotonic()
    try:
        with pytest.raises(JobError, match="was cancelled"):
            prepare_corpus(profile, tmp_path, [text_file], cancel=cancel)
        assert time.monotonic() - begun < 50, "it was not waited for"
    finally:
        encoded.set()
    assert not list((tmp_path / "corpus").glob(".building-*"))


def test_a_cancelled_stream_leaves_no_file(corpus: Corpus, profile: Profile) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(JobError, match="was cancelled"):
        corpus.stream(profile, 4711, cancel)
    assert not list((corpus.folder / "streams").glob("*4711*")) and not list((corpus.folder / "streams").glob(".*"))


def test_a_stream_larger_than_the_disk_is_refused_before_it_is_begun(corpus: Corpus, profile: Profile) -> None:
    huge = profile.model_copy(update={"train": profile.train.model_copy(update={"batch": 10**12})})
    with pytest.raises(StoreError, match=r"GiB .* are free"):
        corpus.stream(huge, 4711)
    assert not list((corpus.folder / "streams").glob(".*"))
