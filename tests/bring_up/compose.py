"""What the compose files and the Dockerfile say, as plain data, and their containers laid out as plain folders."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from common.process import REPOSITORY

FOLDERS = (REPOSITORY / "database", REPOSITORY / "cognition_base", REPOSITORY)
FILES = tuple(folder / "docker-compose.yml" for folder in FOLDERS)
EXAMPLE = REPOSITORY / ".env.example"
_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?::([?-])([^}]*))?\})")


def read(file: Path) -> dict[str, Any]:
    value = yaml.safe_load(file.read_text())
    assert isinstance(value, dict)
    return value


def services() -> dict[str, dict[str, Any]]:
    """Every service of the project by name; `file` says where it stands."""
    found = {}
    for file in FILES:
        for name, service in read(file)["services"].items():
            assert name not in found, f"{name} stands in two files"
            found[name] = {**service, "file": file}
    return found


def example(*, comments: bool = False) -> dict[str, str]:
    """The variables of .env.example; with `comments` those that it only suggests as well."""
    line = re.compile(r"^#?(\w+)=(.*)$" if comments else r"^(\w+)=(.*)$", re.MULTILINE)
    return dict(line.findall(EXAMPLE.read_text()))


def variables(value: Any) -> list[tuple[str, str, str]]:
    """(name, "?" or "-" or "", text after it) of every variable in a value of a compose file."""
    if isinstance(value, Mapping):
        return [found for item in value.values() for found in variables(item)]
    if isinstance(value, list):
        return [found for item in value for found in variables(item)]
    return [found for found in _VARIABLE.findall(value) if found[0]] if isinstance(value, str) else []


def filled(value: Any, known: Mapping[str, str]) -> Any:
    """`value` with its variables replaced; one that is required and empty is a KeyError."""

    def replace(match: re.Match[str]) -> str:
        name, kind, text = match[1], match[2], match[3]
        if name is None:
            return "$"
        if known.get(name):
            return known[name]
        if kind == "?":
            raise KeyError(name)
        return str(text or "")

    if isinstance(value, Mapping):
        return {key: filled(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, known) for item in value]
    return _VARIABLE.sub(replace, value) if isinstance(value, str) else value


def environment(service: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """What a container of `service` is given. A variable without a value is passed on where it is known."""
    given = filled(service.get("environment", {}), known)
    passed = {name: known.get(name) if value is None else str(value) for name, value in given.items()}
    return {name: value for name, value in passed.items() if value is not None}


@dataclass
class Stage:
    """One stage of the Dockerfile.

    Attributes:
        parent: the image or the stage that it starts from.
        copies: (source, target) of every COPY.
        packages: what pip is told to install, and the requirement files.
    """

    parent: str
    user: str | None = None
    command: list[str] | None = None
    exposed: list[str] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    requirements: list[str] = field(default_factory=list)


def stages() -> dict[str, Stage]:
    """The Dockerfile's stages by name, each with what it inherits."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, Stage] = {}
    stage = Stage("")
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            above = found.get(parent, Stage(parent))
            copies, packages, files = list(above.copies), list(above.packages), list(above.requirements)
            stage = Stage(parent, above.user, above.command, list(above.exposed), copies, packages, files)
            found[name] = stage
        elif word == "COPY":
            *sources, target = rest.split()
            stage.copies += [(source, target) for source in sources]
        elif word == "USER":
            stage.user = rest
        elif word == "EXPOSE":
            stage.exposed.append(rest)
        elif word == "CMD":
            stage.command = yaml.safe_load(rest)
        elif word == "RUN":
            _read_pip(rest, stage)
    return found


def _read_pip(line: str, stage: Stage) -> None:
    for part in line.split("&&"):
        words = shlex.split(part)
        if words[:2] != ["pip", "install"]:
            continue
        rest = iter(words[2:])
        for word in rest:
            if word == "-r":
                stage.requirements.append(next(rest))
            elif word.startswith("-"):
                next(rest)
            else:
                stage.packages.append(word)


def lay_out(stage: Stage, app: Path) -> Path:
    """Copies what the stage holds of ours to `app`, its /app."""
    for source, target in stage.copies:
        if not target.startswith("/"):
            skip = shutil.ignore_patterns("__pycache__", "*.sqlite*")
            shutil.copytree(REPOSITORY / source, app / target, ignore=skip)
    return app


def closure(packages: Iterable[str]) -> set[str]:
    """The installed distributions that pip would install for `packages`, by name."""
    found: set[str] = set()
    waiting = [Requirement(package) for package in packages]
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            extras = wanted.extras or {""}
            marker = requirement.marker
            needed = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
            if needed and re.sub(r"[-_.]+", "-", requirement.name).lower() not in found:
                waiting.append(requirement)
        found.add(name)
    return found


def link_packages(packages: Iterable[str], folder: Path) -> Path:
    """A folder for PYTHONPATH with the installed `packages` and what they need, as in an image, and nothing else."""
    folder.mkdir(parents=True)
    for name in closure(packages):
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            place, source = folder / top, Path(str(distribution.locate_file(top)))
            if not place.exists() and source.exists():
                place.symlink_to(source)
    return folder
