"""The README's tree names every tracked file, and nothing that is not there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDED = ("cognition_base/cognition/", "tests/", "docs/img/")
"""Folders that the tree shows as one line."""


def tree_paths() -> set[str]:
    text = (ROOT / "README.md").read_text()
    block = text.split("## The tree", 1)[1].split("```")[1]
    found, folders = set(), []
    for line in block.strip("\n").splitlines():
        match = re.match(r"^( *)([\w./{},*-]+)", line)
        if not match:
            continue
        depth, name = len(match[1]) // 2, match[2]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
            found.add("".join(folders))
        else:
            found.update("".join(folders) + one for one in expand(name))
    return found


def expand(name: str) -> list[str]:
    """`{a,b}.py` -> a.py, b.py."""
    match = re.match(r"^(.*)\{([^}]*)\}(.*)$", name)
    return [f"{match[1]}{one}{match[3]}" for one in match[2].split(",")] if match else [name]


def tracked() -> set[str]:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


def test_the_tree_is_true() -> None:
    files, shown = tracked(), tree_paths()
    missing = {
        name for name in files if name not in shown and not name.endswith("__init__.py") and not name.startswith(FOLDED)
    }
    gone = {
        name
        for name in shown
        if not (name in files or any(file.startswith(name) for file in files if name.endswith("/")))
    }
    assert not missing, f"in the repository but not in the README's tree: {sorted(missing)}"
    assert not gone, f"in the README's tree but not in the repository: {sorted(gone)}"
