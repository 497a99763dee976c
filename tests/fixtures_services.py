"""Session fixtures: one embedding server and one cognition base for all tests of a session.

tests/conftest.py makes them known; a run of a single folder can name the module with `-p tests.fixtures_services`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.embeddings import EmbeddingClient
from common.process import LISTENING, REPOSITORY, spawn, terminate
from common.settings import Settings

CACHE = REPOSITORY / ".cache" / "tests"


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of ours, one thread for numeric libraries, and `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ASI_")}
    return kept | {"OMP_NUM_THREADS": "1"} | dict(extra or {})


@contextmanager
def running(
    argv: Sequence[str], env: Mapping[str, str] | None = None, seconds: float = 120.0
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A service of ours as a real process: (its URL, the process) once it says where it listens."""
    process = spawn([sys.executable, *argv], env=clean_environment(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stderr is not None
        deadline = time.monotonic() + seconds
        line = process.stdout.readline().decode()
        assert line.startswith(LISTENING), f"{argv} said {line!r}: {process.stderr.read().decode()[-2000:]}"
        assert time.monotonic() < deadline, f"{argv} needed more than {seconds} s to start"
        yield line.removeprefix(LISTENING).strip(), process
    finally:
        terminate(process)


@pytest.fixture(scope="session")
def embedding_client() -> Iterator[EmbeddingClient]:
    """A client whose server all tests of the session share."""
    with EmbeddingClient(Settings()) as client:
        yield client


@pytest.fixture(scope="session")
def embedding_url(embedding_client: EmbeddingClient) -> str:
    """Address of the shared embedding server."""
    return embedding_client.start()


@pytest.fixture(scope="session")
def cognition_url(embedding_url: str) -> Iterator[str]:
    """Address of a cognition base over the shipped corpus; vectors are kept in .cache between sessions."""
    script = str(Path(REPOSITORY) / "cognition_base" / "rag_api.py")
    env = {"ASI_SERVICES__EMBEDDING_URL": embedding_url, "ASI_COGNITION__INDEX_DIR": str(CACHE / "cognition")}
    with running([script, "--port", "0"], env) as (url, _):
        yield url
