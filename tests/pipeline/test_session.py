"""A start of the pipeline: what is refused or told before anything is trained, and what Ctrl-C ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from common.errors import UsageError
from common.records import Baseline
from common.settings import load
from database.client import DatabaseClient
from pipeline.console import Console
from pipeline.experiment import Experiment
from pipeline.measured import Measured, save_baseline
from pipeline.services import Services, note_other_constants, refuse_contradictions
from pipeline.session import _prepare, measured_before, run_session
from pipeline.workspace import Workspace
from tests.database.db_service import EmbeddingDouble
from tests.fixtures_services import running
from tests.pipeline.labs import database
from tests.pipeline.running import ROOT, TINY, run
from tests.pipeline.test_experiment import RESULTS, RUN
from training.profiles import load_profile


def test_another_baseline_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, load(None, {"run": {"data_dir": tmp_path}}))
    assert measured_before(workspace, "key-1") is None
    baseline = Baseline(
        key="key-1", profile="p", seeds=[0], loss=4.0, loss_sd=None, benchmark=None, benchmark_sd=None, tasks=[]
    )
    save_baseline(tmp_path, Measured(baseline=baseline, runs={}))
    assert measured_before(workspace, "key-2") is None, "nothing was compared with it yet"
    Experiment(1, workspace.experiments / "0001", "").write("sample", RESULTS["sample"])
    assert measured_before(workspace, "key-1") is not None
    with pytest.raises(UsageError, match="another baseline"):
        measured_before(workspace, "key-2")
    # Without the file the journal says what they were compared with.
    (tmp_path / "baseline.json").unlink()
    Experiment(1, workspace.experiments / "0001", "").write("evaluate", RESULTS["evaluate"])
    assert measured_before(workspace, RUN["baseline_key"]) is None
    with pytest.raises(UsageError, match="another baseline"):
        measured_before(workspace, "key-2")
    workspace.close()


def test_knobs_of_the_embedded_database_are_refused_beside_another_one(tmp_path: Path) -> None:
    services = {"database_url": "http://127.0.0.1:9"}
    refuse_contradictions(load(None, {"services": services}))
    refuse_contradictions(load(None, {"database": {"cold_start": 3}}))
    with pytest.raises(UsageError, match=r"database\.cold_start would have no effect"):
        refuse_contradictions(load(None, {"services": services, "database": {"cold_start": 3}}))


URL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("urls", "section", "knobs"),
    [
        (["cognition_url"], "cognition", {"retriever": "embedded", "port": 1}),
        (["embedding_url"], "embedding", {"threads": 2, "cache_size": 9}),
        (["database_url", "cognition_url"], "embedding", {"model": "all-MiniLM-L6-v2", "timeout": 5}),
    ],
)
def test_knobs_of_any_server_that_is_not_started_here_are_refused(
    urls: list[str], section: str, knobs: dict[str, Any]
) -> None:
    refuse_contradictions(load(None, {section: knobs}))
    services = dict.fromkeys(urls, URL)
    refuse_contradictions(load(None, {"services": services}))
    named = ", ".join(f"{section}.{key}" for key in sorted(knobs))
    with pytest.raises(UsageError, match=f"{named} would have no effect"):
        refuse_contradictions(load(None, {"services": services, section: knobs}))


def test_knobs_that_a_client_of_a_running_embedding_server_reads_are_accepted() -> None:
    embedding = {"model": "all-MiniLM-L6-v2", "timeout": 5}
    refuse_contradictions(load(None, {"services": {"embedding_url": URL}, "embedding": embedding}))


def test_no_error_of_the_thread_that_starts_the_services_is_lost(tmp_path: Path) -> None:
    def start() -> None:
        raise RuntimeError("out of threads")

    workspace = Workspace(tmp_path, load(None, {"run": {"data_dir": tmp_path}}))
    services, launcher = SimpleNamespace(start=start), SimpleNamespace(ready=lambda tell, cancel: None)
    with pytest.raises(RuntimeError, match="out of threads"):
        _prepare(workspace, Console(), cast(Any, launcher), cast(Any, services), threading.Event())
    workspace.close()


def test_other_constants_of_a_shared_database_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = load_profile(str(TINY))
    with database(tmp_path) as server:
        shared = load(None, {"services": {"database_url": server.url}})
        console = Console()
        same = profile.model_copy(
            update={"search": profile.search.model_copy(update={"cold_start": 4, "update_batch": 2})}
        )
        note_other_constants(DatabaseClient(server.url), same, shared, console)
        assert capsys.readouterr().out == ""
        other = profile.model_copy(
            update={"search": profile.search.model_copy(update={"cold_start": 7, "update_batch": 3})}
        )
        note_other_constants(DatabaseClient(server.url), other, shared, console)
        assert "--database.cold_start 7 --database.update_batch 3" in " ".join(capsys.readouterr().out.split())


def test_the_store_of_a_child_is_on_no_command_line(tmp_path: Path) -> None:
    store = "mongodb://user:hush@host/db"
    services = Services(load(None, {"database": {"store": store}}), load_profile(str(TINY)), tmp_path / "db", tmp_path)
    child = services._database({})
    assert not any("hush" in word for word in child.argv) and child.env["ASI_DATABASE__STORE"] == store


@pytest.mark.parametrize("judge", ["rubric", "llm"])
def test_the_database_learns_whom_to_ask_when_a_model_judges(tmp_path: Path, judge: str) -> None:
    llm = {"base_url": "http://127.0.0.1:9/v1", "model": "double", "api_key": "hush"}
    services = Services(
        load(None, {"database": {"judge": judge}, "llm": llm}), load_profile(str(TINY)), tmp_path / "db", tmp_path
    )
    child = services._database({})
    told = "--llm.base_url http://127.0.0.1:9/v1 --llm.model double" in " ".join(child.argv)
    assert told == ("ASI_LLM__API_KEY" in child.env) == (judge == "llm")
    assert not any("hush" in word for word in child.argv)


def test_the_cognition_base_names_an_ipv6_address_in_brackets(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    embedding = EmbeddingDouble()
    env = {"ASI_SERVICES__EMBEDDING_URL": embedding.url, "ASI_COGNITION__INDEX_DIR": str(tmp_path)}
    script = str(ROOT / "cognition_base" / "rag_api.py")
    with running([script, "--host", "::1", "--port", "0"], env) as (url, _):
        assert url.startswith("http://[::1]:")
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
    embedding.close()


def test_an_own_program_without_a_sandbox_is_refused_at_once(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text((ROOT / "training/architectures/delta_net.py").read_text() + "# own\n")
    done = run(tmp_path / "run", 1, "--sandbox.backend", "process", "--seed-program", str(own))
    assert done.returncode == 2 and "own.py" in done.stderr and "only in bubblewrap or docker" in done.stderr


@contextmanager
def interrupting() -> Iterator[str]:
    """A server that sends this process Ctrl-C with the first request, and then answers with an error."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            self.send_error(500)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_what_breaks_off_after_ctrl_c_is_told_as_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = Experiment(1, tmp_path / "experiments" / "0001", "")
    for stage, value in RESULTS.items():
        experiment.write(stage, value)
    with interrupting() as url:
        settings = load(
            None,
            {
                "run": {"data_dir": tmp_path, "profile": str(TINY), "experiments": 1},
                "services": {"database_url": url},
            },
        )
        assert run_session(settings) == 130
    assert "To go on" in capsys.readouterr().out


def test_a_second_ctrl_c_ends_at_once_and_without_a_traceback() -> None:
    code = (
        "import signal, sys, threading, time\n"
        "from pipeline.console import Console\n"
        "from pipeline.session import _interruptible\n"
        "with _interruptible(threading.Event(), Console()):\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    while "Again" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == ""


def test_ctrl_c_is_heard_while_the_main_thread_waits_and_another_gets_the_signal() -> None:
    code = (
        "import signal, threading, time\n"
        "from pipeline.console import Console\n"
        "from pipeline.session import _interruptible\n"
        "cancelled = threading.Event()\n"
        "def lane():\n"
        "    time.sleep(0.5)  # the main thread waits by then; it hears of nothing that comes later\n"
        "    signal.pthread_kill(threading.get_ident(), signal.SIGINT)\n"
        "    cancelled.wait()\n"
        "with _interruptible(cancelled, Console()):\n"
        "    thread = threading.Thread(target=lane)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "print('ended')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "Stopping" in done.stdout and "ended" in done.stdout
