"""Names of benchmarks: a misspelt one is told apart from one whose data are missing, before anything is done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UsageError
from common.process import REPOSITORY
from common.settings import load
from training.benchmark_names import official_names, require_named
from training.launcher import Launcher
from training.profiles import Profile, load_profile, profile_names

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"


def scoring(*benchmarks: str) -> Profile:
    profile = load_profile(TINY)
    return profile.model_copy(update={"eval": profile.eval.model_copy(update={"benchmarks": list(benchmarks)})})


@pytest.mark.parametrize(
    ("name", "near"), [("clozee", "did you mean cloze"), ("piqaa", "did you mean piqa"), ("xqzxqz", "fix: Ours are")]
)
@pytest.mark.parametrize("asked", ["profile", "own"])
def test_a_misspelt_benchmark_is_refused_with_the_nearest_names(name: str, near: str, asked: str) -> None:
    """Also where --benchmarks own leaves out those of the hub: it is none of them."""
    with pytest.raises(UsageError, match=f"(?s)'{name}', and there is no such task.*{near}"):
        Launcher(load(None, {"training": {"benchmarks": asked, "device": "cpu"}}), scoring("recall", name))


def test_a_group_of_tasks_is_none() -> None:
    with pytest.raises(UsageError, match=r"(?s)'mmlu', and there is no such task.*no groups"):
        require_named(["mmlu"])


def test_every_benchmark_of_the_shipped_profiles_is_there() -> None:
    for name in profile_names():
        require_named(load_profile(name).eval.benchmarks)


def test_the_user_s_own_script_scores_what_it_likes() -> None:
    Launcher(load(None, {"training": {"command": "true {program}", "device": "cpu"}}), scoring("mine"))


def test_the_command_refuses_it_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TINY.read_text().replace('"cloze"]', '"clozee"]'))
    program = REPOSITORY / "training" / "architectures" / "delta_net.py"
    done = subprocess.run(
        [sys.executable, "training/train.py", str(program), "--profile", str(tmp_path / "mine.toml"),
         "--training.cache_dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "did you mean cloze" in done.stderr, done.stderr
    assert not (tmp_path / "cache").exists(), "no corpus was made"


@pytest.mark.slow
def test_the_names_are_those_that_lm_eval_itself_finds() -> None:
    from lm_eval.tasks import TaskManager

    assert official_names() == set(TaskManager().all_subtasks)
