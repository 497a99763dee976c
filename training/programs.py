"""A candidate program: its text, under which name, and who vouches for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.errors import UsageError
from common.files import NotRegularError, read_regular, sha256_text

__all__ = [
    "MAX_BYTES",
    "NotAProgramError",
    "Program",
    "from_job",
    "load",
    "seed_hashes",
    "to_job",
    "trusted",
]

MAX_BYTES = 1 << 20
"""A program is one readable file; the largest published one has under 100 KB."""

_HERE = Path(__file__).resolve().parent


class NotAProgramError(UsageError):
    """What lies there can be no program: a folder, a pipe, a device, too long, or no text."""


@dataclass(frozen=True)
class Program:
    """One candidate.

    Attributes:
        name: its path as typed, or its name in the database.
        text: the whole file.
        trust: why it may run without a real sandbox: "seed" (shipped, by hash), "genome" (our designer renders
            exactly this text), "user" (--trust); None: it may not.
        reference: outside the search (softmax attention): the cost check becomes a warning.
    """

    name: str
    text: str
    trust: str | None = None
    reference: bool = False

    @property
    def sha256(self) -> str:
        return sha256_text(self.text)


def seed_hashes() -> dict[str, str]:
    """SHA-256 -> name of each program that we ship: the architectures and the references."""
    found = {}
    for folder in ("architectures", "references"):
        for path in sorted((_HERE / folder).glob("*.py")):
            if path.name != "__init__.py":
                found[sha256_text(path.read_text(encoding="utf-8"))] = path.stem
    return found


def load(path: Path | str, *, trust: bool = False, reference: bool = False, name: str | None = None) -> Program:
    """Reads a program file. Shipped programs are known by their hash, wherever the file lies.

    Args:
        trust: the user vouches for it (--trust).

    Raises:
        NotAProgramError: it is no regular file, not UTF-8 or longer than `MAX_BYTES`.
        UsageError: the file is missing or cannot be opened.
    """
    if not str(path):
        raise UsageError("expected the path of a program, got ''", "name an existing Python file")
    path = Path(path)
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except NotRegularError as error:
        raise NotAProgramError(f"{path} is no program: {error.strerror}", "name one Python file") from error
    except OSError as error:
        raise UsageError(f"cannot read the program {path}: {error.strerror}", "name an existing Python file") from error
    except UnicodeDecodeError as error:
        raise NotAProgramError(
            f"expected UTF-8 text in {path}, got other bytes at {error.start}", "save it as UTF-8"
        ) from error
    return Program(name or str(path), text, trusted(text, trust), reference)


def trusted(text: str, by_user: bool = False) -> str | None:
    """Who vouches for `text`: "seed" for a shipped file, "user" where `by_user`, else None."""
    if sha256_text(text) in seed_hashes():
        return "seed"
    return "user" if by_user else None


def to_job(programs: Iterable[Program]) -> list[dict[str, str | bool | None]]:
    """The programs as plain JSON for a scorer job."""
    return [{"name": p.name, "text": p.text, "trust": p.trust, "reference": p.reference} for p in programs]


def from_job(items: Iterable[dict[str, object]]) -> list[Program]:
    """The inverse of `to_job`."""
    return [
        Program(
            str(item["name"]),
            str(item["text"]),
            None if item.get("trust") is None else str(item["trust"]),
            bool(item.get("reference", False)),
        )
        for item in items
    ]
