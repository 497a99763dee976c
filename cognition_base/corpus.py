"""Reads the corpus: one JSON file a paper, each a list of one to three entries."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UsageError

__all__ = ["FIELDS", "SHIPPED", "Entry", "corpus_digest", "load_corpus", "parse_paper"]

SHIPPED = Path(__file__).resolve().parent / "cognition"
FIELDS = (
    "DESIGN_INSIGHT",
    "EXPERIMENTAL_TRIGGER_PATTERNS",
    "BACKGROUND",
    "ALGORITHMIC_INNOVATION",
    "IMPLEMENTATION_GUIDANCE",
    "DESIGN_AI_INSTRUCTIONS",
)
OPTIONAL = "DESIGN_AI_INSTRUCTIONS"
MAX_ENTRIES = 3
MAX_CHARACTERS = 20_000
MAX_FILE = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One idea of one paper. `id` is the paper key and the entry's position in its file, from 1."""

    paper_key: str
    position: int
    design_insight: str
    experimental_trigger_patterns: str
    background: str
    algorithmic_innovation: str
    implementation_guidance: str
    design_ai_instructions: str = ""

    @property
    def id(self) -> str:
        return f"{self.paper_key}_{self.position}"

    def texts(self) -> dict[str, str]:
        """The six fields under their names on the wire."""
        return {name: getattr(self, name.lower()) for name in FIELDS}

    def search_keys(self) -> tuple[str, str]:
        """The two texts it is found by: the insight with its symptoms, and the insight with the start of the idea."""
        return (
            f"{self.design_insight}\n{self.experimental_trigger_patterns}",
            f"{self.design_insight}\n{self.algorithmic_innovation[:250]}",
        )


def load_corpus(folder: Path) -> list[Entry]:
    """Reads and validates every `*.json` of `folder`, in the order of their names.

    Raises:
        UsageError: naming the file, the entry and the field that is wrong.
    """
    try:
        files = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    except OSError as error:
        raise UsageError(f"cannot read the corpus folder {folder}: {error.strerror}") from error
    if not files:
        raise UsageError(f"expected paper files (*.json) in {folder}, found none", "name a folder in cognition.corpus")
    return [entry for path in files for entry in parse_paper(path)]


def parse_paper(path: Path) -> list[Entry]:
    """The entries of one paper file.

    Raises:
        UsageError: naming the file, the entry and the field that is wrong.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", path.stem):
        _refuse(path, "the file's name", "letters, digits and _ (an arXiv id with _ for .)", path.stem)
    try:
        data = path.read_bytes()
        if len(data) > MAX_FILE:
            _refuse(path, "the file", f"at most {MAX_FILE} bytes", f"{len(data)}")
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: expected JSON in UTF-8: {error}", f"correct {path}") from error
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ENTRIES:
        got = f"{len(value)} entries" if isinstance(value, list) else f"a {type(value).__name__}"
        _refuse(path, "the file", f"a list of 1 to {MAX_ENTRIES} entries", got)
    return [_entry(path, position, item) for position, item in enumerate(value, 1)]


def corpus_digest(entries: Sequence[Entry]) -> str:
    """SHA-256 of everything the entries say, in hex."""
    content = [[entry.id, *entry.texts().values()] for entry in entries]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _entry(path: Path, position: int, item: Any) -> Entry:
    where = f"entry {position}"
    if not isinstance(item, dict):
        _refuse(path, where, "an object", f"a {type(item).__name__}")
    for name in item:
        if name not in FIELDS:
            _refuse(path, where, f"only the fields {', '.join(FIELDS)}", repr(name))
    texts: dict[str, str] = {}
    for name in FIELDS:
        text = item.get(name, "" if name == OPTIONAL else None)
        if not isinstance(text, str):
            _refuse(path, f"{where}, {name}", "a text", "nothing" if text is None else f"a {type(text).__name__}")
        if not text.strip() and name != OPTIONAL:
            _refuse(path, f"{where}, {name}", "a text", "an empty one")
        if len(text) > MAX_CHARACTERS:
            _refuse(path, f"{where}, {name}", f"at most {MAX_CHARACTERS} characters", str(len(text)))
        try:
            text.encode()
        except UnicodeEncodeError:
            _refuse(path, f"{where}, {name}", "valid Unicode", "a lone surrogate")
        texts[name.lower()] = text
    return Entry(paper_key=path.stem, position=position, **texts)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return dict(pairs)


def _refuse(path: Path, where: str, expected: str, got: str) -> NoReturn:
    raise UsageError(f"{path}: {where}: expected {expected}, got {got}", f"correct {path}")
