"""database/start_api.sh: from any folder, over the store that is configured, ended by the signal that reaches it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pymongo
import pytest

from common.process import LISTENING
from tests.bring_up.compose import lay_out, stages
from tests.database.db_service import mongodb_server
from tests.fixtures_services import clean_environment

MARK = "over MongoDB, since MONGODB_PASSWORD is set"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout of its own, so that its database.sqlite and .env are, too."""
    return lay_out(stages()["database"], tmp_path / "a checkout")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Runs a checkout's script from another folder; python3 is the interpreter of the tests."""
    started: list[subprocess.Popen[str]] = []
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def begin(root: Path, *arguments: str, path: str = "/usr/bin:/bin", **variables: str) -> subprocess.Popen[str]:
        tools = tmp_path / "tools"
        if not tools.exists():
            tools.mkdir()
            (tools / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            (tools / "python3").chmod(0o755)
        process = subprocess.Popen(
            [str(root / "database/start_api.sh"), *arguments],
            cwd=elsewhere,
            env=clean_environment({**variables, "PATH": f"{tools}:{path}"}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith(LISTENING), f"{line!r} {process.stderr.read()[-2000:]}"
    return line.removeprefix(LISTENING).strip()


def test_it_serves_the_repository_s_file_from_any_folder_and_ends_on_sigterm(root: Path, start: Start) -> None:
    process = start(root, "--port", "0")
    url = url_of(process)
    assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
    assert (root / "database.sqlite").exists()
    assert b"mongodb_api.py" in Path(f"/proc/{process.pid}/cmdline").read_bytes()  # the shell has become the server
    process.terminate()
    assert process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)


@pytest.mark.parametrize(
    ("arguments", "env_file", "told"),
    [
        (["--mongodb"], None, "expected MONGODB_PASSWORD in"),
        (["--mongodb"], "MONGODB_PASSWORD=\n", "cp .env.example .env"),
        (["--mongodb"], "MONGODB_PASSWORD=a/b\n", "of letters and digits"),
        (["--mongodb"], "MONGODB_PASSWORD=abc\nMONGODB_PORT={port}\n", "nothing listens on port {port}"),
        ([], "MONGODB_PASSWORD=abc\nMONGODB_PORT={port}\n", MARK),
        (["--port", "x"], None, "expected a valid integer"),
    ],
)
def test_what_cannot_start_says_what_to_do(
    root: Path, start: Start, arguments: list[str], env_file: str | None, told: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if env_file is not None:
        (root / ".env").write_text(env_file.format(port=port))
    process = start(root, *arguments)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2, said
    assert told.format(port=port) in said and "fix:" in said


def test_a_store_that_is_named_wins_over_a_configured_mongodb_and_ctrl_c_ends_it(
    root: Path, start: Start, tmp_path: Path
) -> None:
    (root / ".env").write_text("MONGODB_PASSWORD=abc\n")
    file = tmp_path / "mine.sqlite"
    process = start(root, "--port", "0", ASI_DATABASE__STORE=f"sqlite:///{file}")
    url_of(process)
    process.send_signal(signal.SIGINT)
    assert MARK not in process.communicate(timeout=20)[1] and file.exists()
    assert process.returncode == 0


@pytest.mark.services
def test_it_uses_the_mongodb_that_answers_on_the_configured_port(root: Path, start: Start) -> None:
    with mongodb_server() as server:
        with pymongo.MongoClient(server) as client:
            client.admin.command("createUser", "asi", pwd="secret1", roles=["root"])
        (root / ".env").write_text(f"MONGODB_PASSWORD=secret1\nMONGODB_PORT={server.rsplit(':', 1)[1]}\n")
        process = start(root, "--port", "0")
        url = url_of(process)
        assert httpx.get(f"{url}/stats", trust_env=False).json()["database_name"] == "myapp"
        assert not (root / "database.sqlite").exists()
        process.terminate()
        assert process.wait(20) == 0


def test_docker_compose_starts_a_mongodb_that_is_not_there(root: Path, start: Start, tmp_path: Path) -> None:
    """Only what is asked of docker: the double writes its arguments down and starts nothing."""
    tools = tmp_path / "docker-double"
    tools.mkdir()
    (tools / "docker").write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/asked"\n[ "$2" = version ] || exit 7\n')
    (tools / "docker").chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (root / ".env").write_text(f"MONGODB_PASSWORD=abc\nMONGODB_PORT={port}\n")
    process = start(root, "--mongodb", path=f"{tools}{os.pathsep}/usr/bin:/bin")
    process.communicate(timeout=60)
    assert process.returncode == 7  # set -e: without the store there is no server
    assert (tmp_path / "asked").read_text().splitlines() == [
        "compose version",
        f"compose --env-file {root}/.env -f {root}/database/docker-compose.yml up --detach --wait mongodb",
    ]
