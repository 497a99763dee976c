"""A small Docker daemon for tests: the part of the Engine API that the docker backend speaks, over a unix socket.

Real in it: HTTP, the hijacked connection with its frames, processes, signals, exit codes. Its containers are plain
processes of this machine, so it contains nothing: what a real daemon does with the configuration is not tested here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

__all__ = ["Daemon", "Made", "serve"]


@dataclass
class Made:
    """One container."""

    config: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None
    stream: Any = None
    out_of_memory: bool = False
    gone: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Daemon:
    """What the handler serves.

    Attributes:
        python: what stands for the image's interpreter.
        images: names that exist.
        history: the configuration of every container ever made.
    """

    address: str
    python: str = sys.executable
    images: tuple[str, ...] = ("asi-arch-worker",)
    image_env: tuple[str, ...] = ("PATH=/usr/local/bin:/usr/bin:/bin", "IMAGE_SECRET=hunter2")
    containers: dict[str, Made] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    out_of_memory: bool = False


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    facts: Daemon


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, status: int, body: object = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length") or 0)
        return json.loads(self.rfile.read(length)) if length else {}

    def _route(self) -> tuple[list[str], dict[str, list[str]]]:
        parsed = urlparse(self.path)
        parts = [part for part in parsed.path.split("/") if part]
        return (parts[1:] if parts[0].startswith("v1.") else parts), parse_qs(parsed.query)

    def _container(self, name: str) -> Made | None:
        found = self.server.facts.containers.get(name)
        if found is None:
            self._answer(404, {"message": f"No such container: {name}"})
        return found

    def do_GET(self) -> None:
        parts, query = self._route()
        facts = self.server.facts
        if parts == ["_ping"]:
            return self._answer(200, "OK")
        if parts == ["containers", "json"]:
            wanted = json.loads(query["filters"][0])["label"][0].split("=", 1)
            rows = [
                {"Id": name}
                for name, made in facts.containers.items()
                if made.config["Labels"].get(wanted[0]) == wanted[1]
            ]
            return self._answer(200, rows)
        made = self._container(parts[1])
        if made is None:
            return None
        if parts[2] == "json":
            return self._answer(200, {"Id": parts[1], "State": {"OOMKilled": made.out_of_memory}})
        used = 0
        if made.process is not None:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{made.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
                used = sum(map(int, fields[11:15])) * (10**9 // os.sysconf("SC_CLK_TCK"))
        stats = {"cpu_stats": {"cpu_usage": {"total_usage": used}}, "memory_stats": {}, "pids_stats": {"current": 1}}
        return self._answer(200, stats)

    def do_DELETE(self) -> None:
        parts, _ = self._route()
        made = self._container(parts[1])
        if made is not None:
            _kill(made)
            self.server.facts.containers.pop(parts[1], None)
            self._answer(204)

    def do_POST(self) -> None:
        parts, _ = self._route()
        facts = self.server.facts
        body = self._body()
        if parts == ["containers", "create"]:
            if body["Image"] not in facts.images:
                return self._answer(404, {"message": f"No such image: {body['Image']}:latest"})
            name = os.urandom(32).hex()
            facts.containers[name] = Made(body, out_of_memory=facts.out_of_memory)
            facts.history.append(body)
            return self._answer(201, {"Id": name, "Warnings": []})
        made = self._container(parts[1])
        if made is None:
            return None
        if parts[2] == "attach":
            return self._attach(made)
        if parts[2] == "start":
            _start(made, facts)
            return self._answer(204)
        if parts[2] == "kill":
            if made.process is None or made.process.poll() is not None:
                return self._answer(409, {"message": "Container is not running"})
            _kill(made)
            return self._answer(204)
        assert parts[2] == "wait" and made.process is not None
        code = made.process.wait()
        return self._answer(200, {"StatusCode": code if code >= 0 else 128 - code})

    def _attach(self, made: Made) -> None:
        self.wfile.write(
            b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\n"
            b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
        )
        self.wfile.flush()
        made.stream = self.connection
        self.close_connection = True
        while made.process is None and not made.gone.is_set():
            time.sleep(0.002)
        if made.process is not None:
            assert made.process.stdin is not None
            with contextlib.suppress(OSError):
                while part := self.connection.recv(1 << 16):
                    made.process.stdin.write(part)
            with contextlib.suppress(OSError):
                made.process.stdin.close()
        made.gone.wait(60)


def _start(made: Made, facts: Daemon) -> None:
    """Its process, with the environment of the image and then of the configuration, as a daemon merges them."""
    environment = dict(pair.split("=", 1) for pair in (*facts.image_env, *made.config["Env"]))
    line = [*made.config["Entrypoint"], *made.config["Cmd"]]
    made.process = subprocess.Popen(
        [facts.python if part == "/usr/local/bin/python" else part for part in line],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        cwd="/",
        start_new_session=True,
    )
    pumps = [
        threading.Thread(target=_pump, args=(made, number, pipe), daemon=True)
        for number, pipe in ((1, made.process.stdout), (2, made.process.stderr))
    ]
    for pump in pumps:
        pump.start()
    threading.Thread(target=_finish, args=(made, pumps), daemon=True).start()


def _pump(made: Made, number: int, pipe: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        while part := pipe.read(32768):
            with made.lock:
                made.stream.sendall(struct.pack(">BxxxL", number, len(part)) + part)


def _finish(made: Made, pumps: list[threading.Thread]) -> None:
    for pump in pumps:
        pump.join()
    assert made.process is not None
    made.process.wait()
    for pipe in (made.process.stdout, made.process.stderr):
        assert pipe is not None
        pipe.close()
    with contextlib.suppress(OSError):  # the attached stream ends with the container
        made.stream.shutdown(socket.SHUT_RDWR)
    made.gone.set()


def _kill(made: Made) -> None:
    if made.process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(made.process.pid, signal.SIGKILL)
    else:
        made.gone.set()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Daemon]:
    """A daemon that answers at unix://`folder`/docker.sock until the end of the block."""
    server = _Server(str(folder / "docker.sock"), _Handler)
    server.facts = Daemon(f"unix://{folder / 'docker.sock'}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.facts
    finally:
        for made in list(server.facts.containers.values()):
            _kill(made)
        server.shutdown()
        server.server_close()
        thread.join()
