"""benchmarks/gpu_check.sh on a machine without a GPU: what it records, and that a part that fails stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.process import REPOSITORY
from tests.training.triton_interpreter import environment
from training.profiles import load_profile

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"


def checked(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """(Exit status, the parts) of the script on the CPU at the tests' profile."""
    command = ["bash", "benchmarks/gpu_check.sh", "--device", "cpu", "--profile", str(TINY), "--run-profile", str(TINY)]
    command += ["--steps", "4", "--repeats", "1", "--programs", "delta_net", "--json", str(out), *arguments]
    status = subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=600).returncode
    return status, json.loads(out.read_text())["parts"]


def test_a_failed_part_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.txt")
    status, parts = checked(tmp_path / "a.json", "--parts", "tests", "ranks", "machine", "--text", missing)
    assert status == 1 and list(parts) == ["machine", "tests", "ranks"]
    assert parts["machine"]["ok"] is True and parts["machine"]["value"]["versions"]["torch"]
    assert parts["tests"]["ok"] is None and parts["tests"]["reason"] == "no GPU"
    assert parts["ranks"]["ok"] is False and "missing.txt" in parts["ranks"]["error"]


def test_without_a_gpu_the_script_says_so_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--json", str(tmp_path / "a.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no GPU" in done.stderr and not (tmp_path / "a.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_on_the_cpu(text_file: Path, tmp_path: Path) -> None:
    status, parts = checked(tmp_path / "a.json", "--text", str(text_file))
    assert status == 0, {name: part["error"] for name, part in parts.items() if part["error"]}
    assert [name for name, part in parts.items() if part["ok"] is None] == ["tests", "fla"]
    assert parts["check"]["value"]["delta_net"]["accepted"] is True
    speed = parts["speed"]["value"]
    assert speed["tokens_per_second"] > 0 and speed["training_flops_per_token"] > 0
    assert speed["mfu"] is None and parts["fla"]["value"] is None
    assert 0 <= parts["ranks"]["value"]["largest_difference"] < 1e-4
    assert parts["run"]["value"]["status"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_loop_of_flas_own_model_learns(tmp_path: Path) -> None:
    """By Triton's interpreter, which runs fla's recurrent kernel, and cross entropy by torch."""
    profile = load_profile(TINY)
    rows = np.tile(np.arange(17) % 5, (4 * 2, 1)).astype(np.int16)
    rows.tofile(tmp_path / "stream")
    train = {**profile.train.model_dump(mode="json"), "steps": 4, "batch": 2, "seq_len": 16, "micro_batch": 1}
    model = {**profile.model.model_dump(mode="json"), "hidden_size": 32, "vocab": 64, "ffn": 16}
    job = {"stream": str(tmp_path / "stream"), "type": "int16", "train": {**train, "warmup": 0}, "model": model}
    code = (
        "import json, sys, benchmarks.fla_loop, fla.models, fla.ops.delta_rule\n"
        "from tests.training.triton_interpreter import prepare\nprepare()\n"
        "job = json.load(sys.stdin)\n"
        "print(json.dumps(benchmarks.fla_loop.train(job, 'fused_recurrent', fuse_cross_entropy=False)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps({**job, "device": "cpu"}),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["losses"][-1] < answer["losses"][0] - 0.1 and answer["tokens_per_second"] > 0
