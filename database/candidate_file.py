"""The candidate file of the published service: {candidates, new_data_count, last_updated}."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import StoreError

__all__ = ["read_candidate_file"]


def read_candidate_file(path: Path) -> tuple[list[int], int]:
    """Indices of the candidates, best first as they stand there, and how many elements came after them.

    A candidate is an index, or an object with one; what is neither is left out.

    Raises:
        StoreError: the file cannot be read, or is no such file.
    """
    fix = "name the published service's candidate file in database.candidate_file, or leave it out"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read the candidates in {path}: {error}", fix) from error
    if not isinstance(value, dict) or not isinstance(value.get("candidates"), list):
        raise StoreError(f"expected an object with a list of candidates in {path}", fix)
    indices = [index for item in value["candidates"] if (index := _index(item)) is not None]
    count = value.get("new_data_count")
    return indices, count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0


def _index(item: Any) -> int | None:
    found = item.get("index") if isinstance(item, dict) else item
    return found if isinstance(found, int) and not isinstance(found, bool) else None
