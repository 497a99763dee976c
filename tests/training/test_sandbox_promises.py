"""The sandbox keeps its promises, tried from inside with real processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.errors import SandboxError
from common.process import REPOSITORY
from training.programs import Program
from training.sandbox import HELD_OUT_PACKAGES, Limits, Sandbox, SandboxedProcess, choose, worker_reads

BEST = choose("auto")
real = pytest.mark.skipif(BEST.backend != "bubblewrap", reason=f"no bubblewrap here: {BEST.note}")


def run(argv: Sequence[str], sandbox: Sandbox = BEST, **options: object) -> tuple[str, SandboxedProcess]:
    """Its standard output, and the ended job."""
    job = sandbox.start(argv, **options)  # type: ignore[arg-type]
    try:
        said = job.stdout.read().decode()
        assert job.wait(20) is not None
        return said, job
    finally:
        job.kill()


def python(code: str, **options: Any) -> tuple[str, SandboxedProcess]:
    return run([sys.executable, "-S", "-c", code], **options)


@real
def test_there_is_no_network_not_even_the_hosts_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        said, _ = python(
            "import socket\n"
            "def tried(call):\n"
            "    try:\n        call()\n        return 'open'\n"
            "    except OSError as error:\n        return type(error).__name__\n"
            f"print(tried(lambda: socket.create_connection(('127.0.0.1', {port}), 2)))\n"
            "print(tried(lambda: socket.getaddrinfo('example.invalid', 80)))\n"
        )
        assert "open" not in said and len(said.split()) == 2
        with pytest.raises(TimeoutError):
            listener.accept()


@real
def test_it_sees_the_worker_and_nothing_else_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    monkeypatch.setenv("ASI_TEST__SECRET", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    hidden = [secret, "/etc/shadow", "/etc/passwd", "/home", "/var", "/root/.ssh", REPOSITORY / "tests"]
    hidden += [REPOSITORY / "pyproject.toml", REPOSITORY / "training" / "profiles", REPOSITORY / "training" / "scorer"]
    said, _ = python(
        "import os, training.protocol\n"
        f"print([path for path in {[str(path) for path in hidden]!r} if os.path.exists(path)])\n"
        "print('hunter2' in str(dict(os.environ)), os.listdir('/tmp'))\n",
        reads=worker_reads(),
        env={
            "PYTHONPATH": f"{REPOSITORY}:{Path(os.__file__).parent}:"
            + ":".join(p for p in sys.path if "site-packages" in p)
        },
    )
    # Where the repository or the interpreter lies under /tmp, the way to it shows, and no more.
    mounted = [REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)]
    ways = sorted({path.parts[2] for path in mounted if path.parts[:2] == ("/", "tmp")})
    assert said.splitlines() == ["[]", f"False {ways}"]


@real
def test_held_out_text_is_not_mounted() -> None:
    said, _ = run(
        [
            sys.executable,
            "-c",
            "import os, sys, importlib.util\n"
            f"for name in {HELD_OUT_PACKAGES!r}:\n"
            "    found = importlib.util.find_spec(name)\n"
            "    for folder in (found.submodule_search_locations if found else []):\n"
            "        print(name, os.listdir(folder))\n"
            "base = os.path.join(sys.base_prefix, 'lib', 'python%d.%d' % sys.version_info[:2], 'site-packages')\n"
            "print('base', os.listdir(base) if os.path.isdir(base) else [])\n"
            "print('torch', bool(importlib.util.find_spec('torch').origin))\n",
        ]
    )
    lines = said.splitlines()
    assert lines[-1] == "torch True" and lines[-2] == "base []"
    assert all(line.endswith("[]") for line in lines[:-1])


@pytest.mark.skipif(BEST.backend != "bubblewrap" or sys.prefix == sys.base_prefix, reason="no bubblewrap, or no venv")
def test_a_virtual_environment_that_is_a_link_hides_as_much(tmp_path: Path) -> None:
    link = tmp_path / "linked"
    link.symlink_to(Path(sys.prefix).resolve())
    inner = (
        "import os, sys, sysconfig\n"
        "base = sysconfig.get_path('purelib')\n"
        f"print(base.startswith({str(link)!r}), [os.listdir(os.path.join(base, n)) for n in {HELD_OUT_PACKAGES!r}])"
    )
    outer = (
        "import sys\nfrom training.sandbox import choose\n"
        f"job = choose('bubblewrap').start([sys.executable, '-c', {inner!r}])\n"
        "print(job.stdout.read().decode(), job.stderr_tail())\njob.kill()\n"
    )
    python = [str(link / "bin" / "python"), "-c", outer]
    done = subprocess.run(python, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[0] == f"True {[[] for _ in HELD_OUT_PACKAGES]}", done


@real
def test_what_scores_a_program_cannot_be_imported() -> None:
    said, _ = run(
        [sys.executable, "-c", "try:\n    import lm_eval\nexcept ImportError as error:\n    print(error)\n"],
    )
    assert "not there for candidate programs" in said


@real
def test_it_writes_only_into_its_temporary_folders(tmp_path: Path) -> None:
    mine = [f"/{place}/asi-written-{os.getpid()}" for place in ("tmp", "dev/shm")]
    said, _ = python(
        "import os\n"
        f"places = ['/x', '/dev/x', '/usr/bin/x', {str(tmp_path / 'x')!r}, {str(REPOSITORY / 'training' / 'x')!r}, "
        f"os.path.join({sys.prefix!r}, 'x'), *{mine!r}]\n"
        "for place in places:\n"
        "    try:\n        open(place, 'w').write('1')\n        print(place)\n"
        "    except OSError:\n        pass\n",
    )
    assert said.split() == mine
    assert not any(map(os.path.exists, mine))


@real
def test_it_sees_its_own_processes_only_and_has_no_rights() -> None:
    said, _ = python(
        "import os\n"
        "print(len([name for name in os.listdir('/proc') if name.isdigit()]))\n"
        "print(os.getuid() == 0, 'CapEff:\\t0000000000000000' in open('/proc/self/status').read())\n"
        "try:\n    os.kill(1, 9)\nexcept OSError as error:\n    print('kill', error.errno)\n"
        f"try:\n    os.kill({os.getpid()}, 0)\nexcept OSError as error:\n    print('host', error.errno)\n"
    )
    lines = said.splitlines()
    assert int(lines[0]) <= 4
    assert lines[1] == "False True"
    assert "host 3" in lines  # no such process


@pytest.mark.parametrize("backend", [pytest.param(BEST.backend, id="best"), "process"])
def test_time_output_and_files_are_limited_and_the_whole_tree_ends(backend: str) -> None:
    sandbox = choose(backend)
    before = time.monotonic()
    _, job = run(["/bin/sh", "-c", "sleep 311 & sleep 312"], sandbox, limits=Limits(seconds=0.5))
    assert job.ending() == "timeout" and time.monotonic() - before < 60, "they sleep for five minutes"
    deadline = time.monotonic() + 15
    while left := [line for line in _processes() if "sleep 311" in line or "sleep 312" in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    _, job = run(
        [sys.executable, "-S", "-c", "import os\nwhile True: os.write(2, b'x' * 65536)"],
        sandbox,
        limits=Limits(output_mb=1),
    )
    assert job.ending() == "output" and len(job.stderr_tail()) <= 16384
    code = (
        "import os\nplace = os.environ.get('TMPDIR', '/tmp') + '/x'\n"
        "try:\n    open(place, 'wb').write(bytes(3 << 20))\nexcept OSError:\n    print(os.stat(place).st_size)\n"
    )
    said, job = run([sys.executable, "-S", "-c", code], sandbox, limits=Limits(file_mb=1))
    assert job.ending() == "finished" and int(said) <= 1 << 20
    _, job = run([sys.executable, "-S", "-c", "while True: pass"], sandbox, limits=Limits(cpu_seconds=0.5))
    assert job.ending() == "timeout" and job.cpu_seconds() > 0.3


@pytest.mark.parametrize("backend", [pytest.param(BEST.backend, id="best"), "process"])
def test_endings_tell_a_crash_from_a_finish(backend: str) -> None:
    sandbox = choose(backend)
    for code, ending in (
        ("pass", "finished"),
        ("raise SystemExit(3)", "crashed"),
        ("import os; os.abort()", "crashed"),
    ):
        assert run([sys.executable, "-S", "-c", code], sandbox)[1].ending() == ending
    job = sandbox.start(["/bin/sleep", "313"])
    assert job.ending() is None
    job.kill()
    assert job.ending() == "killed"


@pytest.mark.parametrize("backend", [pytest.param(BEST.backend, id="best"), "process"])
def test_a_kill_from_outside_is_no_lack_of_memory(backend: str) -> None:
    job = choose(backend).start(["/bin/sleep", "316"])
    os.killpg(job.pid, signal.SIGKILL)
    assert job.wait(60) is not None and job.ending() == "crashed" and job.killed_from_outside()
    kill = "import os, signal, sys; sys.stderr.write('MemoryError'); sys.stderr.flush(); os.kill(os.getpid(), 9)"
    assert run([sys.executable, "-S", "-c", kill], choose(backend))[1].ending() == "memory"
    held = "import os; x = bytearray(80 << 20); import time; time.sleep(1); os.kill(os.getpid(), 9)"
    job = run([sys.executable, "-S", "-c", held], choose(backend), limits=Limits(memory_mb=64))[1]
    assert job.ending() == "memory"
    job = choose(backend).start(["/bin/sleep", "317"])
    job.kill()
    assert job.ending() == "killed" and not job.killed_from_outside()


@pytest.mark.parametrize("backend", [pytest.param(BEST.backend, id="best"), "process"])
def test_it_dies_with_its_parent(backend: str) -> None:
    code = (
        "from training.sandbox import choose\n"
        f"job = choose({backend!r}).start(['/bin/sleep', '314'])\n"
        "print(job.pid, flush=True)\nimport time\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert _becomes(True, "sleep 314"), "it did not start"
    parent.kill()
    parent.wait()
    assert _becomes(False, "sleep 314"), f"{pid} lives on"
    parent.stdout.close()


OWNER = (
    "import sys, time\nfrom training.sandbox import choose\nsandbox = choose({backend!r})\n"
    "print('chosen', flush=True)\nsys.stdin.readline()\njob = sandbox.start(['/bin/sleep', '{seconds}'])\n"
    "print('started', flush=True)\nif not sys.stdin.readline(): sys.exit()\n"
    "while True: sandbox.start(['/bin/sleep', '{seconds}']).kill()\n"
)
"""Starts a job when it is told to, and then one after the other."""


def owner(backend: str, seconds: str) -> subprocess.Popen[bytes]:
    """Such a process; `said` and `tell` speak with it."""
    code = OWNER.format(backend=backend, seconds=seconds)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert _said(process) == b"chosen\n"
    return process


def _said(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def _tell(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")


def _killed(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


@real
def test_what_a_killed_process_left_while_it_started_a_job_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Like bubblewrap's child before it dies with its parent: a process of the job that only waits.
    path = shutil.which("bwrap")
    (tmp_path / "bwrap").write_text(
        f'#!/bin/sh\nfor last; do :; done\n[ "${{last%.5}}" = "$last" ] || /bin/sleep "${{last%.5}}.75" &\n'
        f'exec {path} "$@"\n'
    )
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    # Any process may write what it likes into its own environment.
    space = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116
    names = ("", "x", "1:2", "1:2:3:4", f"{space}:../1:5", f"{space}::", f"{space}:999999999:\u0661")
    strange = [subprocess.Popen(["/bin/sleep", "60"], env={"ASI_JOB_OWNER": name}) for name in names]
    dead, alive = owner("bubblewrap", "321.5"), owner("bubblewrap", "322.5")
    try:
        for process in (dead, alive):
            _tell(process)
            assert _said(process) == b"started\n"
        assert all(_becomes(True, f"sleep {seconds}") for seconds in ("321.5", "321.75", "322.5", "322.75"))
        _killed(dead)
        assert _becomes(False, "sleep 321.5") and _becomes(True, "sleep 321.75"), "nobody ends what waits"
        _killed(owner("auto", "323"))
        assert _becomes(False, "sleep 321.75"), "the next process that starts a job does"
        assert _becomes(True, "sleep 322.5") and _becomes(True, "sleep 322.75"), "those of a living process stay"
        assert [process.poll() for process in strange] == [None] * len(strange), "a strange name is nobody's"
    finally:
        for process in strange:
            process.kill()
            process.wait()
        for process in (dead, alive):
            _killed(process)
        _killed(owner("auto", "323"))
    assert _becomes(False, "sleep 322.75")


@real
@pytest.mark.slow
def test_kills_at_random_moments_of_a_start_leave_nothing_after_the_next() -> None:
    for number in range(40):
        process = owner("bubblewrap", "324.5")
        _tell(process)
        _tell(process)
        time.sleep(0.0025 * number)
        _killed(process)
    _killed(owner("bubblewrap", "325"))
    deadline = time.monotonic() + 5
    while left := _of_job("324.5"):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _of_job(words: str) -> list[str]:
    """Processes of a job that sleeps, those that build its sandbox or wait in it among them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if line.endswith(f"sleep {words} "):
                found.append(line[:100])
    return found


def test_the_limited_process_runs_only_what_someone_vouches_for() -> None:
    sandbox = choose("process")
    with pytest.raises(SandboxError) as found:
        sandbox.require(Program("stranger.py", "x = 1"))
    assert "stranger.py" in str(found.value) and "--trust" in found.value.fix and "bubblewrap" in found.value.fix
    for trust in ("seed", "genome", "user"):
        sandbox.require(Program("known.py", "x = 1", trust))


def test_without_bubblewrap_auto_says_why_and_how_to_fix_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox = choose("auto")
    assert sandbox.backend == "process" and "bwrap is not installed" in sandbox.note and "apt-get" in sandbox.note
    with pytest.raises(SandboxError, match="not installed"):
        choose("bubblewrap")
    broken = tmp_path / "bwrap"  # installed, but not working
    broken.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "No permissions to create a new namespace" in choose("auto").note
    with pytest.raises(SandboxError, match="No permissions"):
        choose("bubblewrap")
    with pytest.raises(SandboxError, match="expected auto"):
        choose("chroot")


@real
@pytest.mark.slow
def test_a_start_costs_under_50_ms_beyond_pythons_own() -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "sandbox.py"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    starts = json.loads(done.stdout)["starts"]
    print(f"start cost beyond plain Python's: {starts}")
    # A plain start takes 15 ms where nothing else runs; on a busy machine everything takes longer.
    assert starts["bubblewrap"]["least_beyond_plain_ms"] < max(50, 4 * starts["plain"]["median_ms"])


def _becomes(there: bool, words: str) -> bool:
    """Whether a process with these words is (not) there within 15 seconds."""
    deadline = time.monotonic() + 15
    while any(words in line for line in _processes()) != there:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _processes() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
            except OSError:
                continue
    # Command lines of sh and of this test's own jobs also hold the words.
    return [line for line in found if line.startswith(("sleep", "/bin/sleep"))]


@real
def test_a_file_that_only_its_owner_may_read_is_readable_when_it_is_named(tmp_path: Path) -> None:
    private = tmp_path / "private.txt"
    private.write_text("words")
    private.chmod(0o600)
    said, _ = run(["/bin/cat", str(private)], reads=[private])
    assert said == "words"


@real
def test_what_only_root_may_read_is_read_as_a_copy_and_never_as_root(tmp_path: Path) -> None:
    private = tmp_path / "private"
    (private / "below").mkdir(parents=True)
    (private / "below" / "file").write_text("words")
    for path, mode in ((private / "below" / "file", 0o600), (private / "below", 0o700), (private, 0o700)):
        path.chmod(mode)
    said, _ = python(
        f"import os; print(open({str(private / 'below' / 'file')!r}).read(), os.getuid())", reads=[private]
    )
    word, uid = said.split()
    assert word == "words" and int(uid) != 0
    assert (private / "below" / "file").stat().st_mode & 0o777 == 0o600


def test_the_limited_process_leaves_no_daemon_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    daemon = (
        "import os, time\nopen(os.environ['TMPDIR'] + '/left', 'w').write(os.environ['HOME'])\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.closerange(0, 3)\n"
        "        os.execv('/bin/sleep', ['sleep', '319'])\n    os._exit(0)\n"
    )
    assert python(daemon, sandbox=choose("process"))[1].ending() == "finished"
    assert not [line for line in _processes() if "sleep 319" in line]
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_host_that_was_killed_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import tempfile, time\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "from training.sandbox import choose\n"
        "job = choose('process').start(['/bin/sleep', '320'])\nprint('started', flush=True)\ntime.sleep(60)\n"
    )
    for _ in range(2):
        parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert parent.stdout is not None and parent.stdout.readline()
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert len(list(tmp_path.iterdir())) == 1
