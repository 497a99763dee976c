"""The user's text: whole files are held out, or the end of each, so that no held-out block lies among training ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import UsageError
from common.process import REPOSITORY
from training import prepare
from training.data.corpus import prepare_corpus
from training.data.text_files import documents
from training.data.tokenizer import END, Codec
from training.profiles import load_profile

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"


def write(path: Path, name: str, blocks: int) -> Path:
    """A file of so many blocks, each of its own words."""
    random = np.random.default_rng(len(name) + blocks + sum(map(ord, name)))
    syllables = np.array(["ga", "te", "sta", "de", "cay", "key", "va", "lue", "mi", "xer", "no", "rm"])
    words = ["".join(random.choice(syllables, 3)) for _ in range(blocks * 80)]
    parts = [" ".join([f"{name}{at}", *words[80 * at : 80 * at + 80]]) for at in range(blocks)]
    path.mkdir(exist_ok=True)
    (path / name).write_text("\n\n".join(parts) + "\n")
    return path / name


def sides(files: list[Path], one_in: int = 10) -> dict[str, str]:
    """By file the sides of its blocks, t or h, in order."""
    found = {path.name: "" for path in files}
    for text, side in documents(files, one_in):
        (name,) = [name for name in found if text.startswith(name)]
        found[name] += side[0]
    return found


def test_whole_files_are_held_out_where_there_are_enough(tmp_path: Path) -> None:
    files = [write(tmp_path, f"file-{letter}-", 12) for letter in "abcdefghijklmnopqrstu"]
    found = sides(files)
    assert all(set(marks) in ({"t"}, {"h"}) for marks in found.values()), "a file lies on one side"
    held = {name for name, marks in found.items() if "h" in marks}
    assert len(held) == 2
    assert found == sides(files[::-1]), "which ones does not hang on their order"
    assert held < {name for name, marks in sides(files, one_in=4).items() if "h" in marks}
    copies = tmp_path / "copy"
    copies.mkdir()
    for name in held:  # the same content is one file, whatever its name
        (copies / name).write_bytes((tmp_path / name).read_bytes())
    assert {side for text, side in documents([*files, *copies.iterdir()], 10) if text.startswith(tuple(held))} == {
        "heldout"
    }


@pytest.mark.parametrize("sizes", [(40,), (2,), (20, 30), (300, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)])
def test_few_files_are_cut_at_one_place(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """So is a text most of which is one file, whatever its number of files."""
    files = [write(tmp_path, f"file-{number}-", size) for number, size in enumerate(sizes)]
    for path, size in zip(files, sizes, strict=True):
        marks = sides(files)[path.name]
        assert "ht" not in marks, "a held-out block lies before a training one"
        if size > 1:
            assert 1 <= marks.count("h") <= len(marks) // 10 + 2 and "t" in marks


def texts(path: Path, codec: Codec) -> list[str]:
    return [text for text in codec.decode(np.fromfile(path, np.uint16).tolist()).split(END) if text]


def test_a_corpus_and_shards_hold_out_the_same_passage(tmp_path: Path) -> None:
    book = write(tmp_path, "book", 300)
    end = [text for text, side in documents([book], 10) if side == "heldout"]
    corpus = prepare_corpus(load_profile(TINY), tmp_path / "cache", [book])
    assert texts(corpus.heldout, Codec(corpus.tokenizer)) == end
    command = ["--profile", str(TINY), "--text", str(book), "--heldout-one-in", "10", "--out", str(tmp_path / "shards")]
    assert prepare.main(command) == 0
    assert texts(tmp_path / "shards" / "heldout.bin", Codec(tmp_path / "shards" / "tokenizer.json")) == end


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00\x80" * 100)
    with pytest.raises(UsageError, match=r"cannot read the text file .*image"):
        list(documents([tmp_path / "image"], 10))
    with pytest.raises(UsageError, match=r"cannot read the text file .*none.*\n  fix: name readable UTF-8 files"):
        list(documents([tmp_path / "none"], 10))
