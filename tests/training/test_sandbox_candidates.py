"""Hostile candidates through the command that checks programs: none is accepted, and each refusal names a reason."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from common.process import REPOSITORY
from tests.training.hostile_candidates import CANDIDATES, FAST_CANDIDATES, NEEDLES
from training.sandbox import choose
from training.sandbox_job import REASONS

BEST = choose("auto")
pytestmark = pytest.mark.skipif(BEST.backend == "process", reason=f"no real sandbox here: {BEST.note}")


def check(folder: Path, programs: dict[str, str], seconds: float) -> dict[str, dict[str, Any]]:
    """Name -> report of `python training/check.py FILE... --json`."""
    files = []
    for number, text in enumerate(programs.values()):
        files.append(folder / f"hostile_{number}.py")
        files[-1].write_text(text)
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "training" / "check.py"), *map(str, files), "--json"],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "ASI_SANDBOX__MEMORY_MB": "512"},
    )
    assert done.returncode == 1, done.stderr[-2000:]
    return dict(zip(programs, map(json.loads, done.stdout.splitlines()), strict=True))


def reason(report: dict[str, Any]) -> tuple[str | None, str]:
    """The reason of its failed check `sandbox` (None: another check refused it), and what the refusal says."""
    failed = [item for item in report["checks"] if not item["passed"] and item["severity"] == "refuse"]
    assert failed, report
    last = failed[-1]
    found = (last["counterexample"] or {}).get("reason") if last["name"] == "sandbox" else None
    return found, f"{last['name']}: {last['detail']}"


def contained(name: str, report: dict[str, Any]) -> str | None:
    """What is wrong with the verdict, None when nothing is."""
    if report["accepted"] is not False:
        return f"accepted is {report['accepted']}: {report.get('error')}"
    found, said = reason(report)
    if found is not None and found not in REASONS:
        return f"its reason is {found}: {said}"
    if found != NEEDLES.get(name, found):
        return f"its reason is {found}, expected {NEEDLES[name]}: {said}"
    return None


def test_hostile_candidates_are_refused(tmp_path: Path) -> None:
    reports = check(tmp_path, {name: CANDIDATES[name] for name in FAST_CANDIDATES}, 120)
    assert {name: contained(name, report) for name, report in reports.items()} == dict.fromkeys(FAST_CANDIDATES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_hostile_candidates_are_refused(tmp_path: Path) -> None:
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = str(listener.getsockname()[1])
        programs = {name: text.replace("PORT", port) for name, text in CANDIDATES.items()}
        reports = check(tmp_path, programs, 900)
        with pytest.raises(TimeoutError):
            listener.accept()
    faults = {name: found for name, report in reports.items() if (found := contained(name, report)) is not None}
    for name, report in reports.items():
        print(f"{name}: {reason(report)}" if report["accepted"] is False else f"{name}: ACCEPTED")
    print(f"{len(reports) - len(faults)} of {len(reports)} contained, {time.monotonic() - started:.0f} s")
    assert not faults
