"""Templates of prompts: one file each, with declared variables.

A template is NAME.md: a header, a line `---`, and the text. The header's first line is `NAME: what it is for`; each
further line declares and documents one variable: `variable: what it holds`. The text uses them as `{{variable}}`.
Every declared variable is used and every used one declared. Values are inserted once and never looked at again, so
programs with braces, and texts that look like placeholders, pass through as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.errors import UsageError

__all__ = ["Template", "clip", "fenced", "load", "names", "parse"]

_PLACEHOLDER = re.compile(r"\{\{([a-z][a-z0-9_]*)\}\}")
_DECLARATION = re.compile(r"([a-z][a-z0-9_]*): (\S.*)")


@dataclass(frozen=True)
class Template:
    """One prompt of the folder `folder`."""

    name: str
    purpose: str
    variables: dict[str, str]
    """Variable -> what it holds."""
    text: str
    folder: Path

    def render(self, **values: str) -> str:
        """The text with all variables inserted.

        Raises:
            UsageError: a variable is missing, unknown, or not text.
        """
        missing, unknown = self.variables.keys() - values.keys(), values.keys() - self.variables.keys()
        if missing or unknown:
            raise UsageError(
                f"prompt {self.name}: expected the variables {', '.join(self.variables) or 'none'};"
                f" missing: {', '.join(sorted(missing)) or 'none'}; unknown: {', '.join(sorted(unknown)) or 'none'}",
                f"declare in {self.folder / self.name}.md exactly what the caller passes",
            )
        for key, value in values.items():
            if not isinstance(value, str):
                raise UsageError(f"prompt {self.name}: expected text for {key}, got {type(value).__name__}")
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.text)


def names(folder: Path) -> list[str]:
    """All templates of a folder, by name."""
    return sorted(path.stem for path in folder.glob("*.md"))


@cache
def load(folder: Path, name: str) -> Template:
    """Reads and checks one template.

    Raises:
        UsageError: there is no such prompt, or its file is malformed.
    """
    try:
        content = (folder / f"{name}.md").read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"there is no prompt {name!r}; there are: {', '.join(names(folder))}") from error
    return parse(folder, name, content)


def parse(folder: Path, name: str, content: str) -> Template:
    """A template from the content of its file.

    Raises:
        UsageError: the header is malformed, or declared and used variables differ.
    """
    header, separator, text = content.partition("\n---\n")
    declared: dict[str, str] = {}
    for number, line in enumerate(header.splitlines(), 1):
        match = _DECLARATION.fullmatch(line)
        if match is None or match[1] in declared or (number == 1) != (match[1] == name):
            raise UsageError(
                f"prompt {name}, line {number}: expected {'its name' if number == 1 else 'a new variable'},"
                f" a colon and what it is, got {line!r}",
                f"correct the header of {folder / name}.md",
            )
        declared[match[1]] = match[2]
    purpose = declared.pop(name, "")
    used = set(_PLACEHOLDER.findall(text))
    stray = _PLACEHOLDER.sub("", text)
    if not separator or not purpose or used != declared.keys() or "{{" in stray or "}}" in stray:
        raise UsageError(
            f"prompt {name}: declared variables are {sorted(declared)}, used ones {sorted(used)}",
            "declare in the header, above a line ---, exactly the {{variables}} that the text uses",
        )
    return Template(name, purpose, declared, text.strip() + "\n", folder)


def fenced(text: str, language: str = "") -> str:
    """`text` between fences that are longer than any run of backticks in it, so that it cannot end its own block."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def clip(content: str, length: int) -> str:
    """The start of `content`, marked where it was cut."""
    content = content.strip()
    return content if len(content) <= length else content[:length].rstrip() + f" [... {len(content) - length} more]"
