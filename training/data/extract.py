"""Documents: the docstrings of installed packages.

The docstrings over 200 characters of the pinned packages are technical English that every installation has; they are
read in place with `ast` (nothing is imported) and are the same bytes wherever the pins are the same.

`python -m training.data.extract PACKAGE FILE` writes the docstrings of one package to FILE as a JSON list.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import AsiError, JobError
from common.files import write_json
from common.process import exit_with_parent

__all__ = ["docstrings", "installed", "package_version", "sample_documents"]

SHORTEST = 200
"""Characters below which a docstring says too little to learn from."""
_SKIPPED = {"tests", "test", "testing", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NESTING = (*_DOCUMENTED, ast.If, ast.Try, ast.With, ast.ExceptHandler)
_DISTRIBUTION = {"sklearn": "scikit-learn"}


def package_version(package: str) -> str:
    """Version of the distribution that holds `package`.

    Raises:
        JobError: it is not installed.
    """
    try:
        return importlib.metadata.version(_DISTRIBUTION.get(package, package))
    except importlib.metadata.PackageNotFoundError as error:
        raise JobError(
            f"the corpus needs the docstrings of {package}, which is not installed",
            "run make setup, or name text files with --text",
        ) from error


def installed(package: str) -> bool:
    """Whether there is an installed package of this name, with source that can be read."""
    try:
        if not package.isidentifier() or not package_version(package):
            return False
    except JobError:
        return False
    found = importlib.util.find_spec(package)
    return found is not None and bool(found.submodule_search_locations)


def docstrings(package: str) -> list[str]:
    """All docstrings of an installed package over 200 characters, in order of file path and position.

    Raises:
        JobError: the package is not installed, or its source cannot be read.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        package_version(package)
        raise JobError(f"the source of package {package} was not found", "run make setup")
    root = Path(next(iter(found.submodule_search_locations)))
    documents: list[str] = []
    collecting = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles; collecting while they grow costs a third of the time
    try:
        for path in sorted(root.rglob("*.py")):
            if not _SKIPPED & set(path.relative_to(root).parts):
                documents += _of_file(path)
    finally:
        if collecting:
            gc.enable()
    return documents


def _of_file(path: Path) -> list[str]:
    try:
        source = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise JobError(f"cannot read {path}: {error.strerror}", "run make setup") from error
    if '"""' not in source and "'''" not in source:
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []  # templates and code for other Python versions lie beside real modules
    documents: list[str] = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) > SHORTEST:
                text = inspect.cleandoc(text)
                if len(text) > SHORTEST:
                    documents.append(text)
        inner = [
            child
            for field in ("body", "handlers", "orelse", "finalbody")
            for child in getattr(node, field, ())
            if isinstance(child, _NESTING)
        ]
        pending.extend(reversed(inner))
    return documents


def sample_documents(packages: dict[str, Sequence[str]], characters: int) -> list[str]:
    """A subset of about `characters` characters, the same share of every package, in an order fixed by content.

    The order mixes packages, and depends on nothing but the texts.
    """
    keyed = sorted({(_rank(text), text) for texts in packages.values() for text in texts})
    total = sum(len(text) for _, text in keyed)
    share = min(1.0, characters / max(total, 1))
    return [text for rank, text in keyed if int(rank[:13], 16) / 16**13 < share]


def _rank(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def main(argv: Sequence[str]) -> int:
    """Writes the docstrings of package argv[0] to the file argv[1]. Returns the exit status."""
    exit_with_parent()
    try:
        write_json(Path(argv[1]), docstrings(argv[0]))
    except AsiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
