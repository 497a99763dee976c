"""The roots of a search in a database that others share: measured alike, stored once, and candidates."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from common.errors import StoreError
from common.files import write_json
from common.records import Measurement, RunRecord
from pipeline.baselines import Progress, calibrate
from pipeline.lab import Cancelled
from pipeline.measured import load_baseline, seeds_of
from pipeline.roots import store_roots
from pipeline.sample import sample
from pipeline.verdict import against_baseline, between_runs
from tests.database.db_service import Service
from tests.pipeline.labs import Trainer, database, loop, opened, record
from training.architectures import SEEDS
from training.programs import Program


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with database(tmp_path_factory.mktemp("database")) as service:
        yield service


@pytest.fixture
def url(server: Service) -> str:
    server.delete("/elements/all")
    return server.url


def test_a_root_is_the_mean_of_its_calibration_runs(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url) as (lab, trainer):
        (root,) = lab.database.runs(2)
        assert root.heldout_loss is not None and root.benchmark_mean is not None
        assert root.heldout_loss.value == pytest.approx(4.0) and root.benchmark_mean.value == pytest.approx(0.35)
        assert root.train_loss["20"] == pytest.approx(4.0) and seeds_of(root) == [0, 1]
        assert trainer.trained == []
        loop(lab).run()
        run = lab.database.runs(3)[-1]
        pair, base = between_runs(run, root, lab.baseline), against_baseline(root, lab.baseline)
        assert pair is not None and base is not None and lab.baseline.loss_sd is not None
        assert pair.value == pytest.approx(0.001) and pair.se == pytest.approx(lab.baseline.loss_sd * 1.5**0.5)
        assert base.se == pytest.approx(lab.baseline.loss_sd)


def test_roots_are_stored_once_a_baseline_and_become_candidates_beside_others(tmp_path: Path, url: str) -> None:
    with opened(tmp_path / "a", url, "key-1") as (first, _):
        store_roots(first)
        assert [element.index for element in first.database.all_elements().elements] == [1, 2]
    with opened(tmp_path / "b", url, "key-2") as (second, _):
        found = load_baseline(second.workspace.root)
        assert found is not None and [root.index for root in found.roots] == [3, 4]
        assert all(root.run.baseline_key == "key-2" for root in found.roots)
        assert {element.index for element in second.database.candidates()} == {1, 2, 3, 4}


def test_roots_are_candidates_in_a_store_with_imported_elements(tmp_path: Path, server: Service, url: str) -> None:
    for number in range(4):
        server.add(f"imported_{number}")
    with opened(tmp_path, url) as (lab, _):
        assert {element.index for element in lab.database.candidates()} == {5, 6}


def test_an_empty_candidate_set_is_one_clear_error(tmp_path: Path, server: Service, url: str) -> None:
    with opened(tmp_path, url) as (lab, _):
        server.delete("/candidates/all")
        with pytest.raises(StoreError, match="candidate set"):
            sample(lab, None)  # type: ignore[arg-type]


def test_an_own_root_is_a_candidate_at_once_and_stays_a_root(tmp_path: Path, url: str) -> None:
    own = tmp_path / "mine.py"
    own.write_text(SEEDS["delta_net"].read_text() + "# mine\n")
    with opened(tmp_path / "run", url) as (lab, _):
        loop(lab).run()
    with opened(tmp_path / "run", url, run={"seed_program": [own]}) as (lab, trainer):
        assert len(trainer.trained) == 1
        assert 4 in {element.index for element in lab.database.candidates()}
    with opened(tmp_path / "run", url) as (lab, _):
        found = load_baseline(lab.workspace.root)
        assert found is not None and [root.index for root in found.roots] == [1, 2, 4]


def test_a_full_candidate_set_may_refuse_an_own_root(tmp_path: Path, url: str) -> None:
    own = tmp_path / "mine.py"
    own.write_text(SEEDS["delta_net"].read_text() + "# mine\n")
    with opened(tmp_path / "run", url, run={"experiments": 2}) as (lab, trainer):
        loop(lab).run()
        for index in (3, 4):
            lab.database.add_candidate(index)
        trainer.train_answer = lambda program: {"heldout_loss": Measurement(value=5.0, n=1000, se=0.01)}
        run = lab.settings.run.model_copy(update={"seed_program": [own]})
        lab.settings = lab.settings.model_copy(update={"run": run})
        store_roots(lab)
        assert lab.database.element(5) is not None
        assert {element.index for element in lab.database.candidates()} == {1, 2, 3, 4}


def test_pipelines_that_start_together_train_the_baselines_once(tmp_path: Path) -> None:
    """The second waits for the first, and reads what it trained; the order to stop ends the wait."""
    entered, leave, cancelled = threading.Event(), threading.Event(), threading.Event()
    trained: list[str] = []

    class Slow(Trainer):
        def baseline_key(self) -> str:
            return self.key

        def train(self, program: Program, *, seed: int, out: Path, **_: Any) -> RunRecord:  # type: ignore[override]
            entered.set()
            leave.wait(20)
            trained.append(program.name)
            run = record(program.name, program.text, seed, self.key, 4.0)
            write_json(out / "result.json", run.model_dump(mode="json"))
            return run

    def start(stop: threading.Event) -> Future[Any]:
        show = Progress(lambda *_: None, lambda *_: None, stop)
        return pool.submit(calibrate, cast(Any, Slow("key")), tmp_path, range(2), 1, show)

    with ThreadPoolExecutor(3) as pool:
        first = start(threading.Event())
        assert entered.wait(20)
        second, third = start(threading.Event()), start(cancelled)
        cancelled.set()
        with pytest.raises(Cancelled):
            third.result(20)
        leave.set()
        assert first.result(20).keys() == second.result(20).keys() == {"delta_net", "gated_delta_net"}
    assert sorted(trained) == ["delta_net", "delta_net", "gated_delta_net", "gated_delta_net"]
    # Kept reports of another form are made anew, and that is said; the runs stay.
    (kept,) = tmp_path.rglob("checks-*.json")
    before = kept.read_text()
    for damaged in ("[3]", '[{"program": "delta_net"}]', "{", "[]"):
        kept.write_text(damaged)
        said: list[str] = []
        show = Progress(lambda _, event, to=said: to.append(event.text), lambda *_: None, threading.Event())
        assert calibrate(cast(Any, Slow("key")), tmp_path, range(2), 1, show).keys() == {"delta_net", "gated_delta_net"}
        assert kept.read_text() == before and len(said) == 1 and kept.name in said[0]
    assert len(trained) == 4
