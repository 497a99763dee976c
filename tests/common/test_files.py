"""Atomic files: a reader sees old or new, a full disk leaves the old one and no rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import StoreError
from common.files import read_json, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[2]


def test_a_write_that_runs_out_of_space_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    write_atomic(target, "old")
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\nfrom common.errors import StoreError\nfrom common.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_atomic(Path(sys.argv[1]), 'x' * 100_000)\n"
        "except StoreError as error:\n    print(error); sys.exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 9 and "fix:" in done.stdout, done.stderr
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_damaged_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"half":')
    with pytest.raises(StoreError, match=r"broken\.json"):
        read_json(path)
