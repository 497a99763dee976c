"""What a hostile job sends back does no harm to whoever reads it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training import cgroup
from training.protocol import Channel, ProtocolError
from training.sandbox import Limits, choose
from training.usage import disk_usage, tree_usage

BEST = choose("auto")
real = pytest.mark.skipif(BEST.backend == "process", reason=f"no real sandbox here: {BEST.note}")

FRAMES = {
    "nothing": b"",
    "a few bytes": b"\0\0",
    "a length of four gigabytes": b"\xff\xff\xff\xff",
    "no JSON": b"\0\0\0\x05hello",
    "a pickle that runs a command": b"\0\0\0\x2ccposix\nsystem\n(S'touch %s'\ntR." + b" " * 40,
    "JSON of another form": b"\0\0\0\x02[]",
    "a number as header": b"\0\0\0\x011",
    "not a number": b"\0\0\0\x03NaN",
}


def header(arrays: str, kind: str = "reply") -> str:
    return f'{{"kind":"{kind}","id":1,"op":"x","meta":{{}},"arrays":[{arrays}]}}'


HEADERS = {
    "an exabyte of array": header(f'{{"dtype":"float64","shape":[{2**57}]}}'),
    "many lengths": header(f'{{"dtype":"bool","shape":{[2] * 60}}}'),
    "a negative length": header('{"dtype":"bool","shape":[-4]}'),
    "a product beyond 64 bits": header(f'{{"dtype":"bool","shape":{[2**31] * 8}}}'),
    "a type that runs code": header('{"dtype":"object","shape":[1]}'),
    "true as a length": header('{"dtype":"bool","shape":[true]}'),
    "half a million arrays": header(",".join(["0"] * 500_000)),
    "a nest of brackets": "[" * 1_000_000,
    "a wrong kind": header("", "verdict"),
}


@real
def test_no_frame_that_a_job_sends_does_harm(tmp_path: Path) -> None:
    victim = tmp_path / "touched"
    frames = {name: raw.replace(b"%s", str(victim).encode()) for name, raw in FRAMES.items()}
    for name, text in HEADERS.items():
        frames[name] = len(text).to_bytes(4, "big") + text.encode()
    folder = tmp_path / "frames"
    folder.mkdir(mode=0o755)
    send = "import os, sys\nfor part in open(sys.argv[1], 'rb'):\n    os.write(1, part)"
    jobs = []
    for number, raw in enumerate(frames.values()):
        (folder / str(number)).write_bytes(raw)
        argv = [sys.executable, "-S", "-c", send, str(folder / str(number))]
        jobs.append(BEST.start(argv, reads=[folder], limits=Limits(seconds=20, output_mb=1)))
    for name, job in zip(frames, jobs, strict=True):
        channel = Channel(job.stdout.fileno(), job.stdin.fileno(), timeouts=True)
        with pytest.raises((ProtocolError, EOFError)):
            pytest.fail(f"{name}: {channel.receive(time.monotonic() + 20)}")
        job.kill()
    assert not victim.exists()


@real
def test_a_frame_that_never_ends_is_given_up() -> None:
    drip = "import os, time\nos.write(1, b'\\0\\0\\0\\xff')\nwhile True:\n    os.write(1, b' ')\n    time.sleep(0.01)"
    job = BEST.start([sys.executable, "-S", "-c", drip])
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        Channel(job.stdout.fileno(), job.stdin.fileno(), timeouts=True).receive(started + 0.5)
    assert time.monotonic() - started < 20, "it drips for ever"
    job.kill("timeout")
    assert job.ending() == "timeout"


def test_disk_that_is_hidden_counts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(1 << 20))
    used, entries = disk_usage(tmp_path)
    assert entries == 2 and 1 << 20 <= used < 2 << 20
    (tmp_path / "loop").symlink_to(tmp_path)
    assert disk_usage(tmp_path)[1] == 3
    with open(tmp_path / "gone", "wb") as file:  # noqa: PTH123
        file.write(bytes(1 << 20))
        file.flush()
        (tmp_path / "gone").unlink()
        assert disk_usage(tmp_path, [os.getpid()])[0] >= 2 << 20
    for number in range(20):
        (tmp_path / str(number)).touch()
    assert disk_usage(tmp_path, enough=10)[1] == 10


def test_no_more_of_a_tree_is_looked_at_than_is_allowed() -> None:
    command = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do /bin/sleep 326 & done; echo started; wait"
    tree = subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert tree.stdout is not None and tree.stdout.readline()
        assert tree_usage(tree.pid).tasks == 13
        assert tree_usage(tree.pid, 5).tasks == len(tree_usage(tree.pid, 5).pids) == 6
    finally:
        os.killpg(tree.pid, signal.SIGKILL)
        tree.communicate()


def test_a_process_does_not_hide_behind_its_name() -> None:
    """It may give itself any bytes as a name, such as no UTF-8 and a bracket."""
    code = "open('/proc/self/comm', 'wb').write(b'\\xff) Z 1'); print(); input()"
    hides = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert hides.stdout is not None and hides.stdout.readline()
        used = tree_usage(hides.pid)
        assert used.pids == (hides.pid,) and used.tasks == 1 and used.held > 0
    finally:
        hides.kill()
        hides.communicate()


def test_cgroups_are_used_only_where_they_were_handed_down(tmp_path: Path) -> None:
    own = tmp_path / "own"
    (tmp_path / "mount" / "a" / "b").mkdir(parents=True)
    for text in ("", "4:memory:/x\n", "0::/a/b\n"):
        own.write_text(text)
        assert cgroup.find(tmp_path / "mount", own) is None
    (tmp_path / "mount" / "a" / "cgroup.subtree_control").write_text("cpu pids")
    assert cgroup.find(tmp_path / "mount", own) is None
    assert cgroup.find(tmp_path / "mount", tmp_path / "missing") is None


def _writable_cgroup() -> Path | None:
    """A mounted hierarchy of version 2 where this process is in the root group and may make others."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2" and os.access(fields[1], os.W_OK) and (Path(fields[1]) / "cgroup.procs").exists():
            return Path(fields[1])
    return None


@pytest.mark.skipif(_writable_cgroup() is None, reason="no cgroup of version 2 that may be written here")
def test_a_cgroup_holds_a_whole_tree_and_ends_it() -> None:
    """Real groups; where the machine hands no controllers down, only entering, killing and removing can be seen."""
    mount = _writable_cgroup()
    assert mount is not None
    path = mount / f"asi-arch-{os.getpid()}-test"
    path.mkdir()
    group = cgroup.Group(path)
    tree = group.entered(["/bin/sh", "-c", "setsid sleep 318 & setsid sleep 318 & wait"])
    process = subprocess.Popen(tree)
    try:
        deadline = time.monotonic() + 5
        while len((path / "cgroup.procs").read_text().split()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.pid in map(int, (path / "cgroup.procs").read_text().split())
        assert not group.starved()
    finally:
        group.remove()
        process.wait()
    assert not path.exists() and process.returncode == -9


@pytest.mark.skipif(BEST.groups is None, reason="no cgroup of version 2 with memory and pids is handed down here")
def test_the_kernel_ends_a_tree_that_holds_too_much() -> None:
    code = (
        "import os, time\nfor _ in range(8):\n"
        "    if not os.fork():\n        kept = bytearray(b'x') * (250 << 20)\n        time.sleep(60)\ntime.sleep(60)"
    )
    job = BEST.start([sys.executable, "-S", "-c", code], limits=Limits(seconds=30, memory_mb=64, file_mb=4))
    assert job.wait(30) is not None
    job.kill()
    assert job.ending() == "memory"
