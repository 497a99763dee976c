"""The loop as a user runs it: real services, sandbox, training, scoring; the same data-dir resumes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.designer import fingerprint
from tests.pipeline.running import ROOT, children, command, command_line, elements, integrity, run, stage

pytestmark = pytest.mark.xdist_group("pipeline")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A data-dir with two finished experiments, and what was printed."""
    data_dir = tmp_path_factory.mktemp("run")
    done = run(data_dir, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    return data_dir, done.stdout


def test_what_was_stored_is_what_was_trained(finished: tuple[Path, str]) -> None:
    data_dir, _ = finished
    found = elements(data_dir)
    assert [element["index"] for element in found] == [1, 2, 3, 4]
    assert [element["name"] for element in found[:2]] == ["delta_net", "gated_delta_net"]
    assert len({fingerprint(element["program"]) for element in found}) == 4
    for element in found:
        record = element["runs"][-1]
        assert hashlib.sha256(element["program"].encode()).hexdigest() == record.program_sha256
        assert record.status == "finished" and record.heldout_loss.n > 0 and record.heldout_loss.se > 0
        assert len(record.benchmarks) >= 4 and all(score.se is not None for score in record.benchmarks.values())
        assert element["result"]["train"].count("\n") >= 1 and element["result"]["test"].count("\n") >= 1
    for element in found[2:]:
        assert element["parent"] in (1, 2)
        assert (data_dir / "pool" / f"{element['name']}.py").read_text() == element["program"]
        for title in (
            "Design evaluation",
            "Results",
            "Expectation and reality",
            "Explanation and evidence",
            "Synthesis",
        ):
            assert f"## {title}" in element["analysis"]


def test_candidates_have_the_size_of_the_baseline(finished: tuple[Path, str]) -> None:
    records = [element["runs"][-1] for element in elements(finished[0])]
    for record in records:
        assert abs(record.parameters / records[0].parameters - 1) <= 0.005


def test_the_table_says_what_happened(finished: tuple[Path, str]) -> None:
    data_dir, printed = finished
    for number in (1, 2):
        stored = stage(data_dir, number, "update")
        run_record = stage(data_dir, number, "evaluate")["run"]
        assert f"{stored['score']:.3f}" in printed
        assert f"{run_record['heldout_loss']['value']:.4f}" in printed
    for word in ("corpus", "services", "baselines", "pool", "Next:"):
        assert word in printed


def test_the_same_command_again_adds_nothing(finished: tuple[Path, str]) -> None:
    data_dir, _ = finished
    began = time.monotonic()
    again = run(data_dir, 2)
    assert again.returncode == 0 and "2 experiments are stored" in again.stdout
    assert time.monotonic() - began < 10
    assert len(elements(data_dir)) == 4


def kill_until_done(data_dir: Path, experiments: int, kills: int, rng: random.Random) -> int:
    """Kills the pipeline (or one of its children) at random moments, `kills` times, then lets it finish."""
    struck = 0
    while struck < kills:
        process = subprocess.Popen(
            command(data_dir, experiments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, text=True
        )
        time.sleep(rng.uniform(0.5, 14.0))
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
        family |= {process.pid}
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(
            Path(f"/proc/{pid}/stat").exists() and not zombie(pid) for pid in family
        ):
            time.sleep(0.1)
        left = [pid for pid in family if Path(f"/proc/{pid}/stat").exists() and not zombie(pid)]
        assert not left, f"children outlived the pipeline: {left}"
    done = run(data_dir, experiments, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return struck


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def assert_whole(data_dir: Path, experiments: int) -> None:
    found = elements(data_dir)
    assert [element["index"] for element in found] == list(range(1, experiments + 3))
    assert len({element["name"] for element in found}) == len(found)
    assert integrity(data_dir) == "ok"
    folders = sorted((data_dir / "experiments").iterdir())
    stored = [
        stage(data_dir, int(folder.name), "update")["index"] for folder in folders if (folder / "update.json").exists()
    ]
    assert sorted(stored) == list(range(3, experiments + 3))


def test_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    kill_until_done(tmp_path, 2, kills=3, rng=random.Random(3))
    assert_whole(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    struck, wanted, rng = 0, 0, random.Random(20)
    while struck < 20:
        wanted += 2
        struck += kill_until_done(tmp_path, wanted, kills=20 - struck, rng=rng)
        assert_whole(tmp_path, wanted)
    print(f"{struck} kills, {wanted} experiments, no gap, no duplicate")


def test_killed_services_come_back_and_the_run_goes_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, 1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if "evolve" in line:
            for pid in children(process.pid):
                words = command_line(pid).split("\0")
                if any(word.endswith(("mongodb_api.py", "rag_api.py", "embedding_server.py")) for word in words):
                    os.kill(pid, signal.SIGKILL)
    assert process.wait(120) == 0, printed
    assert_whole(tmp_path, 1)


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, None), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    time.sleep(8)
    family = children(process.pid)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0, printed
    assert "To go on" in printed and "Traceback" not in printed
    assert all(zombie(pid) for pid in family)
