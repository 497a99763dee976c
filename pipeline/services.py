"""The two HTTP services, embedded: started as child processes on free loopback ports, restarted if they die, stopped
at the end.

With URLs configured nothing is started and those are used: one code path either way, since the loop speaks HTTP to
both.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

import httpx

from common.embeddings import EmbeddingClient
from common.errors import ServiceError, UsageError
from common.process import LISTENING, REPOSITORY, spawn, terminate
from common.settings import Settings, flags_of
from database.client import DatabaseClient
from pipeline.console import Console
from training.profiles import Profile

__all__ = ["Services", "note_other_constants", "refuse_contradictions", "resilient"]

T = TypeVar("T")
START_SECONDS = 120.0
"""Longest start that is waited for: a cold import on a busy laptop takes tens of seconds."""


class Child:
    """One service process: started, watched, and started again on the same port when it dies."""

    def __init__(self, name: str, argv: list[str], port: int, env: Mapping[str, str], log: Path) -> None:
        self.name, self.argv, self.env, self.log = name, argv, env, log
        self._port = port
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._words: deque[str] = deque(maxlen=8)

    def start(self) -> None:
        """Starts the process and waits until it says where it listens.

        Raises:
            ServiceError: it ended or stayed silent; with the last lines of its log.
        """
        port = self.url.rsplit(":", 1)[1] if self.url else str(self._port)
        process = spawn(
            [sys.executable, *self.argv, "--port", port],
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._process = process
        lines: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=self._pump, args=(process, lines), daemon=True).start()
        keeper = threading.Thread(target=self._keep, args=(process,), daemon=True)
        keeper.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._closing.is_set():
            try:
                self.url = lines.get(timeout=0.2).removeprefix(LISTENING).strip()
                return
            except Empty:
                if process.poll() is not None or time.monotonic() > deadline:
                    terminate(process)
                    keeper.join(2)
                    said, _, fix = "".join(self._words).rstrip().partition("\n  fix: ")
                    raise ServiceError(
                        f"the {self.name} did not start (exit status {process.returncode}):\n{said}",
                        fix or f"see {self.log}",
                    ) from None

    def _pump(self, process: subprocess.Popen[bytes], lines: SimpleQueue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace")
            if text.startswith(LISTENING):
                lines.put(text)

    def _keep(self, process: subprocess.Popen[bytes]) -> None:
        """Copies what the service says to its log, and remembers the last lines: a full disk may refuse them."""
        assert process.stderr is not None
        for line in process.stderr:
            self._words.append(line.decode(errors="replace"))
            with contextlib.suppress(OSError), self.log.open("ab") as log:
                log.write(line)

    def watch(self) -> None:
        """Keeps the service alive until `close`: a killed service comes back on its port, its data is in the store."""

        def loop() -> None:
            while not self._closing.wait(0.5):
                process = self._process
                if process is not None and process.poll() is not None:
                    with self._lock:
                        if not self._closing.is_set():
                            try:
                                self.start()
                            except ServiceError as error:
                                with contextlib.suppress(OSError), self.log.open("a") as log:
                                    log.write(f"restart failed: {error}\n")

        threading.Thread(target=loop, name=f"watch {self.name}", daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        with self._lock:
            if self._process is not None:
                terminate(self._process)


class Services:
    """Both services and the embedding server, started or merely reached.

    Attributes:
        database_url, cognition_url: where they answer.
    """

    def __init__(self, settings: Settings, profile: Profile, database_file: Path, logs: Path) -> None:
        self._settings = settings
        self._profile = profile
        self._database_file = database_file
        self._logs = logs
        self._children: list[Child] = []
        self._embedding: EmbeddingClient | None = None
        self.database_url = settings.services.database_url or ""
        self.cognition_url = settings.services.cognition_url or ""

    def start(self) -> None:
        """Starts what is not configured and checks that all of it answers.

        Raises:
            ServiceError: a service does not start, or a configured one does not answer.
        """
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def start_database(self) -> None:
        """Starts, or reaches, the architecture database alone: enough to ask what is stored.

        Raises:
            ServiceError: it does not start, or does not answer.
        """
        if self.database_url:
            self._require("architecture database", self.database_url)
            return
        child = self._database({})
        self._children = [child]
        child.start()
        self.database_url = child.url

    def _start(self) -> None:
        jobs: list[tuple[str, Child]] = []
        for name, url in (("architecture database", self.database_url), ("cognition base", self.cognition_url)):
            if url:
                self._require(name, url)
        if not (self.database_url and self.cognition_url):
            self._embedding = EmbeddingClient(self._settings)
            env = {"ASI_SERVICES__EMBEDDING_URL": self._embedding.start()}
            if not self.database_url:
                jobs.append(("database_url", self._database(env)))
            if not self.cognition_url:
                jobs.append(("cognition_url", self._cognition(env)))
        self._children = [child for _, child in jobs]
        with ThreadPoolExecutor(len(jobs) or 1) as together:
            for started in [together.submit(child.start) for child in self._children]:
                started.result()
        for attribute, child in jobs:
            setattr(self, attribute, child.url)
            child.watch()

    def database_client(self) -> DatabaseClient:
        """A client of the database in use, with the key that it asks for. Valid once that was started or reached."""
        services = self._settings.services
        key = services.database_key if services.database_url else self._settings.database.api_key
        secret = None if key is None else key.get_secret_value()
        return DatabaseClient(self.database_url, services.timeout, secret)

    @property
    def _embedding_flags(self) -> list[str]:
        return flags_of(self._settings.embedding, "embedding")

    def _database(self, env: Mapping[str, str]) -> Child:
        given, search = self._settings.database, self._profile.search
        argv = [
            str(REPOSITORY / "database/mongodb_api.py"),
            *flags_of(given, "database", ("port", "store")),
            *self._embedding_flags,
        ]
        # By the environment: every user of this machine may read a command line, and the store's URL may hold a
        # password.
        own = f"sqlite:///{self._database_file}"
        env = {**env, "ASI_DATABASE__STORE": given.store if "store" in given.model_fields_set else own}
        if given.api_key is not None:
            env["ASI_DATABASE__API_KEY"] = given.api_key.get_secret_value()
        if given.read_key is not None:
            env["ASI_DATABASE__READ_KEY"] = given.read_key.get_secret_value()
        if given.judge == "llm":
            argv += flags_of(self._settings.llm, "llm", ("backend",))
            if self._settings.llm.api_key is not None:
                env["ASI_LLM__API_KEY"] = self._settings.llm.api_key.get_secret_value()
        # The profile's constants, unless the user set others.
        for key, value in (("cold_start", search.cold_start), ("update_batch", search.update_batch)):
            if key not in given.model_fields_set:
                argv += [f"--database.{key}", str(value)]
        port = given.port if "port" in given.model_fields_set else 0
        return Child("architecture database", argv, port, env, self._logs / "database.log")

    def _cognition(self, env: Mapping[str, str]) -> Child:
        given = self._settings.cognition
        argv = [
            str(REPOSITORY / "cognition_base/rag_api.py"),
            *flags_of(given, "cognition", ("port",)),
            *self._embedding_flags,
        ]
        port = given.port if "port" in given.model_fields_set else 0
        return Child("cognition base", argv, port, env, self._logs / "cognition.log")

    def _require(self, name: str, url: str) -> None:
        """Raises unless a configured service answers, so that a wrong URL is told at once."""
        fix = f"start it, or correct its URL (expected http://HOST:PORT, got {url!r})"
        try:
            answer = httpx.get(f"{url.rstrip('/')}/health", timeout=self._settings.services.timeout)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServiceError(f"the {name} at {url} does not answer: {error}", fix) from error
        if answer.status_code != 200:
            raise ServiceError(
                f"the {name} at {url} is not healthy: it answers {answer.status_code}", fix, answer.status_code
            )

    def close(self) -> None:
        """Stops what this started. Configured services are left alone."""
        for child in self._children:
            child.close()
        if self._embedding is not None:
            self._embedding.close()


def refuse_contradictions(settings: Settings) -> None:
    """Raises UsageError when a server that would be started here is configured, and another one is to be used."""
    services = settings.services
    for section, url in (("database", services.database_url), ("cognition", services.cognition_url)):
        if url:
            _refuse_idle(settings, section, f"services.{section}_url names a server that runs already")
    if services.database_url and services.cognition_url:
        # Only the services embed.
        _refuse_idle(settings, "embedding", "both services run already, and only they embed")
    elif services.embedding_url:
        own = {"threads", "cache_size", "start_timeout"}
        _refuse_idle(settings, "embedding", "services.embedding_url names a server that runs already", own)


def _refuse_idle(settings: Settings, section: str, why: str, keys: Collection[str] | None = None) -> None:
    """Raises UsageError when a knob of `section` (one of `keys`) was set: nothing would read it."""
    given = getattr(settings, section).model_fields_set
    knobs = ", ".join(f"{section}.{key}" for key in sorted(given if keys is None else given & set(keys)))
    if knobs:
        raise UsageError(
            f"{knobs} would have no effect: {why}",
            f"leave out {knobs} and set them where that server is started, or leave out the URL and let one be started "
            "here",
        )


def note_other_constants(database: DatabaseClient, profile: Profile, settings: Settings, console: Console) -> None:
    """Says when a configured database merges its candidates at other moments than the profile wants. It is used as
    it is: a shared server may serve other profiles."""
    if settings.services.database_url is None:
        return
    stats = database.stats()["candidates"]
    found = {"cold_start": stats.get("cold_start"), "update_batch": stats["update_threshold"]}
    wanted = {"cold_start": profile.search.cold_start, "update_batch": profile.search.update_batch}
    if found == wanted:
        return
    flags = " ".join(f"--database.{key} {value}" for key, value in wanted.items())
    console.note(
        f"The database at {database.url} has cold_start {found['cold_start']} and update_batch "
        f"{found['update_batch']}; profile {profile.name} is made for {wanted['cold_start']} and "
        f"{wanted['update_batch']}. Until its cold start is over, only roots are evolved further. To change that, "
        f"start the server again with its other flags and: {flags}"
    )


def resilient(call: Callable[[], T], cancelled: threading.Event, seconds: float = 60.0) -> T:
    """Repeats `call` while its service does not answer, since a killed service is back within seconds.

    Only for calls that may be repeated: reads, and writes with an idempotency key.

    Raises:
        ServiceError: the service answered with an error, or did not come back in `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except ServiceError as error:
            gone = error.status is None or error.status in (502, 503)
            if not gone or time.monotonic() > deadline or cancelled.wait(0.5):
                raise
