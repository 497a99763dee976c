"""kill -9 of the pipeline or of any child, at any moment: nothing stored is lost or doubled, and no child is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.pipeline.running import ROOT, assert_whole, children, command, left_of, run


def begun(data_dir: Path, experiments: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(data_dir, experiments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )


def kill_until_done(data_dir: Path, experiments: int, kills: int, rng: random.Random) -> int:
    """Kills the pipeline (or one of its children) at random moments, `kills` times, then lets it finish."""
    struck = 0
    while struck < kills:
        process = begun(data_dir, experiments)
        time.sleep(rng.uniform(0.5, 10.0))
        if process.poll() is not None:
            break
        family = children(process.pid)
        victim = rng.choice([process.pid, *sorted(family)]) if struck % 2 else process.pid
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
        struck += 1
        if victim != process.pid:
            time.sleep(rng.uniform(0.5, 5.0))
            process.kill()
        process.wait()
        left = left_of(family | {process.pid}, 5)
        assert not left, f"children outlived the pipeline: {left}"
    done = run(data_dir, experiments, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return struck


@pytest.mark.timeout(600)  # where there are no baselines yet, it trains them first
def test_a_kill_in_the_midst_of_an_experiment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    # One kill; services that are killed under a running pipeline are in test_pipeline, twenty kills in the slow suite.
    evolved = tmp_path / "experiments" / "0001" / "evolve.json"
    with begun(tmp_path, 1) as process:
        while not evolved.exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        family = children(process.pid)
        process.kill()
    # They have five seconds where the machine is as fast as any; here it may be busy with other tests.
    assert not left_of(family, 30), "children outlived the pipeline"
    written = evolved.read_bytes()
    done = run(tmp_path, 1, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert evolved.read_bytes() == written, "what was done before is not done again"
    assert_whole(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    struck, wanted, rng = 0, 0, random.Random(20)
    while struck < 20:
        wanted += 2
        struck += kill_until_done(tmp_path, wanted, kills=20 - struck, rng=rng)
        assert_whole(tmp_path, wanted)
    print(f"{struck} kills, {wanted} experiments, no gap, no duplicate")
