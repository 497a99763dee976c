"""The sizes that a MongoDB server says: no question waits for a slow answer."""

from __future__ import annotations

import threading
import time
from typing import Any

from pymongo.errors import ExecutionTimeout

from database.mongodb_sizes import ServerSizes


def test_a_quick_answer_is_had_at_once_and_kept() -> None:
    asked: list[int] = []

    def ask(milliseconds: int) -> dict[str, Any]:
        asked.append(milliseconds)
        return {"dataSize": 10.0, "storageSize": 20, "collections": 3}

    sizes = ServerSizes(ask)
    for _ in range(3):
        found = sizes.latest()
        assert found is not None and found.said == {"dataSize": 10, "storageSize": 20} and found.at.startswith("20")
    assert len(asked) == 1


def test_nothing_waits_for_a_slow_answer() -> None:
    go = threading.Event()

    def ask(_: int) -> dict[str, Any]:
        assert go.wait(30)
        return {"dataSize": 10}

    sizes = ServerSizes(ask)
    began = time.monotonic()
    assert sizes.latest() is None and time.monotonic() - began < 5
    go.set()
    while sizes.latest() is None:
        assert time.monotonic() - began < 30
    # It took its time, and is not asked again soon.
    go.clear()
    began = time.monotonic()
    for _ in range(100):
        assert sizes.latest() is not None
    assert time.monotonic() - began < 5


def test_a_server_that_gives_up_has_said_nothing() -> None:
    asked: list[int] = []

    def ask(milliseconds: int) -> dict[str, Any]:
        asked.append(milliseconds)
        raise ExecutionTimeout("too long")

    sizes = ServerSizes(ask)
    assert sizes.latest() is None and sizes.latest() is None and len(asked) == 1
