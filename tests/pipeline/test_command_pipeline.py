"""The loop with the user's own training script: killed while it trains, it goes on; its numbers are marked."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.pipeline.running import ROOT, assert_whole, children, command, command_line, elements, zombie

SCRIPT = """
import hashlib, sys, time
program, name, seed, out = sys.argv[1:]
print("training", name, flush=True)
time.sleep(0.1 if "baselines" in out else 3)
share = int(hashlib.sha256((open(program).read() + seed).encode()).hexdigest()[:8], 16) / 16**8
open(f"{out}/train.csv", "w").write(f"step,1,200\\n{name},6.9,{4 + share / 10:.4f}\\n")
open(f"{out}/test.csv", "w").write(f"Model,arc_easy,piqa\\n{name},{.3 + share / 10:.3f},{.5 + share / 10:.3f}\\n")
"""


@pytest.mark.slow
def test_the_loop_trains_by_the_users_script_over_a_kill(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    words = f"python3 {tmp_path}/script.py {{program}} {{name}} {{seed}} {{out}}"
    data_dir = tmp_path / "run"
    argv = [*command(data_dir, 1, "--parallel", "1"), "--training.command", words]
    argv += ["--training.cache_dir", str(tmp_path / "cache")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        started, end = data_dir / "experiments/0001/attempt-1/command.log", time.monotonic() + 150
        while not (started.exists() and started.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        family = children(process.pid)
        assert any("script.py" in command_line(pid) for pid in family)
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(5)
    assert all(zombie(pid) for pid in family)
    again = subprocess.run(argv, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "WITHOUT a sandbox" in again.stdout and "unaudited" in again.stdout
    assert_whole(data_dir, 1)
    for element in elements(data_dir):
        record = element["runs"][-1]
        assert record.trainer == "command" and record.heldout_loss is None and set(record.reported) == {
            "arc_easy", "piqa",
        }  # fmt: skip
        assert element["result"]["train"].startswith("step,1,200\n")
    assert not (tmp_path / "cache" / "corpus").exists()
