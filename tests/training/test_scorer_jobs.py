"""The end of a scorer job takes its whole group along, and what a result depends on is in the baseline key."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from common.process import spawn
from training.environment import TRAINER_SOURCES
from training.jobs import _kill


def test_what_a_scorer_left_in_its_group_ends_with_it() -> None:
    code = "import subprocess; print(subprocess.Popen(['/bin/sleep', '318'], stdout=subprocess.DEVNULL).pid)"
    for waited in (True, False):
        scorer = spawn([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert scorer.stdout is not None
        child = int(scorer.stdout.readline())
        if waited:
            assert scorer.wait(10) == 0
        _kill(scorer)
        deadline = time.monotonic() + 5
        while _lives(child) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _lives(child)
        _kill(scorer)  # the group is gone: nothing happens


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_baseline_key_covers_all_that_trains_and_scores() -> None:
    wanted = {"training/worker/program.py", "training/worker/state.py", "training/fla_compat/modules/convolution.py"}
    wanted |= {f"training/scorer/{name}.py" for name in ("audit", "confirm", "fresh", "scored", "scoring", "verdict")}
    wanted |= {"training/profiles.py", "training/worker/guard.py", "training/worker/weights.py"}
    assert wanted <= set(TRAINER_SOURCES) and len(TRAINER_SOURCES) == len(set(TRAINER_SOURCES))
