"""Text on its way to a person: a stranger's, and counts."""

from __future__ import annotations

import unicodedata

__all__ = ["counted", "encodes", "printable"]


def counted(number: int, noun: str) -> str:
    """`1 reference`, `2 references`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def encodes(text: str) -> bool:
    """Whether `text` is UTF-8: names of files and flags may hold any bytes, which Python carries as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """`text` without control characters, which could move the cursor, clear the screen or retitle the window.

    Line breaks and tabs stay; anything else of the Unicode category "other" becomes U+FFFD.
    """
    return "".join(
        letter if letter in "\n\t" or not unicodedata.category(letter).startswith("C") else "\ufffd" for letter in text
    )
