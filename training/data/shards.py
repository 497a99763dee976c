"""Pre-tokenised shards: a folder of memory-mapped token files with a manifest, made by `python training/prepare.py`.

manifest.json     {version, tokenizer, tokenizer_sha256, end, vocab, sources, train: [{file, tokens, sha256}],
                  heldout: {...}}; tokenizer: its name as in data.tokenizer (older ones have none)
tokenizer.json    what the tokens mean
train-00000.bin   uint16, documents one after the other, each closed by the end token
heldout.bin       the same, of documents that no training shard holds, nor a near-duplicate of them
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import StoreError, UsageError, message_of
from common.files import read_json, sha256_text, write_json
from training.data.fits import require_shards
from training.data.tokenizer import Codec
from training.profiles import Profile

__all__ = ["MANIFEST", "VERSION", "TokenFiles", "build", "file_sha256", "read_manifest"]

MANIFEST = "manifest.json"
VERSION = 1
_BLOCK = 1 << 24


class TokenFiles:
    """Token files, mapped, as one sequence: only what is read is in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._parts = [np.memmap(path, dtype=np.uint16, mode="r") for path in files]
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """uint16 [len(starts), length]: the tokens from each start on; a window may reach into the next file."""
        rows = np.empty((len(starts), length), dtype=np.uint16)
        for row, start in zip(rows, starts.tolist(), strict=True):
            number, at = int(np.searchsorted(self._ends, start, side="right")), 0
            while at < length:
                part = self._parts[number]
                first = start + at - (int(self._ends[number]) - len(part))
                taken = part[first : first + length - at]
                row[at : at + len(taken)] = taken
                at += len(taken)
                number += 1
        return rows


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of finished shards.

    Raises:
        UsageError: there is none, or it is of another form.
    """
    fix = f"make them: python training/prepare.py --profile NAME --text FILE... --out {folder}"
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} holds no finished shards", fix)
    try:
        found = read_json(folder / MANIFEST)
        if found["version"] != VERSION or not found["train"]:
            raise ValueError(f"version {found['version']}, {len(found['train'])} shards")
        for entry in (*found["train"], found["heldout"]):
            path = folder / str(entry["file"])
            if path.name != entry["file"] or path.stat().st_size != 2 * entry["tokens"]:
                raise ValueError(f"{path.name} is incomplete")
    except (StoreError, KeyError, TypeError, ValueError, OSError) as error:
        raise UsageError(
            f"the shards in {folder} are damaged: {message_of(error)}", f"remove {folder}, and {fix}"
        ) from error
    return dict(found)


def build(source: Path, profile: Profile, folder: Path, say: Callable[[str], None]) -> tuple[dict[str, object], Codec]:
    """Makes a corpus of shards in `folder`: links to their files, proven by hash.

    Returns:
        The corpus facts, and the tokenizer.

    Raises:
        UsageError: the shards are damaged, or their tokenizer does not fit the profile.
    """
    manifest = read_manifest(source)
    try:
        text = (source / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {source}/tokenizer.json: {error}", f"prepare {source} again") from error
    if sha256_text(text) != manifest["tokenizer_sha256"]:
        raise UsageError(f"{source}/tokenizer.json is not the one of these shards", f"prepare {source} again")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    codec = Codec(folder / "tokenizer.json")
    require_shards(profile, manifest, codec, str(source))
    say(f"checking the hashes of {len(manifest['train']) + 1} shards in {source}")
    for entry in (*manifest["train"], manifest["heldout"]):
        path = source / entry["file"]
        if file_sha256(path) != entry["sha256"]:
            raise UsageError(f"{path} is damaged: its SHA-256 is another", f"remove {source} and prepare it again")
        (folder / path.name).symlink_to(path.resolve())
    write_json(folder / "shards.json", [entry["file"] for entry in manifest["train"]])
    facts = {
        "sha256": sha256_text("".join(entry["sha256"] for entry in (*manifest["train"], manifest["heldout"]))),
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "vocab": manifest["vocab"],
        "end": manifest["end"],
        "train_tokens": sum(entry["tokens"] for entry in manifest["train"]),
        "heldout_tokens": manifest["heldout"]["tokens"],
        "sources": {"shards": str(source)},
    }
    return facts, codec
