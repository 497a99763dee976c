"""The names of benchmarks: this project's own tasks, and those of lm-eval's task library, read from its files.

lm-eval needs a quarter of a minute to index its library, and imports much for it; a name is looked up here in a second,
before anything else is done.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from common.errors import UsageError
from training.sections import OWN_TASKS

__all__ = ["require_named"]

_TASK = re.compile(rb"""^["']?task["']?[ \t]*:[ \t]*["']?([^\s"'#\[]+)""", re.MULTILINE)
"""The line of a task's file that names it; a group has a list there."""


def require_named(benchmarks: Sequence[str]) -> None:
    """
    Raises:
        UsageError: one is the name of no task, or lm-eval is not installed. Whether the data of a task can be had is
            seen later.
    """
    for name in benchmarks:
        if name not in OWN_TASKS and name not in official_names():
            near = difflib.get_close_matches(name, [*OWN_TASKS, *official_names()], n=3)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(
                f"eval.benchmarks names {name!r}, and there is no such task",
                f"{meant}Ours are {', '.join(OWN_TASKS)}; others are single tasks of lm-eval, no groups "
                "(`.venv/bin/lm-eval ls subtasks` lists them)",
            )


@functools.cache
def official_names() -> frozenset[str]:
    """The single tasks of lm-eval's library.

    Raises:
        UsageError: lm-eval is not installed.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise UsageError("lm-eval, whose tasks the profile names, is not installed", "run make setup")
    folder = Path(next(iter(found.submodule_search_locations))) / "tasks"
    return frozenset(name.decode() for path in folder.rglob("*.yaml") for name in _TASK.findall(path.read_bytes()))
