"""What the start of a sandboxed job costs beyond a plain Python: `python benchmarks/sandbox.py [--rounds N] [--json]`.

Small version: `python benchmarks/sandbox.py --rounds 5`. Each round starts a plain Python that does nothing, and the
same as a job of each backend that works here, one after the other, from the start to the end with its output read.
Printed are the median over the rounds, what it is more than plain Python's (the aim is under 50 ms), and the same for
the least of each, which a busy machine moves less.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from common.errors import SandboxError
from training.sandbox import Sandbox, choose, worker_reads

__all__ = ["main", "measure"]

NOTHING = [sys.executable, "-I", "-S", "-c", "pass"]


def plain() -> None:
    """A Python that does nothing, with pipes like a job's."""
    subprocess.run(NOTHING, input=b"", capture_output=True, check=True)


def sandboxed(sandbox: Sandbox) -> None:
    """The same as a job that sees what a worker sees."""
    job = sandbox.start(NOTHING, reads=worker_reads())
    try:
        job.stdout.read()
        if job.wait(30) != 0:
            raise SandboxError(f"the job ended with status {job.wait(0)}: {job.stderr_tail()[-300:]}")
    finally:
        job.kill()


def measure(rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds of each start by backend, "plain" among them; why the missing backends do not work here)."""
    ways: dict[str, Callable[[], None]] = {"plain": plain}
    missing: dict[str, str] = {}
    for backend in ("process", "bubblewrap", "docker"):
        try:
            found = choose(backend)
        except SandboxError as error:
            missing[backend] = error.message
            continue
        ways[backend] = lambda found=found: sandboxed(found)  # type: ignore[misc]
        if found.drop_uid:
            mapped = replace(found, drop_uid=False)
            ways["bubblewrap, user namespace"] = lambda mapped=mapped: sandboxed(mapped)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # what is read and made once
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return times, missing


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, or with --json one object."""
    parser = argparse.ArgumentParser(prog="sandbox.py", description="Start cost of a sandboxed job.")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved starts of each kind (default 20)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    times, missing = measure(arguments.rounds)
    rows = {
        name: {
            "median_ms": 1000 * statistics.median(found),
            "beyond_plain_ms": 1000 * (statistics.median(found) - statistics.median(times["plain"])),
            "least_beyond_plain_ms": 1000 * (min(found) - min(times["plain"])),
        }
        for name, found in times.items()
    }
    if arguments.json:
        print(json.dumps({"rounds": arguments.rounds, "starts": rows, "missing": missing}))
        return 0
    print(f"{'start of':<28} {'median ms':>9} {'beyond plain':>13} {'least beyond':>13}   n = {arguments.rounds}")
    for name, row in rows.items():
        print(f"{name:<28} " + " ".join(f"{row[key]:>{width}.1f}" for key, width in zip(row, (9, 13, 13), strict=True)))
    for name, why in missing.items():
        print(f"{name:<28} not measured: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
