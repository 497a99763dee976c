"""Turns of the loop over a trainer double: what fails, what is learnt from it, and under which name a design lives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import JobError, JournalError, StoreError
from common.llm import ScriptedBackend
from common.records import CheckReport, RunRecord
from pipeline.agents.llm_roles import LLMPlanner
from pipeline.agents.roles import CodeChecker, Debugger, DesignContext, Planner, Proposal
from pipeline.agreement import require_agreement
from pipeline.experiment import journal
from pipeline.lab import Cancelled, Lab
from tests.database.db_service import Service
from tests.pipeline.labs import accept, database, loop, opened, refuse
from training.programs import Program


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with database(tmp_path_factory.mktemp("database")) as service:
        yield service


@pytest.fixture
def url(server: Service) -> str:
    server.delete("/elements/all")
    return server.url


def states(lab: Lab) -> list[str]:
    return [one.state for one in journal(lab.workspace.experiments, lab.workspace.run_id)]


def failed(lab: Lab, number: int) -> dict[str, Any]:
    found = journal(lab.workspace.experiments, lab.workspace.run_id)[number - 1].read("failed")
    assert found is not None
    return found


def dies(*_: Any) -> Any:
    raise JobError("the scorer died")


def test_a_program_that_kills_its_job_twice_fails_alone(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url) as (lab, trainer):
        killer: list[str] = []

        def check(program: Program) -> CheckReport:
            killer.append(program.text)
            return dies() if program.text == killer[0] else accept(program)

        trainer.check_answer = check
        loop(lab).run()
        assert states(lab) == ["failed", "stored"]
        assert (failed(lab, 1)["stage"], failed(lab, 1)["reason"]) == ("evolve", "fault")
        assert len(lab.history()) == 1 and lab.history()[0].gain is not None


def test_two_such_experiments_in_a_row_stop_the_loop_and_the_next_start_goes_on(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url) as (lab, trainer):
        trainer.train_answer = dies
        with pytest.raises(JobError, match="the scorer died"):
            loop(lab).run()
        assert states(lab) == ["failed", "evaluate"]
        trainer.train_answer = lambda program: {}
        loop(lab).run()
        assert states(lab) == ["failed", "stored"]


def test_patience_counts_from_the_start_and_a_start_after_it_goes_on(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url, evolve={"check_attempts": 1}) as (lab, trainer):
        trainer.check_answer = refuse
        first = loop(lab)
        first.run()
        assert first.exhausted and states(lab) == ["failed"] * 3
        trainer.check_answer = accept
        second = loop(lab)
        second.run()
        assert not second.exhausted and states(lab) == ["failed"] * 3 + ["stored"]


@dataclass
class Counting:
    """Counts the repairs that are asked of a role."""

    role: CodeChecker | Debugger
    asked: int = 0

    def repair(self, *arguments: Any) -> Proposal | None:
        self.asked += 1
        return self.role.repair(*arguments)


def test_nothing_is_repaired_after_the_last_attempt(tmp_path: Path, url: str) -> None:
    limits = {"check_attempts": 2, "debug_attempts": 1}
    with opened(tmp_path, url, evolve=limits) as (lab, trainer):
        checker, debugger = Counting(lab.roles.code_checker), Counting(lab.roles.debugger)
        lab.roles = replace(lab.roles, code_checker=checker, debugger=debugger)
        trainer.check_answer = refuse
        loop(lab).run()
        assert checker.asked == len(states(lab))
        attempts = failed(lab, 1)["attempts"]
        assert [attempt["kind"] for attempt in attempts] == ["refused"] * 2
        trainer.check_answer = accept
        trainer.train_answer = lambda program: {"status": "failed", "reason": "nan", "detail": "loss was nan"}
        loop(lab).run()
        assert debugger.asked == 0 and len(states(lab)) == 6


@dataclass
class Repeating:
    """A planner whose designs are always those of the baseline; counts how often it is asked for another."""

    planner: Planner
    asked: int = 0

    def propose(self, context: DesignContext) -> Proposal:
        return replace(self.planner.propose(context), program=context.parent.program)

    def deduplicate(self, context: DesignContext, rejected: Proposal, repeated: Any) -> Proposal:
        self.asked += 1
        return rejected


def test_no_other_design_is_asked_for_after_the_last_one(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url, evolve={"novelty_attempts": 2}) as (lab, _):
        planner = Repeating(lab.roles.planner)
        lab.roles = replace(lab.roles, planner=planner)
        loop(lab).run()
        assert states(lab) == ["failed"] * 3 and planner.asked == 3
        assert failed(lab, 1)["reason"] == "repeated" and len(failed(lab, 1)["attempts"]) == 2
        assert lab.history() == (), "a repeated design says nothing against its kind"


def test_what_a_failed_experiment_spent_is_told_once(tmp_path: Path, server: Service, url: str) -> None:
    def spent() -> list[dict[str, Any]]:
        return [row for row in server.get("/v2/usage/totals") if row["model"] == "script"]

    with opened(tmp_path, url) as (lab, _):
        lab.roles = replace(lab.roles, planner=LLMPlanner(ScriptedBackend(lambda *_: "no design today")))
        loop(lab).run()
        assert states(lab) == ["failed"] * 3 and failed(lab, 1)["reason"] == "unusable"
        assert [(row["role"], row["calls"], row["failed"]) for row in spent()] == [("planner", 3, 3)]
        # A start after a kill does not know how far the last one came.
        again = loop(lab)
        lab.cancelled.set()
        with pytest.raises(Cancelled):
            again.run()
        assert spent()[0]["calls"] == 3


def test_failures_are_learnt_from_and_keep_their_time_also_at_the_next_start(tmp_path: Path, url: str) -> None:
    ends = {"status": "failed", "reason": "leak", "detail": "too good", "seconds": {"train": 5.0}}
    with opened(tmp_path, url) as (lab, trainer):
        trainer.train_answer = lambda program: ends if len(trainer.trained) == 1 else {}
        loop(lab).run()
        assert states(lab) == ["failed", "stored"]
        assert [outcome.gain is None for outcome in lab.history()] == [True, False]
        assert failed(lab, 1)["seconds"] > 0 and failed(lab, 1)["attempts"][0]["run"]["seconds"]["train"] == 5.0
    with opened(tmp_path, url) as (again, _):
        loop(again)
        assert again.history() == lab.history()
        assert len(again.finished_runs()) == 4 + 1


def test_an_element_without_a_score_is_no_failure(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url) as (lab, trainer):
        trainer.train_answer = lambda program: {"benchmark_mean": None, "benchmarks": {}}
        loop(lab).run()
        assert states(lab) == ["stored"] and lab.history() == ()
        assert len(lab.finished_runs()) == 4 + 1


@dataclass
class OneName:
    planner: Planner

    def propose(self, context: DesignContext) -> Proposal:
        return replace(self.planner.propose(context), name="delta_net_same")

    deduplicate = None


def test_run_rows_and_element_carry_one_name_of_their_own(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url, run={"experiments": 2}) as (lab, _):
        lab.roles = replace(lab.roles, planner=OneName(lab.roles.planner))  # type: ignore[arg-type]
        loop(lab).run()
        for index, name in ((3, "delta_net_same"), (4, "delta_net_same_2")):
            element, runs = lab.database.element(index), lab.database.runs(index)
            assert element is not None and element.name == name and runs[-1].name == name
            assert element.result.test.splitlines()[1].startswith(f"{name},")
            assert (lab.workspace.pool / f"{name}.py").read_text() == element.program


def test_a_gain_over_a_parent_that_was_measured_otherwise_is_none(tmp_path: Path, url: str) -> None:
    with opened(tmp_path / "a", url, "key-1") as (first, _):
        loop(first).run()
        stored = first.database.runs(3)[-1]
    assert isinstance(stored, RunRecord) and stored.baseline_key == "key-1"
    with opened(tmp_path / "b", url, "key-2") as (second, _):
        # Only an element of the other baseline is left to be a parent.
        for element in second.database.candidates():
            if second.database.runs(element.index)[-1].baseline_key == "key-2":
                second.database._json("DELETE", f"/candidates/by-index/{element.index}")
        loop(second).run()
        update = journal(second.workspace.experiments, "")[0].read("update")
        assert update is not None and update["score"] is not None and update["gain"] is None
        assert second.history() == ()


def test_a_design_that_computes_what_another_computes_is_not_trained(tmp_path: Path, url: str) -> None:
    """The same function in other words is no new design: known from this run's journal, or from the database."""
    prints: dict[str, str] = {}

    def check(program: Program) -> CheckReport:
        mark = prints.setdefault(program.text, ["one", "one", "two"][min(len(prints), 2)])
        return accept(program).model_copy(update={"facts": {"fingerprint": mark}})

    with opened(tmp_path / "a", url, run={"experiments": 2}) as (lab, trainer):
        trainer.check_answer = check
        trainer.train_answer = lambda program: {"fingerprint": prints[program.text]}
        loop(lab).run()
        assert [prints[program.text] for program in trainer.trained] == ["one", "two"]
        tried = journal(lab.workspace.experiments, lab.workspace.run_id)[1].read("evolve")
        assert tried is not None and [attempt["kind"] for attempt in tried["attempts"]] == ["repeated"]
        assert "experiment 1" in tried["attempts"][0]["detail"]
    with opened(tmp_path / "b", url) as (lab, trainer):  # another pipeline of the same database
        trainer.check_answer = lambda program: _marked(program, prints)
        loop(lab).run()
        tried = journal(lab.workspace.experiments, lab.workspace.run_id)[0].read("evolve")
        assert tried is not None and "element 3" in tried["attempts"][0]["detail"]


def _marked(program: Program, prints: dict[str, str]) -> CheckReport:
    """The first program asked for computes "one", every later one something else."""
    mark = prints.setdefault(program.text, f"new {len(prints)}" if "seen" in prints else "one")
    prints["seen"] = ""
    return accept(program).model_copy(update={"facts": {"fingerprint": mark}})


def test_an_experiment_whose_rounds_are_all_twins_ends_as_repeated(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url, run={"experiments": 2}, evolve={"check_attempts": 2}) as (lab, trainer):
        trainer.check_answer = lambda program: accept(program).model_copy(update={"facts": {"fingerprint": "one"}})
        loop(lab).run()
        ended = failed(lab, 2)
        assert (ended["stage"], ended["reason"]) == ("evolve", "repeated") and "experiment 1" in ended["detail"]
        assert [attempt["kind"] for attempt in ended["attempts"]] == ["repeated"] * 2
        # One that is refused after a twin did not end for want of a new idea.
        answers = iter([accept, refuse] * 9)
        twin = {"facts": {"fingerprint": "one"}}
        trainer.check_answer = lambda program: next(answers)(program).model_copy(update=twin)
        loop(lab).run()
        assert failed(lab, len(states(lab)))["reason"] == "refused"


def test_a_repair_that_computes_what_is_known_is_not_trained(tmp_path: Path, url: str) -> None:
    """Experiment 1 computes "one". The first design of experiment 2 is new and fails in training; its first repair is
    a twin of experiment 1, its second is new."""
    order = ["one", "two", "one", "three"]
    prints: dict[str, str] = {}

    def check(program: Program) -> CheckReport:
        mark = prints.setdefault(program.text, order[min(len(prints), 3)])
        return accept(program).model_copy(update={"facts": {"fingerprint": mark}})

    def train(program: Program) -> dict[str, Any]:
        ends = {"status": "failed", "reason": "nan", "detail": "loss was nan"} if len(trainer.trained) == 2 else {}
        return {**ends, "fingerprint": prints[program.text]}

    with opened(tmp_path, url, run={"experiments": 2}) as (lab, trainer):
        trainer.check_answer, trainer.train_answer = check, train
        loop(lab).run()
        assert states(lab) == ["stored", "stored"]
        assert [prints[program.text] for program in trainer.trained] == ["one", "two", "three"]
        evaluated = journal(lab.workspace.experiments, lab.workspace.run_id)[1].read("evaluate")
        assert evaluated is not None and [one["kind"] for one in evaluated["attempts"]] == ["nan", "repeated"]
        assert "experiment 1" in evaluated["attempts"][1]["detail"]
    with opened(tmp_path, url, run={"experiments": 2}) as (again, _):
        loop(again)
        for mark, owner in (("two", "0002"), ("three", "0002")):  # both stay claimed at the next start
            assert again.ideas.claim_function("0003", mark) == owner


def test_a_removed_journal_of_a_stored_experiment_is_told_and_nothing_is_trained_anew(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url, run={"experiments": 2}) as (lab, trainer):
        loop(lab).run()
        trained = len(trainer.trained)
        for number in (1, 2):
            folder, kept = lab.workspace.experiment(number).folder, tmp_path / "kept"
            folder.rename(kept)
            told = rf"element {number + 2} .*{folder.name} is gone"
            found = journal(lab.workspace.experiments, lab.workspace.run_id)
            with pytest.raises(JournalError, match=told):
                require_agreement(lab.workspace, found, lab.database)
            if number == 2:
                with pytest.raises(JournalError, match=told):
                    loop(lab).run()
            kept.rename(folder)
        found = journal(lab.workspace.experiments, lab.workspace.run_id)
        require_agreement(lab.workspace, found, lab.database)
        assert len(trainer.trained) == trained


def test_what_stops_the_loop_is_noted_without_its_fix(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(program: Program) -> CheckReport:
        raise StoreError("cannot write: no space left", "free disk space")

    with opened(tmp_path, url) as (lab, trainer):
        trainer.check_answer = full
        with pytest.raises(StoreError):
            loop(lab).run()
        printed = capsys.readouterr().out
        assert "no space left" in printed and "fix:" not in printed  # the fix comes once, with the error at the end
        assert "1 reference\n" in printed or "1 reference " in printed
