"""make run where nothing may be written beside the sources: what Python compiled need not be kept."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Python in a folder that it may not write to: the modules are not kept, and the status says so.
PYTHON = """#!/bin/sh
case "$*" in *compileall*) echo "*** Error compiling" && exit 1 ;; esac
echo "ran $1"
"""


def test_the_run_does_not_need_what_python_would_keep(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "requirements-dev.txt", "tools/setup.sh", ".venv/ready", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PYTHON if name.endswith("python") else "")
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / ".venv" / "ready").touch()
    env = {"PATH": os.environ["PATH"]}  # nothing of a make that runs the tests
    done = subprocess.run(["make", "run"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ran pipeline/pipeline.py\n"), done
