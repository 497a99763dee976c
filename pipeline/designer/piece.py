"""What one mechanism adds to a rendered program."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Piece"]


@dataclass(frozen=True)
class Piece:
    """Program text of one mechanism, by the place where it goes. Lines are not indented.

    helpers: module-level functions; streams: (name, width) of inputs that it takes from the fused projection, the
    width as an expression inside __init__; init: lines of __init__; shift: lines of forward before the projection;
    lift: lines of forward after it (outside the float32 region); mix: lines of mix, where the slot's turn comes; sees:
    how many tokens before the current one it looks at, as an expression in a method, None where that has no end or
    decoding is not written yet.
    """

    helpers: tuple[str, ...] = ()
    streams: tuple[tuple[str, str], ...] = ()
    init: str = ""
    shift: str = ""
    lift: str = ""
    mix: str = ""
    sees: str | None = "0"
