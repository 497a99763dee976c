"""Programs: read from files, known by hash, carried to a job and back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.errors import UsageError
from common.process import REPOSITORY
from training.programs import MAX_BYTES, NotAProgramError, Program, from_job, load, seed_hashes, to_job


def test_shipped_programs_are_known_by_their_text_wherever_they_lie(tmp_path: Path) -> None:
    source = REPOSITORY / "training" / "architectures" / "delta_net.py"
    copy = tmp_path / "renamed.py"
    copy.write_bytes(source.read_bytes())
    assert load(copy).trust == "seed"
    assert seed_hashes()[load(copy).sha256] == "delta_net"
    copy.write_text(source.read_text() + "\n# changed\n")
    assert load(copy).trust is None
    assert load(copy, trust=True).trust == "user"


def test_what_is_no_program_file_is_a_usage_error(tmp_path: Path) -> None:
    big, binary = tmp_path / "big.py", tmp_path / "binary.py"
    big.write_bytes(b"#" * (MAX_BYTES + 1))
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError) as missing:
        load(tmp_path / "missing.py")
    assert missing.value.fix and "missing.py" in missing.value.message
    pipe = tmp_path / "pipe.py"
    os.mkfifo(pipe)
    for path in (big, binary, tmp_path, pipe, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(NotAProgramError) as found:
            load(path)
        assert found.value.fix and str(path) in found.value.message
    with pytest.raises(UsageError, match="got ''"):
        load("")


def test_programs_survive_the_way_to_a_job() -> None:
    programs = [Program("a", "x = 1\n"), Program("b", "ä\ud800", "genome", True)]
    assert from_job(to_job(programs)) == programs
    assert len({program.sha256 for program in programs}) == 2


def test_a_byte_order_mark_is_no_part_of_the_program(tmp_path: Path) -> None:
    file = tmp_path / "marked.py"
    file.write_bytes(b"\xef\xbb\xbfX = 1\n")
    assert load(file).text == "X = 1\n"
