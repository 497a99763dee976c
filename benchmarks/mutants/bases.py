"""The programs that faults are planted into, and the ways to plant one: an edit that fits in exactly one place."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from benchmarks.mutant import Mutant
from pipeline.designer import DELTA_NET, render

__all__ = ["DELTA", "GATED", "designed", "edited", "inserted", "written"]

_ARCHITECTURES = Path(__file__).resolve().parents[2] / "training" / "architectures"
DELTA = (_ARCHITECTURES / "delta_net.py").read_text(encoding="utf-8")
"""The text of the seed DeltaNet."""
GATED = (_ARCHITECTURES / "gated_delta_net.py").read_text(encoding="utf-8")
"""The text of the seed Gated DeltaNet."""

_RETURN = re.compile(r"^        return (self\.(?:o_proj|tokens)\(.*\)), None, past_key_values$", re.MULTILINE)
_LAST_LAYER = re.compile(r"^        self\.o_proj = nn\.Linear\(.*\)$", re.MULTILINE)
_CLASS = re.compile(r"^class DeltaNet\(nn\.Module\):$", re.MULTILINE)


@functools.cache
def _rendered(slots: tuple[tuple[str, str], ...]) -> str:
    return render(DELTA_NET.with_slots(**dict(slots)), "delta_net_base")


def designed(**slots: str) -> str:
    """The text that our designer renders for DeltaNet with these slots of its genome changed."""
    return _rendered(tuple(sorted(slots.items())))


def edited(
    name: str, base: str, fault: str, expected: str, *edits: tuple[str, str], lines: str = "", init: str = ""
) -> Mutant:
    """`base` with each edit (old, new) applied; `lines` and `init` as for `inserted`.

    Args:
        expected: names of the checks that may refuse it, separated by spaces; "any" is every check.

    Raises:
        AssertionError: an edit does not fit in exactly one place.
    """
    text = _with_lines(base, lines, init, "") if lines or init else base
    for old, new in edits:
        assert text.count(old) == 1, f"{name}: expected one place for {old!r}, got {text.count(old)}"
        text = text.replace(old, new)
    return Mutant(name, text, fault, frozenset(expected.split()))


def inserted(name: str, base: str, fault: str, expected: str, lines: str, *, init: str = "", top: str = "") -> Mutant:
    """`base` with statements between its output projection and its return.

    Args:
        lines: statements that may read `x` (the input [B, T, D]) and change `o` (the output of the same shape).
        init: statements at the end of __init__, which may read hidden_size.
        top: statements of the module, before the class.
    """
    return Mutant(name, _with_lines(base, lines, init, top), fault, frozenset(expected.split()))


def written(name: str, text: str, fault: str, expected: str) -> Mutant:
    """A mutant whose whole text is given."""
    return Mutant(name, text, fault, frozenset(expected.split()))


def _with_lines(base: str, lines: str, init: str, top: str) -> str:
    text = _replaced(base, _RETURN, lambda found: _body(found[1], lines))
    if init:
        text = _replaced(text, _LAST_LAYER, lambda found: f"{found[0]}\n{_indented(init)}")
    if top:
        text = _replaced(text, _CLASS, lambda found: f"{top.strip()}\n\n\n{found[0]}")
    return text


def _body(output: str, lines: str) -> str:
    return _indented(f"x, o = hidden_states, {output}\n{lines}\nreturn o, None, past_key_values")


def _indented(lines: str) -> str:
    return "\n".join(f"        {line}" if line else "" for line in lines.strip("\n").splitlines())


def _replaced(text: str, place: re.Pattern[str], new: object) -> str:
    assert callable(new)
    result, count = place.subn(new, text)
    assert count == 1, f"expected one place for {place.pattern!r}, got {count}"
    return result
