"""What the program's text suggests to try: the sizes of its chunks, the switches of its own, and which lines raise.

Only hints are read here. A wrong hint costs a little time; a verdict never rests on it, but for one question: whether
the line on which a constructor failed is a `raise` or an `assert`, so that the program says itself what it does not
support.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator

__all__ = ["REFERENCE_ARGUMENTS", "chunk_sizes", "own_switches", "raises_at"]

REFERENCE_ARGUMENTS = (
    *("mode", "d_model", "hidden_size", "expand_k", "expand_v", "num_heads", "layer_idx", "norm_eps"),
    *("use_beta", "use_gate", "use_short_conv", "use_output_norm", "conv_size", "conv_bias"),
    *("allow_neg_eigval", "qk_activation", "qk_norm"),
)
SIZE_NAMES = ("chunk", "block", "window", "segment", "stride", "bucket", "tile")
MOST_SIZES, MOST_SWITCHES = 4, 16


def _tree(text: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def chunk_sizes(text: str) -> list[int]:
    """Integers from 3 to 256 that the text gives to names like CHUNK, block_size or window: as a constant, a default
    or a keyword. The most frequent ones first, at most four."""
    counts: dict[int, int] = {}
    for name, value in _named_values(_tree(text)):
        if isinstance(value, ast.Constant) and type(value.value) is int and 3 <= value.value <= 256:
            hinted = any(part in name.lower() for part in SIZE_NAMES) or name.lower() == "c"
            if hinted:
                counts[value.value] = counts.get(value.value, 0) + 1
    return sorted(counts, key=lambda size: (-counts[size], size))[:MOST_SIZES]


def _named_values(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield _last_name(target), node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield _last_name(node.target), node.value
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value
        elif isinstance(node, ast.FunctionDef):
            yield from _defaults(node)


def _defaults(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = positional[len(positional) - len(arguments.defaults) :]
    yield from ((item.arg, value) for item, value in zip(with_default, arguments.defaults, strict=True))
    for item, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if value is not None:
            yield item.arg, value


def _last_name(target: ast.expr) -> str:
    return target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")


def own_switches(text: str) -> dict[str, dict[str, object]]:
    """Label -> constructor keywords for arguments beyond the reference's: booleans turned over, a zero made positive,
    and every string that the text compares one of its arguments with (`mode == "parallel"`). At most sixteen."""
    tree = _tree(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DeltaNet"]
    if not classes:
        return {}
    inits = [node for node in classes[-1].body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    known = {name: value for node in inits for name, value in _defaults(node)}
    known |= {name: value for name, value in _keywords_read(classes[-1]) if name not in known}
    compared = _compared(tree)
    found: dict[str, dict[str, object]] = {}
    for name, value in known.items():
        default = value.value if isinstance(value, ast.Constant) else None
        tries: list[object] = []
        if isinstance(default, str):
            tries = [other for other in compared.get(name, []) if other != default]
        elif name in REFERENCE_ARGUMENTS:
            continue
        elif isinstance(default, bool):
            tries = [not default]
        elif isinstance(default, int | float) and default == 0:
            tries = [1 if isinstance(default, int) else 0.5]
        found |= {f"{name}={other!r}": {name: other} for other in tries}
    return dict(list(found.items())[:MOST_SWITCHES])


def _keywords_read(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """(name, default) of `kwargs.get("name", default)` and `kwargs.pop("name", default)`."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("get", "pop")
            and isinstance(node.func.value, ast.Name)
            and len(node.args) in (1, 2)
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            default = node.args[1] if len(node.args) == 2 else ast.Constant(False)
            falsy = isinstance(default, ast.Constant) and default.value is None
            yield node.args[0].value, ast.Constant(False) if falsy else default


def _compared(tree: ast.AST) -> dict[str, list[str]]:
    """The string constants that each name or attribute is compared with."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        constants = [
            item.value for side in sides for item in ast.walk(side) if isinstance(item, ast.Constant) and item.value
        ]
        for side in sides:
            if isinstance(side, ast.Name | ast.Attribute):
                held = found.setdefault(_last_name(side), [])
                held += [value for value in constants if isinstance(value, str) and value not in held]
    return found


def raises_at(text: str, line: int | None) -> bool:
    """Whether `line` belongs to a raise or assert statement."""
    return line is not None and any(
        isinstance(node, ast.Raise | ast.Assert) and node.lineno <= line <= (node.end_lineno or node.lineno)
        for node in ast.walk(_tree(text))
    )
