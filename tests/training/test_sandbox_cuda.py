"""The sandbox of a job on a GPU, as far as it shows without one: what it finds there, its limits, its cards."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import SandboxError
from training.bubblewrap import driver_folders
from training.environment import visible_cards
from training.sandbox import Limits, Sandbox, choose

FACTS = """
import ctypes, json, os, resource, subprocess, sysconfig
def said(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr)[-300:]
with open("/tmp/a.c", "w") as file:
    file.write("#include <Python.h>\\nint three(void) { return 3; }\\n")
compiled = said("gcc", "-shared", "-fPIC", "/tmp/a.c", "-I", sysconfig.get_path("include"), "-o", "/tmp/a.so")
shared = os.statvfs("/dev/shm")
print(json.dumps({
    "libraries": said("/sbin/ldconfig", "-p"), "compiled": compiled,
    "three": ctypes.CDLL("/tmp/a.so").three() if compiled[0] == 0 else None,
    "space": resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY,
    "locked": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != 0,
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "shared_mb": shared.f_blocks * shared.f_frsize >> 20, "pci": os.path.isdir("/sys/devices"),
    "env": dict(os.environ),
}))
"""


def facts(sandbox: Sandbox, code: str = FACTS) -> dict[str, Any]:
    job = sandbox.start([sys.executable, "-c", code], limits=Limits(seconds=60, cpu_seconds=60))
    try:
        said = job.stdout.read()
        assert job.wait(30) == 0, job.stderr_tail()
        found: dict[str, Any] = json.loads(said)
        return found
    finally:
        job.kill()


def test_a_job_on_a_gpu_can_compile_kernels_and_reserve_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    try:
        found = facts(choose("bubblewrap", "cuda"))
    except SandboxError as error:
        pytest.skip(error.message)
    assert found["libraries"][0] == 0 and "=>" in found["libraries"][1]
    if shutil.which("gcc"):
        assert found["three"] == 3, found["compiled"]
    assert found["space"] and found["locked"] and found["files"] == 4096
    assert found["shared_mb"] == 1024 and found["pci"]
    assert found["env"]["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_limited_process_on_a_gpu_keeps_its_kernels_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    found = facts(choose("process", "cuda"), code)
    assert found["TRITON_CACHE_DIR"].startswith(found["TMPDIR"]) and "CUDA_VISIBLE_DEVICES" not in found
    assert facts(choose("process", "cpu"), code)["CUDA_VISIBLE_DEVICES"] == ""


def test_every_rank_on_a_gpu_gets_what_the_driver_takes() -> None:
    limits = Limits(memory_mb=1000, processes=64, ranks=3, seconds=20, cpu_seconds=20)
    for device, memory, tasks in (("cuda", 1000 + 8192, 256), ("cpu", 1000, 64)):
        job = choose("process", device).start([sys.executable, "-S", "-c", ""], limits=limits)
        job.kill()
        # What Python and torch hold beyond the limit is counted once for the job, and so added for the other two.
        assert (job.limits.memory_mb, job.limits.processes) == (3 * memory + 2 * 768, 3 * tasks)


@pytest.mark.slow
def test_memory_of_the_host_is_limited_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.sandbox._CUDA_MB", 0)
    held = "import time\nheld = bytearray(2 << 30)\ntime.sleep(60)"
    job = choose("process", "cuda").start(
        [sys.executable, "-S", "-c", held], limits=Limits(memory_mb=256, seconds=60, cpu_seconds=60)
    )
    assert job.wait(30) is not None and job.ending() == "memory"


def test_the_driver_is_found_where_only_the_environment_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, other = tmp_path / "driver", tmp_path / "other"
    driver.mkdir(), other.mkdir()
    (driver / "libcuda.so.1").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{other}:{driver}::relative")
    assert driver_folders() == [driver]
    assert facts(choose("process", "cuda"), "import json, os; print(json.dumps(dict(os.environ)))")[
        "LD_LIBRARY_PATH"
    ] == str(driver)


def test_only_visible_cards_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    for visible, count in ((None, 3), ("", 0), ("-1", 0), ("2", 1), ("0,2", 2), ("GPU-1a,GPU-2b,GPU-3c,GPU-4d", 3)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert visible_cards(tmp_path) == count
