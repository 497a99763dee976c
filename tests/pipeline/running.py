"""Runs the pipeline as a user does, and reads what it left behind."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "assets" / "tiny.toml"


def command(data_dir: Path, experiments: int | None, *more: str, profile: Path | str = TINY) -> list[str]:
    wanted = ["--experiments", str(experiments)] if experiments is not None else []
    entry = str(ROOT / "pipeline/pipeline.py")
    return [sys.executable, entry, "--data-dir", str(data_dir), "--profile", str(profile), *wanted, *more]


def run(
    data_dir: Path, experiments: int | None, *more: str, timeout: float = 200, **changes: Any
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **changes.pop("env", {})}
    argv = command(data_dir, experiments, *more, **changes)
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT)


def elements(data_dir: Path) -> list[dict[str, Any]]:
    """The stored elements in index order, read from the database over HTTP by the caller's own server."""
    from database.client import DatabaseClient

    server = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "database/mongodb_api.py"),
            "--port",
            "0",
            "--store",
            f"sqlite:////{str(data_dir / 'database.sqlite').lstrip('/')}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().removeprefix("listening on ").strip()
        client = DatabaseClient(url)
        found = client.all_elements(0).elements
        return [{**element.model_dump(), "runs": client.runs(element.index)} for element in found]
    finally:
        server.terminate()
        server.wait()


def integrity(data_dir: Path) -> str:
    with sqlite3.connect(data_dir / "database.sqlite") as connection:
        return str(connection.execute("pragma integrity_check").fetchone()[0])


def stage(data_dir: Path, number: int, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((data_dir / "experiments" / f"{number:04d}" / f"{name}.json").read_text())
    return value


def children(pid: int) -> set[int]:
    """Every live process that descends from `pid`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def command_line(pid: int) -> str:
    """Words of a process separated by NUL, "" when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def left_of(family: set[int], seconds: float) -> list[int]:
    """Those of the processes that live longer than so many seconds."""

    def left() -> list[int]:
        return [pid for pid in family if Path(f"/proc/{pid}/stat").exists() and not zombie(pid)]

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and left():
        time.sleep(0.1)
    return left()


def rest_of(process: subprocess.Popen[str], seconds: float = 100) -> str:
    """What a pipeline prints until it ends; where it does not end in time it is killed, and where its threads were
    stands at the end of what it printed."""
    assert process.stdout is not None
    orders = [(seconds, signal.SIGUSR1), (seconds + 5, signal.SIGKILL)]
    timers = [threading.Timer(after, process.send_signal, (order,)) for after, order in orders]
    for timer in timers:
        timer.start()
    try:
        return process.stdout.read()
    finally:
        for timer in timers:
            timer.cancel()


def assert_whole(data_dir: Path, experiments: int, stored: list[dict[str, Any]] | None = None) -> None:
    """Asserts that a run is stored without a gap or a double; `stored` are its elements, read now where not given."""
    found = elements(data_dir) if stored is None else stored
    assert [element["index"] for element in found] == list(range(1, experiments + 3))
    assert len({element["name"] for element in found}) == len(found)
    assert integrity(data_dir) == "ok"
    folders = sorted((data_dir / "experiments").iterdir())
    stored = [
        stage(data_dir, int(folder.name), "update")["index"] for folder in folders if (folder / "update.json").exists()
    ]
    assert sorted(stored) == list(range(3, experiments + 3))
