"""The docker backend: one container a job, made and driven through the Docker Engine API with the `docker` package.

A container has no network, a read-only root, no capabilities and no way to get any, a uid of its own, limits on
memory, processes and CPU, and folders of memory for what it writes. Docker's default system call list applies. Its
three streams come over one hijacked connection as frames, which are taken apart here, so that a job looks the same as
one of bubblewrap: three pipes. A guard process removes the containers of a host process that was killed, since the
daemon would let them run on.

What it does not cover beyond what training/sandbox.py says: whoever may talk to the daemon is root on its machine, so
the daemon is trusted; the image is trusted to hold what the Dockerfile puts there (the probe job compares the
versions and looks for held-out packages); without root the job has the uid of whoever started it where it reads
private files or writes a folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from common.errors import SandboxError
from training.docker_config import API, LABEL, Job, container_config, fix
from training.usage import Usage

if TYPE_CHECKING:
    from docker import APIClient

__all__ = ["Container", "Daemon", "connect"]


def connect() -> Daemon:
    """The daemon that DOCKER_HOST or the current context names, seen answering.

    Raises:
        SandboxError: the docker package is missing, or no daemon answers.
    """
    try:
        import docker
        from docker.errors import DockerException
    except ImportError as error:
        raise SandboxError(
            "docker does not work here: the docker package is not installed", "run `make setup`"
        ) from error
    try:
        client = docker.from_env(version=API, timeout=60).api
        client.ping()
    except (DockerException, OSError) as error:
        where = os.environ.get("DOCKER_HOST") or "its default socket"
        raise SandboxError(
            f"docker does not work here: no Docker daemon answers at {where}: {str(error)[:200]}",
            "start it (`systemctl start docker`), or name another with DOCKER_HOST=unix:///path/to/docker.sock; your "
            "user must be in the group `docker`",
        ) from error
    return Daemon(client)


class Daemon:
    """A Docker daemon that answers. Its containers end with this process, however that ends."""

    def __init__(self, client: APIClient) -> None:
        self._client, self._owner = client, secrets.token_hex(16)
        self._guard: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self, job: Job) -> Container:
        """Creates the container, attaches to its streams and starts it.

        Raises:
            SandboxError: the daemon refuses, or there is no such image.
        """
        from docker.errors import DockerException, ImageNotFound

        name = ""
        try:
            with self._lock:
                if self._guard is None or self._guard.poll() is not None:
                    self._guard = _start_guard(self._owner)
            name = self._client.create_container_from_config(container_config(job, self._owner))["Id"]
            stream = self._client.attach_socket(name, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            container = Container(self._client, name, stream, job.copies)
            self._client.start(name)
        except (DockerException, OSError) as error:
            if job.copies is not None:
                shutil.rmtree(job.copies, ignore_errors=True)
            if name:
                with contextlib.suppress(DockerException, OSError):
                    self._client.remove_container(name, v=True, force=True)
            if isinstance(error, ImageNotFound):
                raise SandboxError(f"there is no image {job.image}", fix(job.image)) from error
            raise SandboxError(f"the Docker daemon cannot start a job: {str(error)[:300]}", fix(job.image)) from error
        return container


class Container:
    """The handle of a job that is a container; see `training.sandbox_job.Handle`."""

    def __init__(self, client: APIClient, name: str, stream: Any, copies: Path | None = None) -> None:
        self._client, self._name, self._stream, self._copies = client, name, stream, copies
        self._socket = _socket(stream)
        self._socket.settimeout(None)
        self.pid = 0
        self._starved, self._killed, self._stopped = False, False, threading.Event()
        self._read_at, self._last = 0.0, Usage()
        self.stdin, to_feed = _pipe("w")
        self.stdout, out = _pipe("r")
        self.stderr, errors = _pipe("r")
        self._feeder = threading.Thread(target=self._feed, args=(to_feed,), name="docker-stdin", daemon=True)
        self._spreader = threading.Thread(
            target=self._spread, args=({1: out, 2: errors},), name="docker-output", daemon=True
        )
        self._feeder.start()
        self._spreader.start()

    def wait(self) -> int:
        from docker.errors import APIError, DockerException
        from requests.exceptions import RequestException

        failures, code = 0, -int(signal.SIGKILL)
        while failures < 20:  # then the daemon is gone, and what it ran with it or out of our reach
            try:
                code = int(self._client.wait(self._name, timeout=3600)["StatusCode"])
                break
            except APIError as error:
                if error.status_code == 404:  # the guard, or a person, removed it
                    break
                failures += 1
            except (RequestException, DockerException, OSError):
                failures += 1
            time.sleep(0.25)
        self._stopped.set()
        return code

    def kill(self) -> None:
        from docker.errors import APIError, DockerException
        from requests.exceptions import RequestException

        if self._stopped.is_set():
            return
        self._killed = True
        # It may have ended just now; where the daemon was too busy, the next look of the host tries again.
        with contextlib.suppress(APIError, DockerException, RequestException, OSError):
            self._client.kill(self._name, int(signal.SIGKILL))

    def usage(self, most: int) -> Usage:
        """CPU time, memory and tasks as the daemon counts them, asked once a second."""
        from docker.errors import DockerException
        from requests.exceptions import RequestException

        if time.monotonic() - self._read_at >= 1:
            self._read_at = time.monotonic()
            with contextlib.suppress(DockerException, RequestException, OSError, KeyError, TypeError, ValueError):
                facts = self._client.stats(self._name, stream=False, one_shot=True)
                self._last = Usage(
                    seconds=int(facts["cpu_stats"]["cpu_usage"]["total_usage"]) / 1e9,
                    held=int(facts["memory_stats"].get("usage", 0)),
                    tasks=int(facts.get("pids_stats", {}).get("current", 0)),
                )
        # The kernel limits memory and tasks of the container; the host looks at its time only.
        return Usage(self._last.seconds)

    def scratch(self, pids: tuple[int, ...], enough: int) -> list[tuple[int, int]]:
        return []  # sizes and numbers of files are limits of its mounts

    def starved(self) -> bool:
        return self._starved

    def clean(self) -> None:
        from docker.errors import DockerException
        from requests.exceptions import RequestException

        with contextlib.suppress(DockerException, RequestException, OSError, KeyError):
            self._starved = bool(self._client.inspect_container(self._name)["State"].get("OOMKilled"))
        if not self._killed:
            self._spreader.join(2)  # what it wrote at the end may still be on the way
        with contextlib.suppress(DockerException, RequestException, OSError):
            self._client.remove_container(self._name, v=True, force=True)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._copies is not None:
            shutil.rmtree(self._copies, ignore_errors=True)

    def _feed(self, source: IO[bytes]) -> None:
        """From our pipe to its standard input; the end of the one is the end of the other."""
        with source, contextlib.suppress(OSError):
            while part := os.read(source.fileno(), 1 << 16):
                self._socket.sendall(part)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def _spread(self, targets: dict[int, IO[bytes]]) -> None:
        """From the framed stream to our pipes. A pipe that nobody reads any more is skipped."""
        broken: set[int] = set()
        try:
            for number, part in frames(self._socket):
                if number in targets and number not in broken:
                    view = memoryview(part)
                    try:
                        while view:
                            view = view[os.write(targets[number].fileno(), view) :]
                    except OSError:
                        broken.add(number)
        finally:
            for pipe in targets.values():
                pipe.close()
            with contextlib.suppress(OSError):
                self._stream.close()


def frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """The parts of an attached stream: (1 for standard output or 2 for standard error, bytes), at most 1 MB at a time.

    A frame is a byte with the number, three zero bytes, the length in four bytes (big-endian), and the bytes
    (Docker Engine API, "Attach to a container"). Ends with the stream, also in the middle of a frame.
    """
    header = bytearray()
    while True:
        try:
            part = connection.recv(8 - len(header))
        except OSError:
            return
        if not part:
            return
        header += part
        if len(header) < 8:
            continue
        number, left = struct.unpack(">BxxxL", header)
        header.clear()
        while left:
            try:
                part = connection.recv(min(left, 1 << 20))
            except OSError:
                return
            if not part:
                return
            left -= len(part)
            yield number, part


def _socket(stream: Any) -> socket.socket:
    """The socket below what the package returns: a reader over a unix or TCP socket, or with TLS the socket itself."""
    return stream if hasattr(stream, "recv") else stream._sock


def _pipe(ours: str) -> tuple[IO[bytes], IO[bytes]]:
    """(our end, the other end) of a new pipe; `ours` is "r" or "w"."""
    read, write = os.pipe()
    reader, writer = os.fdopen(read, "rb", 0), os.fdopen(write, "wb", 0)
    return (reader, writer) if ours == "r" else (writer, reader)


def _start_guard(owner: str) -> subprocess.Popen[bytes]:
    """A process that removes all containers of `owner` when this one is gone, however it went: its input ends then."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), owner],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def guard(owner: str) -> None:
    """Waits for the end of standard input, then removes the containers of `owner`, twice, since one may just start."""
    import docker
    from docker.errors import DockerException

    while os.read(0, 4096):
        pass
    client = docker.from_env(version=API, timeout=60).api
    for _ in range(2):
        for found in client.containers(all=True, filters={"label": f"{LABEL}={owner}"}):
            with contextlib.suppress(DockerException, OSError):
                client.remove_container(found["Id"], v=True, force=True)
        time.sleep(0.5)


if __name__ == "__main__":
    guard(sys.argv[1])
