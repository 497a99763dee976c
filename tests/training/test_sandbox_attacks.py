"""Hostile programs are contained: each ends with a reason from the fixed list, reaches nothing, leaves nothing.

All of them, through each way to start a job here: `python -m pytest -m slow -n 0 -s
tests/training/test_sandbox_attacks.py`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from common.process import REPOSITORY
from tests.training.hostile_attack import PRELUDE, Attack
from tests.training.hostile_programs import FAST, PROGRAMS
from training.sandbox import HELD_OUT_PACKAGES, Ending, Sandbox, choose
from training.sandbox_job import REASONS
from training.usage import tree_usage

BEST = choose("auto")
pytestmark = pytest.mark.skipif(BEST.backend == "process", reason=f"no real sandbox here: {BEST.note}")


@dataclass
class Ground:
    """What the programs are let loose on: files, sockets and processes of the test that must stay as they are."""

    folder: Path
    nonce: str
    tcp: list[socket.socket]
    unix: list[socket.socket]
    signals: list[int]

    @property
    def victim(self) -> Path:
        return self.folder / "experiments" / "1" / "secret.txt"

    def environment(self) -> dict[str, str]:
        packages = Path(sysconfig.get_path("purelib"))
        held_out = [packages / name for name in HELD_OUT_PACKAGES] + [REPOSITORY / "training" / "scorer"]
        return {
            "ATTACK_VICTIM": str(self.victim),
            "ATTACK_OTHER": str(self.folder / "experiments"),
            "ATTACK_NONCE": self.nonce,
            "ATTACK_HOST": str(os.getpid()),
            "ATTACK_PORT": str(self.tcp[0].getsockname()[1]),
            "ATTACK_SOCKET": str(self.folder / "listener"),
            "ATTACK_ABSTRACT": self.nonce + "-host",
            "ATTACK_HELD_OUT": ":".join(map(str, held_out)),
            "ATTACK_PLACES": ":".join([str(packages), str(REPOSITORY), str(REPOSITORY / "training")]),
            "ATTACK_WAYS": ":".join(
                {part for path in (sys.prefix, sys.base_prefix, REPOSITORY) for part in Path(path).parts}
            ),
        }

    def untouched(self) -> None:
        """Nothing was heard, written or changed."""
        for listener in (*self.tcp, *self.unix):
            with pytest.raises(BlockingIOError):
                listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(1)
        assert self.victim.read_text() == "hunter2"
        for place in (self.folder, *self.folder.glob("experiments/**")):
            assert not list(place.glob(f"*{self.nonce}*"))
        assert not self.signals

    def left_over(self) -> dict[str, object]:
        """What a job may leave on this machine: the same before and after."""
        proc, nonce = Path("/proc"), self.nonce
        places = [Path(name) for name in ("/tmp", "/var/tmp", "/dev/shm", "/", str(self.folder), str(REPOSITORY))]
        sysv = {kind: (proc / "sysvipc" / kind).read_text().count("\n") for kind in ("shm", "sem", "msg")}
        return {
            "files": [str(path) for place in places for path in place.glob(f"*{nonce}*")],
            "temporary": sorted(path.name for path in (self.folder / "tmp").iterdir()),
            "mounts": sorted((proc / "self" / "mountinfo").read_text().splitlines()),
            "sockets": [
                line
                for line in (proc / "net" / "unix").read_text().splitlines()
                if nonce in line and "host" not in line
            ],
            "memory": sysv,
            "descriptors": len(list((proc / "self" / "fd").iterdir())),
            "groups": [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/asi-arch-{os.getpid()}-*")],
        }


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    import signal

    folder = tmp_path_factory.mktemp("ground")
    (folder / "tmp").mkdir()
    nonce = "asi-attack-" + secrets.token_hex(6)
    tcp = [socket.create_server(("127.0.0.1", 0))]
    address = tcp[0].getsockname()
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(address)
    tcp.append(datagrams)
    with contextlib.suppress(OSError):  # a machine without IPv6
        tcp.append(socket.create_server(("::1", address[1]), family=socket.AF_INET6))
    unix = []
    for name in (str(folder / "listener"), f"\0{nonce}-host"):
        unix.append(socket.socket(socket.AF_UNIX))
        unix[-1].bind(name)
        unix[-1].listen()
    for listener in (*tcp, *unix):
        listener.setblocking(False)
    os.chmod(folder, 0o755)  # noqa: PTH101
    (folder / "listener").chmod(0o777)
    made = Ground(folder, nonce, tcp, unix, [])
    made.victim.parent.mkdir(parents=True)
    made.victim.write_text("hunter2")
    os.environ["AWS_SECRET_ACCESS_KEY"] = "hunter2"
    old = signal.signal(signal.SIGUSR1, lambda number, frame: made.signals.append(number))
    before_tmp, os.environ["TMPDIR"] = os.environ.get("TMPDIR"), str(folder / "tmp")
    yield made
    signal.signal(signal.SIGUSR1, old)
    del os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["TMPDIR"]
    if before_tmp is not None:
        os.environ["TMPDIR"] = before_tmp
    for listener in (*tcp, *unix):
        listener.close()


def let_loose(sandbox: Sandbox, attack: Attack, ground: Ground) -> tuple[Ending | None, str]:
    """How its job ended, and what it said (1 MB at most). Asserts that no process of it lives then."""
    job = sandbox.start(
        [sys.executable, "-S", "-c", PRELUDE + attack.code],
        env=ground.environment(),
        limits=attack.limits,
    )
    namespaces: set[str] = set()
    said = bytearray()
    try:
        namespaces = _namespaces(job.pid)
        while part := os.read(job.stdout.fileno(), 1 << 16):
            said += part
            if len(said) > 1 << 20:
                job.kill("output")
                break
        assert job.wait(30) is not None
    finally:
        job.kill()
    assert namespaces, "its namespace was not seen"
    assert not _living(namespaces), "a process of it lives on"
    return job.ending(), said.decode("utf-8", "replace")


def _namespaces(pid: int) -> set[str]:
    found = set()
    for child in tree_usage(pid).pids:
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{child}/ns/pid"))  # noqa: PTH115
    return found - {os.readlink("/proc/self/ns/pid")}  # noqa: PTH115


def _living(namespaces: set[str]) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # Its first process may wait for the machine's init to take note of its end.
            if os.readlink(entry / "ns" / "pid") in namespaces and not _ended(entry):  # noqa: PTH115
                found.append(entry.name)
    return found


def _ended(entry: Path) -> bool:
    return (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"


def fault(sandbox: Sandbox, name: str, ground: Ground) -> str | None:
    """What got through, None when it was contained."""
    attack = PROGRAMS[name]
    ending, said = let_loose(sandbox, attack, ground)
    ground.untouched()
    if ending not in attack.expected:
        return f"it ended as {ending}, expected {attack.expected}: {said[-500:]}"
    if "BREACH" in said:
        return "\n".join(line for line in said.splitlines() if "BREACH" in line)
    if attack.says not in said:
        return f"it did not get to its attack: {said[-500:]!r}"
    return None


def test_there_are_enough_and_each_expects_reasons_of_the_fixed_list() -> None:
    assert len(PROGRAMS) >= 40
    assert {reason for attack in PROGRAMS.values() for reason in attack.expected} <= set(REASONS)
    assert set(FAST) <= set(PROGRAMS)


@pytest.mark.parametrize("name", FAST)
def test_it_is_contained(name: str, ground: Ground) -> None:
    assert fault(BEST, name, ground) is None


@pytest.mark.slow
@pytest.mark.parametrize("drop_uid", [True, False], ids=["own-uid", "user-namespace"])
def test_all_are_contained_and_nothing_is_left_behind(drop_uid: bool, ground: Ground) -> None:
    if BEST.backend != "bubblewrap" or (drop_uid and not BEST.drop_uid):
        pytest.skip("needs bubblewrap, and root for a uid of its own")
    sandbox = replace(BEST, drop_uid=drop_uid)
    let_loose(sandbox, Attack("print('held')"), ground)  # what is made once is there before
    before = ground.left_over()
    faults, started = {}, time.monotonic()
    for name in PROGRAMS:
        found = fault(sandbox, name, ground)
        if found is not None:
            faults[name] = found
            print(f"NOT CONTAINED: {name}: {found}")
    how, seconds = "a uid of its own" if drop_uid else "a user namespace", time.monotonic() - started
    print(f"\n{len(PROGRAMS) - len(faults)} of {len(PROGRAMS)} contained with {how}, {seconds:.0f} s")
    assert not faults
    assert ground.left_over() == before
