"""The command of each container as a plain process: with its environment from the compose files, the files that the
Dockerfile copies, and (for both services) only the packages that the Dockerfile installs. Each becomes ready by its own
health check and stops on SIGTERM.

Rewritten are only names that exist in a network of containers, ports, and paths of volumes. In place of MongoDB stands
a MongoDB-wire server that asks for the password, in place of OpenSearch a real node. No image is built here.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pymongo
import pytest
from pymongo.errors import OperationFailure

from common.process import spawn, terminate
from tests.bring_up.compose import environment, example, filled, lay_out, link_packages, services, stages
from tests.database.db_service import body_of
from tests.fixtures_services import CACHE, clean_environment
from tests.services.opensearch.node import free_port, opensearch_node

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

SERVICES = services()
SECRETS = {name: f"secret{number}" for number, (name, value) in enumerate(example().items()) if not value}
KNOWN = {**example(), **SECRETS}
STOP_SECONDS = 15.0


@dataclass
class Container:
    """A container's command while it runs as a process."""

    name: str
    process: subprocess.Popen[bytes]
    app: Path
    env: dict[str, str]
    rewrite: Mapping[str, str]
    log: Path

    def healthy(self) -> bool:
        kind, *words = rewritten(filled(SERVICES[self.name]["healthcheck"]["test"], KNOWN), self.rewrite)
        argv = ["/bin/sh", "-c", *words] if kind == "CMD-SHELL" else [outside(words[0]), *words[1:]]
        done = subprocess.run(argv, env=self.env, cwd=self.app, capture_output=True, timeout=30, check=False)
        return done.returncode == 0

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.healthy():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"{self.name} is not ready: {self.log.read_text()[-3000:]}"
            time.sleep(0.3)

    def stop(self) -> int:
        """Its exit status after SIGTERM; a failure where it takes longer than compose gives it."""
        grace = float(SERVICES[self.name]["stop_grace_period"].removesuffix("s"))
        self.process.terminate()
        return self.process.wait(min(grace, STOP_SECONDS))


def rewritten(value: list[str], rewrite: Mapping[str, str]) -> list[str]:
    def one(text: str) -> str:
        for before, after in rewrite.items():
            text = re.sub(before, after, text)
        return text

    return [one(text) for text in value]


def outside(command: str) -> str:
    return sys.executable if command == "python" else command


@contextlib.contextmanager
def container(
    name: str, folder: Path, rewrite: Mapping[str, str], *, image_packages: bool = True
) -> Iterator[Container]:
    """Starts the container's command in `folder`. `rewrite` maps patterns to what stands for them on this machine."""
    stage = stages()[SERVICES[name]["build"]["target"]]
    app = lay_out(stage, folder / "app")
    given = environment(SERVICES[name], KNOWN)
    env = clean_environment(dict(zip(given, rewritten(list(given.values()), rewrite), strict=True)))
    env.pop("PYTHONPATH", None)
    command = SERVICES[name]["command"]
    interpreter = sys.executable
    if image_packages:
        env["PYTHONPATH"] = str(link_packages(stage.packages, folder / "packages"))
        interpreter = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}")
    log = folder / "log"
    with log.open("wb") as out:
        process = spawn([interpreter, str(app / command[1]), *command[2:]], env=env, stdout=out, stderr=out)
        running = Container(name, process, app, env, rewrite, log)
        try:
            yield running
        finally:
            terminate(process)


@pytest.fixture(scope="module")
def mongodb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a server that has the user of the compose file and lets nobody else in."""
    folder = tmp_path_factory.mktemp("mongodb")
    given = environment(SERVICES["mongodb"], KNOWN)
    user, password = given["MONGO_INITDB_ROOT_USERNAME"], given["MONGO_INITDB_ROOT_PASSWORD"]
    port = free_port()
    binary = str(Path(sys.executable).parent / "secantusd-py")
    argv = [binary, "--host", "127.0.0.1", "--port", str(port), "--storage-path", str(folder / "data")]
    for more in ([], ["--auth"]):
        with (folder / "log").open("ab") as log:
            server = subprocess.Popen([*argv, "--standalone", *more], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
            if more:
                yield f"127.0.0.1:{port}"
            else:
                with pymongo.MongoClient(f"mongodb://127.0.0.1:{port}") as client:
                    client.admin.command("createUser", user, pwd=password, roles=["root"])
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def database(mongodb: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    port = str(free_port())
    rewrite = {r"\bmongodb:27017": mongodb, r"^8001$|(?<=127\.0\.0\.1:)8001": port, r"^0\.0\.0\.0$": "127.0.0.1"}
    with container("database", tmp_path_factory.mktemp("database"), rewrite) as running:
        running.wait(90)
        yield running


@pytest.fixture(scope="module")
def opensearch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with opensearch_node(tmp_path_factory.mktemp("opensearch") / "home") as url:
        yield url.removeprefix("http://")


@pytest.fixture(scope="module")
def cognition(opensearch: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    rewrite = {
        r"\bopensearch:9200": opensearch,
        r"^13142$|(?<=127\.0\.0\.1:)13142": str(free_port()),
        r"^0\.0\.0\.0$": "127.0.0.1",
        r"^/cache/cognition$": str(CACHE / "cognition"),
    }
    with container("cognition", tmp_path_factory.mktemp("cognition"), rewrite) as running:
        running.wait(300)
        yield running


def url_of(running: Container) -> str:
    port = next(value for name, value in running.env.items() if name.endswith("__PORT"))
    return f"http://127.0.0.1:{port}"


def test_mongodb_lets_only_the_compose_user_in(mongodb: str) -> None:
    store = environment(SERVICES["database"], KNOWN)["ASI_DATABASE__STORE"]
    with pymongo.MongoClient(store.replace("mongodb:27017", mongodb)) as client:
        assert client.get_default_database("x").name == "myapp"
        client["myapp"]["asi_try"].insert_one({"here": True})
    for other in (f"mongodb://{mongodb}", store.replace("secret", "guess").replace("mongodb:27017", mongodb)):
        with pymongo.MongoClient(other) as client, pytest.raises(OperationFailure):
            client["myapp"]["asi_try"].find_one()


def test_opensearch_is_ready_by_its_own_health_check(opensearch: str) -> None:
    _, *words = SERVICES["opensearch"]["healthcheck"]["test"]
    argv = rewritten(words, {r"127\.0\.0\.1:9200": opensearch})
    assert subprocess.run(argv, capture_output=True, timeout=30, check=False).returncode == 0
    closed = rewritten(words, {r"127\.0\.0\.1:9200": f"127.0.0.1:{free_port()}"})
    assert subprocess.run(closed, capture_output=True, timeout=30, check=False).returncode != 0


def test_the_database_stores_in_mongodb(database: Container, mongodb: str) -> None:
    key = {"Authorization": f"Bearer {KNOWN['ASI_DATABASE__API_KEY']}"}
    assert httpx.get(f"{url_of(database)}/stats", trust_env=False).status_code == 401
    stats = httpx.get(f"{url_of(database)}/stats", headers=key, trust_env=False).json()
    assert (stats["database_name"], stats["collection_name"]) == ("myapp", "data_elements")
    body = body_of("delta_net_1")
    added = httpx.post(f"{url_of(database)}/elements", json=body, headers=key, timeout=90, trust_env=False)
    assert added.status_code == 200, database.log.read_text()[-2000:]
    query = {"motivation": "motivation of delta_net_1"}
    deadline = time.monotonic() + 90  # its embedding server and the vector index start, too
    similar = f"{url_of(database)}/elements/search-similar"
    while not (found := httpx.get(similar, params=query, headers=key, timeout=90, trust_env=False).json()):
        assert time.monotonic() < deadline, database.log.read_text()[-2000:]
        time.sleep(0.5)
    assert [element["name"] for element in found] == ["delta_net_1"], database.log.read_text()[-2000:]


def test_the_cognition_base_answers_from_opensearch(cognition: Container) -> None:
    query = {"query": "training loss is fine but recall of names from far back is poor", "similarity_threshold": 0}
    answer = httpx.post(f"{url_of(cognition)}/search", json=query, timeout=90, trust_env=False)
    assert answer.status_code == 200 and answer.json()["total_results"] > 0, cognition.log.read_text()[-2000:]


def test_the_loop_starts_on_both_and_all_stop_on_sigterm(
    database: Container, cognition: Container, tmp_path: Path
) -> None:
    """Last in the file: it stops what the tests above share."""
    rewrite = {
        r"^http://database:8001$": url_of(database),
        r"^http://cognition:13142$": url_of(cognition),
        r"(^|(?<=\s|\())/(runs|cache)/": f"{tmp_path}/\\2/",
    }
    with container("pipeline", tmp_path, rewrite, image_packages=False) as loop:
        assert not loop.healthy()
        loop.wait(90)
        time.sleep(3)
        assert loop.process.poll() is None and loop.healthy(), loop.log.read_text()[-3000:]
        assert loop.stop() == 0, loop.log.read_text()[-3000:]
        assert "Stopped" in loop.log.read_text() and not loop.healthy()
    for running in (database, cognition):
        assert running.healthy()
        assert running.stop() == 0, running.log.read_text()[-3000:]
        assert not running.healthy()
        assert "Traceback" not in running.log.read_text(), running.log.read_text()[-3000:]
    assert (tmp_path / "runs/default/run.json").is_file()  # in the volume
