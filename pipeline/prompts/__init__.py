"""The prompts of the loop: one template file a role, in the form of `common.prompts`."""

from __future__ import annotations

from pathlib import Path

from common import prompts
from common.prompts import Template, fenced

__all__ = ["Template", "fenced", "load", "names", "parse", "render"]

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """All templates, by name."""
    return prompts.names(_FOLDER)


def render(name: str, /, **variables: str) -> str:
    """The prompt `name` with its variables inserted.

    Raises:
        UsageError: there is no such prompt, its file is malformed, or the variables are not those it declares.
    """
    return load(name).render(**variables)


def load(name: str) -> Template:
    """Reads and checks one template.

    Raises:
        UsageError: there is no such prompt, or its file is malformed.
    """
    return prompts.load(_FOLDER, name)


def parse(name: str, content: str) -> Template:
    """A template from the content of its file.

    Raises:
        UsageError: the header is malformed, or declared and used variables differ.
    """
    return prompts.parse(_FOLDER, name, content)
