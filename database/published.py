"""Published files of designs, read into elements: a gallery or a dump of elements, JSON or JSON Lines.

A gallery's results are of the verification stage (about 340M parameters, 1B tokens) while the score beside them is of
the 20M stage. Its rows therefore get a run record under a baseline key of their own: no constants of the 20M stage are
applied to them, and they have no score here until a baseline is put under that key.
"""

from __future__ import annotations

import codecs
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.files import sha256_text
from database.evaluate_agent.score import benchmark_mean, parse_table
from database.models import read_time
from database.store import MAX_INDEX

__all__ = ["GALLERY_KEY", "PublishedRow", "read_published"]

GALLERY_KEY = "published-340m-1b"
_GALLERY_MARKS = ("parameters", "svg_picture", "name_new")
_TEXTS = ("time", "name", "program", "motivation", "analysis", "cognition", "log", "summary")
_LISTS = ("results", "elements", "data", "architectures")
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class PublishedRow:
    """One row of a file. `value` is a line for `database.bulk`, `refused` why there is none; `notes` is what was
    changed."""

    number: int
    value: dict[str, Any] | None
    refused: str = ""
    notes: tuple[str, ...] = ()


def read_published(path: Path) -> list[PublishedRow]:
    """The rows of a file, by index.

    Raises:
        UsageError: the file cannot be read, or is neither JSON nor JSON Lines.
    """
    rows = _rows(path)
    indices = [_integer(row.get("index")) if isinstance(row, dict) else None for _, row in rows]
    known = {index for index in indices if index is not None}
    read = [_read(number, row, known) for number, row in rows]
    order = sorted(range(len(rows)), key=lambda at: (indices[at] is None, indices[at] or 0, rows[at][0]))
    return [read[at] for at in order]


@dataclass(frozen=True)
class _NoJson:
    """A line that is none, and why."""

    reason: str


def _rows(path: Path) -> list[tuple[int, Any]]:
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "name an existing file") from error
    # What is no UTF-8 is told apart from JSON, and never stored as another text.
    text = content.decode("utf-8", "surrogateescape")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _lines(path, content)
    if (reason := _not_utf8(content)) is not None:
        raise UsageError(f"{path} cannot be read: {reason}", _conversion(path, content))
    if isinstance(whole, dict):
        found = next((whole[name] for name in _LISTS if isinstance(whole.get(name), list)), None)
        whole = [whole] if found is None else found
    if not isinstance(whole, list):
        raise UsageError(f"expected a list of objects in {path}, got {type(whole).__name__}", "name another file")
    return list(enumerate(whole, 1))


def _lines(path: Path, content: bytes) -> list[tuple[int, Any]]:
    found: list[tuple[int, Any]] = []
    objects = 0
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            found.append((number, json.loads(line.decode())))
            objects += isinstance(found[-1][1], dict)
        except UnicodeDecodeError:
            # All of the file again, where it was stored but for this line, would be stored twice.
            told = f"{_not_utf8(line, number)}; {_conversion(path, content)}, and import that into an empty store"
            found.append((number, _NoJson(told)))
        except (ValueError, RecursionError) as error:
            found.append((number, _NoJson(f"expected JSON, got {str(error)[:100]}")))
    if not objects:
        if (reason := _not_utf8(content)) is not None:
            raise UsageError(f"{path} cannot be read: {reason}", _conversion(path, content))
        raise UsageError(f"expected JSON or JSON Lines in {path}, got neither", "name a gallery or a dump of elements")
    return found


def _not_utf8(content: bytes, line: int = 1) -> str | None:
    """Why bytes that begin at `line` of their file are no UTF-8; None where they are."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        return f"expected UTF-8, got the byte 0x{content[error.start]:02x} in line {line}"
    return None


def _conversion(path: Path, content: bytes) -> str:
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding, name = ("utf16", "UTF-16") if utf16 else ("latin1", "Latin-1")
    return f"if the file is {name}, convert it: iconv -f {encoding} -t utf8 {shlex.quote(str(path))} > NEW"


def _read(number: int, row: Any, known: set[int]) -> PublishedRow:
    if isinstance(row, _NoJson):
        return PublishedRow(number, None, row.reason)
    if not isinstance(row, dict):
        return PublishedRow(number, None, f"expected an object, got {_shown(row)}")
    result = row.get("result")
    if not isinstance(result, dict) or not all(isinstance(result.get(name), str) for name in ("train", "test")):
        return PublishedRow(number, None, "expected result to hold the texts train and test")
    texts = {name: _text(row.get(name)) for name in _TEXTS}
    lacking = [name for name in ("name", "program") if not texts[name]]
    if lacking:
        return PublishedRow(number, None, f"it has no {' and no '.join(lacking)}")
    index, parent = _integer(row.get("index")), _integer(row.get("parent"))
    notes = []
    if index is None and not _is_missing(row.get("index")):
        notes.append(f"its index {_shown(row['index'])} cannot be read: stored under another")
    if parent is None and not _is_missing(row.get("parent")):
        notes.append(f"its parent {_shown(row['parent'])} cannot be read: stored as a root")
    try:
        read_time(texts["time"])
    except ValueError:
        notes.append(f"its time {texts['time'][:40]!r} cannot be read: stored without one")
        texts["time"] = ""
    if parent is not None and parent not in known:
        notes.append(f"its parent {parent} is not in the file: stored as a root")
        parent = None
    element = {**texts, "result": {"train": result["train"], "test": result["test"]}, "index": index, "parent": parent}
    value: dict[str, Any] = {"element": element}
    if any(mark in row for mark in _GALLERY_MARKS):
        value["runs"] = [_run(element, row)]
        notes.append(f"a gallery's result: kept under the baseline key {GALLERY_KEY}, without a score")
    return PublishedRow(number, value, notes=tuple(notes))


def _run(element: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    mean, _ = benchmark_mean(element["result"]["test"])
    train = parse_table(element["result"]["train"])
    curve = {step: _number(cell) for step, cell in zip(train.columns, train.cells, strict=False)}
    return {
        "run_id": f"published-{sha256_text(element['program'])[:12]}",
        "name": element["name"],
        "profile": "340m",
        "seed": 0,
        "status": "finished",
        "detail": "published figures of the verification stage; the loss is that of training",
        "program_sha256": sha256_text(element["program"]),
        "baseline_key": GALLERY_KEY,
        "benchmark_mean": None if mean is None else mean.model_dump(),
        "train_loss": {step: loss for step, loss in curve.items() if loss is not None},
        "parameters": _parameters(row.get("parameters")),
    }


def _shown(value: Any) -> str:
    """A value as JSON; of a list or an object only that it is one."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:60]


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value.strip().lower() != "nan" else ""


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _integer(value: Any) -> int | None:
    """An index as these files hold it: 3, 3.0, "3", {"$numberInt": "3"}; None for nan, null and anything else."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)).startswith("$number"):
        value = next(iter(value.values()))
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if 0 < value <= MAX_INDEX else None
    number = _number(value)
    return int(number) if number is not None and number == int(number) and 0 < number < 2**53 else None


def _is_missing(value: Any) -> bool:
    """Whether these files say so that there is no index: null, nan, or a text for it."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)).startswith("$number"):
        value = next(iter(value.values()))
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "none", "null")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _parameters(value: Any) -> int | None:
    """Parameters as a number or a text such as "495.73M"."""
    text = str(value).strip().upper()
    unit = _UNITS.get(text[-1:], 1.0)
    number = _number(text[:-1] if text[-1:] in _UNITS else text)
    return None if number is None or not 0 < number * unit < 2**63 else round(number * unit)
