"""Shards: the same whoever makes them and however often they were broken off, without near-duplicates, and trained
on like any other text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UsageError
from common.process import REPOSITORY
from training import prepare
from training.data import sharding, tokenizer
from training.data.corpus import load_items, prepare_corpus
from training.data.near import Near, signature
from training.data.packing import write_stream
from training.data.sharding import UNIT, Document, Plan, make_shards
from training.data.shards import MANIFEST, TokenFiles, read_manifest
from training.prepare import main as prepare_command
from training.profiles import Profile, load_profile

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"
WORDS = np.array(["gate", "state", "decay", "key", "value", "mixer", "chunk", "norm", "layer", "head", "token", "loss"])


def text(seed: int, words: int = 60) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


DOCUMENTS: list[Document] = [(text(seed), None) for seed in range(200)]


@pytest.fixture(scope="module")
def codec() -> str:
    spec = load_profile(TINY)
    return str(tokenizer.train([one for one, _ in DOCUMENTS], spec.model.vocab, spec.tasks.symbols).to_str())


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "UNIT", 8)


def plan(**changes: Any) -> Plan:
    return Plan(**{"source": {"text": "x"}, "tokenizer": "bpe", "shard_tokens": 1500, "train_tokens": None,
                   "heldout_tokens": 10**6, "heldout_one_in": 10, **changes})  # fmt: skip


def made(folder: Path, codec: str, documents: list[Document] = DOCUMENTS, **changes: Any) -> dict[str, Any]:
    return make_shards(plan(**changes), documents, codec, folder, lambda read, tokens: None)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_every_document_once_on_one_side(codec: str, tmp_path: Path) -> None:
    manifest = made(tmp_path, codec, [*DOCUMENTS, *DOCUMENTS[:30], (text(999), "heldout")])
    assert len(manifest["train"]) > 3 and read_manifest(tmp_path) == manifest
    reader = tokenizer.Codec(tmp_path / "tokenizer.json")
    sides = []
    for names in ([entry["file"] for entry in manifest["train"]], ["heldout.bin"]):
        tokens = np.concatenate([np.fromfile(tmp_path / name, np.uint16) for name in names])
        parts = np.split(tokens, np.flatnonzero(tokens == reader.end) + 1)
        sides.append([reader.decode(part[:-1].tolist()) for part in parts if len(part)])
    train, heldout = sides
    assert sorted(train + heldout) == sorted([one for one, _ in DOCUMENTS] + [text(999)])
    assert text(999) in heldout and 5 < len(heldout) < 45
    assert set(files(tmp_path)) == {MANIFEST, "progress.json", "tokenizer.json", "heldout.bin", *(
        entry["file"] for entry in manifest["train"]
    )}  # fmt: skip


@pytest.mark.parametrize("after", [9, 24])
def test_a_start_after_a_kill_ends_with_the_same_files(codec: str, tmp_path: Path, after: int) -> None:
    made(tmp_path / "whole", codec)

    class Killed(Exception):  # noqa: N818
        pass

    def kill(read: int, tokens: int) -> None:
        if read >= after * 8:
            raise Killed

    with pytest.raises(Killed):
        make_shards(plan(), DOCUMENTS, codec, tmp_path / "killed", kill)
    assert not (tmp_path / "killed" / MANIFEST).exists()
    with pytest.raises(UsageError, match="no finished shards"):
        read_manifest(tmp_path / "killed")
    made(tmp_path / "killed", codec)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_other_settings_in_a_folder_that_was_begun_are_refused(codec: str, tmp_path: Path) -> None:
    made(tmp_path, codec)
    with pytest.raises(UsageError, match="was begun with other"):
        made(tmp_path, codec, near=0.5)


def test_near_duplicates_are_dropped(codec: str, tmp_path: Path) -> None:
    long = [(text(seed, 300), None) for seed in range(40)]
    changed: list[Document] = []
    for one, _ in long:
        words = one.split()
        words[150] = "other"
        changed.append((" ".join(words), None))
    tokens = [
        sum(entry["tokens"] for entry in (*found["train"], found["heldout"]))
        for found in (
            made(tmp_path / "a", codec, long), made(tmp_path / "b", codec, long + changed),
            made(tmp_path / "c", codec, long + changed, near=None),
        )
    ]  # fmt: skip
    assert tokens[1] <= tokens[0] * 1.05 and tokens[2] > tokens[0] * 1.9


def test_different_documents_are_no_near_duplicates() -> None:
    near = Near(0.8)
    assert all(near.add(signature(text(seed))) for seed in range(50))
    assert not near.add(signature(text(7)))


def test_the_help_says_that_a_shard_ends_with_a_whole_unit(
    codec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        prepare_command(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"N tokens from which a shard ends; it ends with a whole unit of {UNIT} documents" in said and UNIT == 256
    documents: list[Document] = [(text(seed), "train" if seed else "heldout") for seed in range(8 + 8 + 3)]
    found = made(tmp_path, codec, documents, shard_tokens=1, near=None)
    parts = [np.fromfile(tmp_path / entry["file"], np.uint16) for entry in found["train"]]
    end = tokenizer.Codec(tmp_path / "tokenizer.json").end
    assert [int((part == end).sum()) for part in parts] == [7, 8, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_windows_of_several_files_are_those_of_one(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("files")
    whole = np.arange(sum(sizes), dtype=np.uint16)
    for number, part in enumerate(np.split(whole, np.cumsum(sizes)[:-1])):
        part.tofile(folder / str(number))
    length = data.draw(st.integers(1, len(whole)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(whole) - length), min_size=1, max_size=5)))
    tokens = TokenFiles([folder / str(number) for number in range(len(sizes))])
    assert len(tokens) == len(whole)
    assert (tokens.windows(starts, length) == whole[starts[:, None] + np.arange(length)]).all()


@pytest.fixture(scope="module")
def shards(codec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "UNIT", 8)
        made(folder, codec, [(text(seed, 120), None) for seed in range(150)])
    return folder


@pytest.fixture
def sharded(shards: Path, tmp_path: Path) -> Profile:
    """A profile over shards of its own, which may be changed."""
    shutil.copytree(shards, tmp_path / "shards")
    return changed(load_profile(TINY), data={"source": "shards", "shards": str(tmp_path / "shards")})


def test_a_profile_trains_on_shards(sharded: Profile, tmp_path: Path) -> None:
    corpus = prepare_corpus(sharded, tmp_path / "cache")
    manifest = read_manifest(Path(sharded.data.shards))
    assert len(corpus.train) == len(manifest["train"]) > 1
    assert corpus.train_tokens == sum(entry["tokens"] for entry in manifest["train"])
    tokens = np.concatenate([np.fromfile(path, np.uint16) for path in corpus.train])
    write_stream(sharded, tokens, 3, tmp_path / "stream", corpus.end)
    assert corpus.stream(sharded, 3).read_bytes() == (tmp_path / "stream").read_bytes()
    assert len(load_items(corpus.items)["cloze"]) >= 8


def test_a_longer_run_begins_with_the_rows_of_a_shorter_one(sharded: Profile, tmp_path: Path) -> None:
    tokens = np.arange(5000).astype(np.uint16) % 300
    longer = sharded.model_copy(update={"train": sharded.train.model_copy(update={"steps": 3000})})
    write_stream(sharded, tokens, 1, tmp_path / "short")
    write_stream(longer, tokens, 1, tmp_path / "long")
    short, long = (tmp_path / "short").read_bytes(), (tmp_path / "long").read_bytes()
    assert len(long) == 100 * len(short) and long[: len(short)] == short


def test_damaged_shards_and_small_vocabularies_are_refused(sharded: Profile, tmp_path: Path) -> None:
    vocab = read_manifest(Path(sharded.data.shards))["vocab"] - 1
    small = sharded.model_copy(update={"model": sharded.model.model_copy(update={"vocab": vocab})})
    with pytest.raises(UsageError, match=r"model\.vocab"):
        prepare_corpus(small, tmp_path / "cache")
    shard = Path(sharded.data.shards) / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UsageError, match="SHA-256"):
        prepare_corpus(sharded, tmp_path / "cache")
    shard.write_bytes(content[:-2])
    with pytest.raises(UsageError, match="incomplete"):
        prepare_corpus(sharded, tmp_path / "cache")


def changed(profile: Profile, **sections: dict[str, Any]) -> Profile:
    """`profile` with other values, looked at as when it is read."""
    found = profile.model_dump()
    return Profile.model_validate({**found, **{name: {**found[name], **values} for name, values in sections.items()}})


def renamed(profile: Profile, name: str | None) -> None:
    """Sets the tokenizer's name in the manifest of the profile's shards; None takes it out, as in older ones."""
    path = Path(profile.data.shards) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest.pop("tokenizer", None)
    path.write_text(json.dumps({**manifest, **({"tokenizer": name} if name else {})}))


WIDE = {"names": ["recall", "copying", "induction", "parity"], "symbols": 36}
PLAIN: dict[str, dict[str, Any]] = {"tasks": {"share": 0.0}, "eval": {"benchmarks": ["cloze"]}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": {"symbols": 32}}, r"has 16 task symbols, .*needs 32: <\|s16\|> should be its token 22"),
        ({"tasks": {**WIDE, "symbols": 18}}, "needs 18 and the markers"),
        ({"tasks": WIDE}, r"needs 36 and the markers of the wider tasks: .*prepare\.py"),
        ({"tasks": {"share": 0.0, "symbols": 20}}, "needs 20: "),
        ({"tasks": {"symbols": 20}, "eval": {"benchmarks": ["cloze"]}}, "needs 20: "),
    ],
)
def test_shards_with_other_symbols_than_the_tasks_are_refused(
    sharded: Profile, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    """A symbol that they lack would be trained as some byte, and scored as the bytes of its name."""
    lines: list[str] = []
    with pytest.raises(UsageError, match=f"(?s){said}"):
        prepare_corpus(changed(sharded, **change), tmp_path / "cache", report=lines.append)
    assert not lines, "before any shard is read"


def test_shards_without_symbols_serve_a_profile_that_needs_none(sharded: Profile, tmp_path: Path) -> None:
    scored = {"benchmarks": ["cloze"]}
    prepare_corpus(changed(sharded, tasks={"symbols": 32, "share": 0.0}, eval=scored), tmp_path / "cache")
    with pytest.raises(UsageError, match="needs 32: "):  # and no cached corpus lets them through
        prepare_corpus(changed(sharded, tasks={"symbols": 32, "share": 0.3}, eval=scored), tmp_path / "cache")


def test_shards_of_another_tokenizer_are_refused_by_its_name(sharded: Profile, tmp_path: Path) -> None:
    hub = changed(sharded, data={"tokenizer": "gpt2"}, **PLAIN)
    with pytest.raises(UsageError, match=r"tokenised with 'bpe', and data\.tokenizer of profile tiny is 'gpt2'"):
        prepare_corpus(hub, tmp_path / "cache")
    renamed(sharded, None)
    with pytest.raises(UsageError, match=r"tokenised with 'bpe', and .* is 'gpt2'"):
        prepare_corpus(hub, tmp_path / "cache")
    prepare_corpus(sharded, tmp_path / "cache")
    renamed(sharded, "gpt2")
    with pytest.raises(UsageError, match=r"with 'gpt2', and .* is 'bpe'\n  fix: set data\.tokenizer = 'gpt2'"):
        prepare_corpus(changed(sharded, **PLAIN), tmp_path / "cache")


def test_shards_of_the_hubs_tokenizer_are_known_by_what_they_lack(tmp_path: Path) -> None:
    """Where the manifest does not name it."""
    words = {"<|endoftext|>": 0, **{word: 1 + number for number, word in enumerate(WORDS.tolist())}}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<|endoftext|>"}
    split = {"type": "WhitespaceSplit"}
    hub = json.dumps({"version": "1.0", "model": model, "pre_tokenizer": split, "added_tokens": []})
    made(tmp_path / "shards", hub, tokenizer="words")
    bpe = changed(load_profile(TINY), data={"source": "shards", "shards": str(tmp_path / "shards")}, **PLAIN)
    with pytest.raises(UsageError, match=r"with 'words', and .* is 'bpe'"):
        prepare_corpus(bpe, tmp_path / "cache")
    renamed(bpe, None)
    with pytest.raises(UsageError, match=r"with one of the hub, and .* is 'bpe'"):
        prepare_corpus(bpe, tmp_path / "cache")


def test_a_vocabulary_far_above_the_tokenizers_is_refused_with_both_sizes(sharded: Profile, tmp_path: Path) -> None:
    ids = read_manifest(Path(sharded.data.shards))["vocab"]
    prepare_corpus(changed(sharded, model={"vocab": 2 * ids - 1}), tmp_path / "cache")
    with pytest.raises(UsageError, match=rf"has {ids} entries, and model\.vocab = {2 * ids} is not below 2 times"):
        prepare_corpus(changed(sharded, model={"vocab": 2 * ids}), tmp_path / "cache")


def test_the_command_gives_the_wider_tasks_their_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = 'names = ["recall", "copying", "induction", "parity"]\nsymbols = 36'
    (tmp_path / "wide.toml").write_text(TINY.read_text().replace("symbols = 16", tasks))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text(seed, 120)}) + "\n" for seed in range(150)))
    command = ["--profile", str(tmp_path / "wide.toml"), "--text", str(tmp_path / "a.jsonl"), "--heldout-one-in", "10"]
    assert prepare.main([*command, "--out", str(tmp_path / "shards")]) == 0, capsys.readouterr().err
    assert read_manifest(tmp_path / "shards")["tokenizer"] == "bpe"
    shards = {"source": "shards", "shards": str(tmp_path / "shards")}
    prepare_corpus(changed(load_profile(tmp_path / "wide.toml"), data=shards), tmp_path / "cache")


@pytest.mark.parametrize("line", [b'{"text": null}', b'{"text": 7}', b'{"text": "\xff"}', b"[]", b"{}", b"words"])
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "words"}\n' + line + b"\n")
    command = ["--profile", str(TINY), "--text", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]
    assert prepare.main(command) == 2
    assert "a.jsonl, line 2: expected a JSON object" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_gives_the_same_with_two_processes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one, _ in DOCUMENTS * 3))
    (tmp_path / "b.txt").write_text("\n\n".join(text(seed, 150) for seed in range(500, 560)))
    for workers in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "prepare.py", "--profile", str(TINY), "--text", str(tmp_path / "a.jsonl"),
             str(tmp_path / "b.txt"), "--workers", workers, "--shard-tokens", "5000", "--heldout-one-in", "10",
             "--out", str(tmp_path / workers)],
            cwd=REPOSITORY / "training", capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0 and "held-out tokens" in done.stdout, done.stderr
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_wrong_usage_of_the_command_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "prepare.py", "--text", str(tmp_path / "absent"), "--out", str(tmp_path / "o")],
        cwd=REPOSITORY / "training", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: cannot read the text file")
