"""The verifier accepts every mixer of ours, by the command that a user types."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from common.process import REPOSITORY
from training.architectures import ARCHITECTURES
from training.references import REFERENCES

DOCUMENTATION = REPOSITORY / "docs" / "mixers.md"


def test_every_mixer_stands_in_the_documentation() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    for name, path in ARCHITECTURES.items():
        assert f"| `{path.name}` |" in text, name
        kernel = path.read_text(encoding="utf-8").partition("from fla.ops.")[2].split()[2]
        assert f"`{kernel}`" in text, kernel
    assert all(f"`references/{path.name}`" in text for path in REFERENCES.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_architecture_is_accepted() -> None:
    files = [str(path) for path in ARCHITECTURES.values()]
    command = [sys.executable, str(REPOSITORY / "training" / "check.py"), *files, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    refused = {
        report["program"]: [check for check in report["checks"] if not check["passed"]]
        for report in reports
        if not report["accepted"]
    }
    assert not refused and len(reports) == len(files) and done.returncode == 0, (refused, done.stderr[-2000:])
