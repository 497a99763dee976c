"""Text of strangers on its way to a terminal."""

from __future__ import annotations

import unicodedata

__all__ = ["printable"]


def printable(text: str) -> str:
    """`text` without control characters, which could move the cursor, clear the screen or retitle the window.

    Line breaks and tabs stay; anything else of the Unicode category "other" becomes U+FFFD.
    """
    return "".join(
        letter if letter in "\n\t" or not unicodedata.category(letter).startswith("C") else "\ufffd" for letter in text
    )
