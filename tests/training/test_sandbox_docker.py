"""The docker backend: what its containers are promised, and its streams against a daemon that speaks the API.

There is no Docker here to trust: the daemon is tests/training/docker_daemon.py, which contains nothing. So these tests
show what is asked of a daemon and what is done with its answers, and not that a real one keeps it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import SandboxError
from common.process import REPOSITORY
from tests.training import docker_daemon
from training.bubblewrap import HELD_OUT_PACKAGES, JUDGING_PACKAGES
from training.docker_config import LABEL, Job, container_config
from training.protocol import Channel, Frame
from training.sandbox import Limits, Sandbox, choose

IMAGE_PYTHON = """#!/bin/sh
PYTHONPATH="$PYTHONPATH:{hide}" exec {python} "$@"
"""
NOT_THERE = (*HELD_OUT_PACKAGES, *JUDGING_PACKAGES)
WITHOUT_HELD_OUT = f"""
import importlib.machinery
found = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name in {NOT_THERE!r} else found(name, path, target)
)
"""


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[docker_daemon.Daemon]:
    """A daemon whose image holds what the Dockerfile puts there: our versions, without the held-out packages."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(WITHOUT_HELD_OUT)
    python = tmp_path / "python"
    python.write_text(IMAGE_PYTHON.format(hide=tmp_path / "hide", python=sys.executable))
    python.chmod(0o755)
    with docker_daemon.serve(tmp_path) as found:
        found.python = str(python)
        monkeypatch.setenv("DOCKER_HOST", found.address)
        yield found


def gone(daemon: docker_daemon.Daemon) -> bool:
    deadline = time.monotonic() + 30  # the guard is a process that has to start first
    while daemon.containers and time.monotonic() < deadline:
        time.sleep(0.02)
    return not daemon.containers


def test_the_container_is_asked_for_with_every_promise() -> None:
    limits = Limits(memory_mb=512, file_mb=32, processes=20, files=99)
    job = Job(
        ["/usr/local/bin/python", "-c", "pass"],
        {Path("/a/read"): Path("/copies/0")},
        {"OMP_NUM_THREADS": "2"},
        limits,
        2_000_000_007,
        "cpu",
    )
    config = container_config(job, "me")
    host = config["HostConfig"]
    assert config["NetworkDisabled"] is True and host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"] is True and not host.get("Privileged")
    assert host["CapDrop"] == ["ALL"] and not host.get("CapAdd")
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert config["User"] == "2000000007:2000000007"
    assert host["Memory"] == host["MemorySwap"] == (512 + 32 + 64 + 1024) << 20
    assert host["PidsLimit"] == 28 and host["NanoCpus"] == 2 * 10**9
    assert host["IpcMode"] == "private" and host["CgroupnsMode"] == "private" and not host.get("PidMode")
    assert host["Tmpfs"] == {"/tmp": f"rw,nosuid,nodev,noexec,size={32 << 20},nr_inodes=10000,mode=1777"}
    assert host["LogConfig"]["Type"] == "none" and host["Init"] is True
    limited = {item["Name"]: (item["Soft"], item["Hard"]) for item in host["Ulimits"]}
    assert limited == {"core": (0, 0), "nofile": (99, 99), "fsize": (32 << 20, 32 << 20)}
    binds = {item["Target"]: (item["Source"], item["ReadOnly"]) for item in host["Mounts"]}
    assert binds["/a/read"] == ("/copies/0", True)
    assert all(read_only for _, read_only in binds.values()) and not host.get("Binds")
    assert config["OpenStdin"] and config["StdinOnce"] and not config["Tty"]
    assert config["Labels"] == {LABEL: "me"} and config["Healthcheck"]["Test"] == ["NONE"]
    assert not host.get("DeviceRequests") and not host.get("Devices")


def test_a_gpu_is_passed_through_where_the_device_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(["/usr/local/bin/python"], {}, {}, Limits(memory_mb=512, file_mb=32), 1, "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    host = container_config(job, "me")["HostConfig"]
    (request,) = host["DeviceRequests"]
    assert request["Count"] == -1 and "gpu" in request["Capabilities"][0]
    assert host["Memory"] == host["MemorySwap"] == (512 + 32 + 1024 + 1024) << 20
    assert host["ShmSize"] == 1 << 30 and ",exec," in host["Tmpfs"]["/tmp"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    (request,) = container_config(job, "me")["HostConfig"]["DeviceRequests"]
    assert request["DeviceIDs"] == ["1", "3"] and request["Count"] == 0


def test_without_a_daemon_the_error_says_where_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(SandboxError) as found:
        choose("docker")
    assert "no Docker daemon answers" in found.value.message and "nobody.sock" in found.value.message
    assert "systemctl start docker" in found.value.fix
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox = choose("auto")
    assert sandbox.backend == "process"
    assert "bwrap is not installed" in sandbox.note and "no Docker daemon answers" in sandbox.note


def test_auto_takes_docker_where_bubblewrap_fails(
    daemon: docker_daemon.Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    sandbox = choose("auto")
    assert sandbox.backend == "docker" and "bwrap is not installed" in sandbox.note
    assert gone(daemon)


def test_an_image_that_does_not_fit_is_refused_with_the_command_that_builds_it(daemon: docker_daemon.Daemon) -> None:
    with pytest.raises(SandboxError) as found:
        choose("docker", image="other")
    assert "no image other" in found.value.message and "--target worker -t other ." in found.value.fix
    daemon.python = sys.executable  # an image that holds the text we score on
    with pytest.raises(SandboxError, match="scipy sklearn pandas matplotlib"):
        choose("docker")
    assert gone(daemon)


def test_streams_arrive_whole_and_apart(daemon: docker_daemon.Daemon) -> None:
    sandbox = choose("docker")
    code = (
        "import os, sys\n"
        "data = sys.stdin.buffer.read()\n"
        "os.write(2, b'between')\n"
        "sys.stdout.buffer.write(data)\nsys.stdout.flush()\n"
        "os.write(2, b' and after')\nsys.exit(7)"
    )
    job = sandbox.start([sys.executable, "-c", code])
    sent = os.urandom(3 << 20)
    view = memoryview(sent)
    while view:
        view = view[job.stdin.write(view) :]
    job.stdin.close()
    got = bytearray()
    while part := job.stdout.read(1 << 16):
        got += part
    assert hashlib.sha256(got).digest() == hashlib.sha256(sent).digest()
    assert job.wait(60) == 7 and job.ending() == "crashed" and job.stderr_tail() == "between and after"
    job.kill()
    assert gone(daemon)


def test_our_frames_pass_and_nothing_of_the_image_is_in_the_environment(daemon: docker_daemon.Daemon) -> None:
    sandbox = choose("docker")
    code = (
        "import os, sys\n"
        f"sys.path.append({str(Path(sys.prefix) / 'lib' / f'python3.{sys.version_info[1]}' / 'site-packages')!r})\n"
        "from training.protocol import Channel, Frame\n"
        "channel = Channel(0, 1)\n"
        "call = channel.receive()\n"
        "channel.send(Frame('reply', call.id, call.op, {'env': sorted(os.environ)}, call.arrays))\n"
    )
    job = sandbox.start([sys.executable, "-c", code], env={"ASI_DEVICE": "cpu"})
    channel = Channel(job.stdout.fileno(), job.stdin.fileno(), timeouts=True)
    import numpy as np

    sent = np.arange(300_000, dtype=np.float32).reshape(3, -1)
    deadline = time.monotonic() + 60
    channel.send(Frame("call", 5, "echo", {}, [sent]), deadline)
    frame = channel.receive(deadline)
    assert frame.id == 5 and (frame.arrays[0] == sent).all()
    assert "IMAGE_SECRET" not in frame.meta["env"] and {"ASI_DEVICE", "HOME"} <= set(frame.meta["env"])
    assert job.wait(60) == 0 and job.ending() == "finished"
    job.kill()


def test_endings_and_no_container_is_left(daemon: docker_daemon.Daemon) -> None:
    sandbox = choose("docker")

    def ending(code: str, limits: Limits) -> str | None:
        job = sandbox.start([sys.executable, "-S", "-c", code], limits=limits)
        while job.stdout.read(1 << 16):
            pass
        assert job.wait(60) is not None
        job.kill()
        return job.ending()

    assert ending("import time; time.sleep(60)", Limits(seconds=0.5)) == "timeout"
    assert ending("while True: pass", Limits(cpu_seconds=0.5)) == "timeout"
    assert ending("import os\nwhile True: os.write(2, b'x' * 65536)", Limits(output_mb=1)) == "output"
    assert ending("import os; os.abort()", Limits()) == "crashed"
    daemon.out_of_memory = True  # as a daemon says when the kernel killed in the container
    assert ending("import os; os.kill(os.getpid(), 9)", Limits()) == "memory"
    daemon.out_of_memory = False
    job = sandbox.start([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    job.kill()
    assert job.ending() == "killed" and gone(daemon)


def test_containers_end_with_a_host_process_that_is_killed(daemon: docker_daemon.Daemon) -> None:
    code = (
        "import sys, time\nfrom training.sandbox import choose\n"
        "job = choose('docker').start([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "print('started', flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
    assert daemon.containers
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(daemon)


def test_it_admits_what_nobody_vouches_for() -> None:
    from training.programs import Program

    Sandbox("docker").require(Program("stranger.py", "x = 1"))
