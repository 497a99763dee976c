"""Reach: the program keeps to the names that its imports give it.

Refuses: ways around the import list (`__import__`, `eval`, `exec`, `globals`, `__builtins__`, frames, another module's
`sys` or `os`), hands on torch's dispatcher or its counters, and `.numpy()`: work outside of torch is not counted,
carries no gradient and does not run on a GPU. A mixer has no use for any of them; programs that behave while they are
looked at do. How: the syntax tree, as in static; but the other checks run all the same, so that a report also says what
the program did. Cannot see: names that are put together at run time. It is a lint; the sandbox and the audit after
training are what holds. Exact, so there is no tolerance.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from common.records import CheckOutcome
from training.scorer.verifier.context import passed
from training.scorer.verifier.static import Problem, imported_names, parse, refused_for

__all__ = ["NAME", "run"]

NAME = "reach"
_CALLS = ("__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "open")
_NAMES = ("__builtins__", "__loader__", "__spec__")
_ATTRIBUTES = (
    "__builtins__",
    "__closure__",
    "__code__",
    "__globals__",
    "__import__",
    "__loader__",
    "__subclasses__",
    "_getframe",
    "f_back",
    "f_builtins",
    "f_globals",
    "f_locals",
    "gi_frame",
    "tb_frame",
)
_MODULES = (
    "_C",
    "builtins",
    "ctypes",
    "gc",
    "importlib",
    "inspect",
    "multiprocessing",
    "os",
    "pickle",
    "shutil",
    "socket",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
)
"""Modules that other modules hold as attributes: torch.sys, torch.serialization.os."""
_IMPORTS = ("torch._C", "torch.overrides", "torch.utils._python_dispatch", "torch.utils.flop_counter")


def run(text: str) -> CheckOutcome:
    """The outcome for the text of a program that parses; the counterexample names the lines and what to do."""
    tree = parse(text)
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    problems = sorted({found for node in ast.walk(tree) for found in _problems(node, imported)})
    if not problems:
        return passed(NAME, "keeps to what it imports")
    return refused_for(NAME, problems)


def _problems(node: ast.AST, imported: set[str]) -> Iterator[Problem]:
    around = "import at the top what a mixer needs: torch, einops, math, fla"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        yield node.lineno, f"calls {node.func.id}", around
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "numpy":
        yield node.lineno, "leaves torch by .numpy()", "compute it with torch: work outside of it cannot be counted"
    elif isinstance(node, ast.Name) and node.id in _NAMES:
        yield node.lineno, f"uses {node.id}", around
    elif isinstance(node, ast.Attribute):
        owner = ast.unparse(node.value) if _root(node.value) in imported else ""
        if node.attr in _ATTRIBUTES or (owner and node.attr in _MODULES):
            yield node.lineno, f"uses {owner}.{node.attr}", around
    elif isinstance(node, ast.Import | ast.ImportFrom):
        for name in imported_names(node):
            if any(name == denied or name.startswith(denied + ".") for denied in _IMPORTS):
                yield node.lineno, f"imports {name}", "a mixer computes; how it is run and counted is not its part"


def _root(node: ast.expr) -> str | None:
    """The name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None
