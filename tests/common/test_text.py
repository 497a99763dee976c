"""What a stranger wrote cannot steer the terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.text import printable


def test_escape_sequences_are_taken_apart() -> None:
    assert printable("a\x1b[2Jb\x07\r\x9b1m\u202ec") == "a\ufffd[2Jb\ufffd\ufffd\ufffd1m\ufffdc"


@given(st.text())
def test_nothing_steers_and_plain_text_stays(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert all(letter in "\n\t" or ord(letter) >= 32 for letter in shown)
    assert printable(shown) == shown
