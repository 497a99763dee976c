"""Atomic files: a reader sees old or new, a full disk leaves the old one and no rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import StoreError
from common.files import read_json, remove_abandoned, replacing, write_atomic, write_json

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


KILLED = (
    "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
    "from pathlib import Path\nfrom common.files import replacing\n"
    "with replacing(Path(sys.argv[1])) as handle:\n"
    "    handle.write(b'half'); handle.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
)


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x.faiss"
    write_atomic(target, "old")
    subprocess.run([sys.executable, "-c", KILLED, str(target), str(ROOT)], check=False)
    (left,) = [entry for entry in tmp_path.iterdir() if entry != target]
    remove_abandoned(target)
    assert left.exists(), "too young: a process of an earlier release, which locks nothing, may be writing it"
    others = [".x.faiss.abcdefg", ".x.faiss.ABCDEFGH", ".x.faiss2.abcdefgh", "x.faiss.abcdefgh", ".y.faiss.abcdefgh"]
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    (tmp_path / ".x.faiss.a_folder").mkdir()
    (tmp_path / ".x.faiss.a_link_0").symlink_to(target)
    os.mkfifo(tmp_path / ".x.faiss.a_pipe_0")
    with replacing(target) as handle:
        for entry in tmp_path.iterdir():
            os.utime(entry, (0, 0), follow_symlinks=False)
        (held,) = [
            entry for entry in tmp_path.glob(".x.faiss.*") if entry.stat().st_ino == os.fstat(handle.fileno()).st_ino
        ]
        remove_abandoned(target)
        assert not left.exists() and held.exists(), "old, but its writer lives"
        handle.write(b"new")
    assert target.read_text() == "new"
    kept = [*others, "x.faiss", ".x.faiss.a_folder", ".x.faiss.a_link_0", ".x.faiss.a_pipe_0"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(kept)
    remove_abandoned(tmp_path / "none" / "x.faiss")
