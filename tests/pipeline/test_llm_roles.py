"""The LLM roles over scripted models and over the loopback endpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from common.errors import LLMError
from common.llm import CallLog, Reply, ScriptedBackend
from common.records import Baseline, BenchmarkScore, CheckOutcome, CheckReport, Measurement, RunRecord
from common.settings import load
from pipeline.agents.llm_roles import forced_name, llm_roles, roles_over
from pipeline.agents.roles import Analysis, AnalysisSubject, DesignContext, Kin, Paper, Proposal, Relative
from pipeline.failure import ExperimentFailed
from tests.llm_endpoint import FakeEndpoint, planner_answering, status

PARENT = "import torch\n\n\nclass DeltaNet(torch.nn.Module):\n    '''{{parent_name}} {0} ``` '''\n"
CHILD = PARENT.replace("{0}", "{1}")


def relative(index: int, program: str = PARENT) -> Relative:
    return Relative(
        name=f"delta_net_{index}",
        program=program,
        motivation=f"motivation number {index}",
        train_csv=f"step,1,100\nx,6.9,{4 + index / 100}\n",
        test_csv=f"Model,recall\nx,0.{index}\n",
        summary=f"experience number {index}",
        score=1.5,
        index=index,
    )


def context(references: int = 2) -> DesignContext:
    return DesignContext(
        parent=relative(1),
        references=tuple(relative(2 + number, PARENT + f"# reference {number}\n") for number in range(references)),
        insights=(Paper("2412_06464", "gates and deltas", "combine both"),),
        history=(),
        key="e1",
    )


def proposal(program: str = CHILD) -> Proposal:
    return Proposal(
        "delta_net_new", "because", program, "llm", "adds a gate", genome={"a": 1}, mechanisms=("gate",), trust="genome"
    )


def run(name: str, loss: float, **changes: object) -> RunRecord:
    values: dict[str, object] = {
        "run_id": name,
        "name": name,
        "profile": "cpu-smoke",
        "seed": 0,
        "status": "finished",
        "program_sha256": "0" * 64,
        "baseline_key": "k",
        "heldout_loss": Measurement(value=loss, n=4096, se=0.011),
        "benchmarks": {"recall": BenchmarkScore(value=0.31, n=200, se=0.033, chance=0.25)},
        "benchmark_mean": Measurement(value=0.31, n=200, se=0.033),
        "train_loss": {"1": 6.93, "100": loss + 0.2, "20": 5.5},
        "parameters": 412_000,
    }
    return RunRecord.model_validate({**values, **changes})


BASELINE = Baseline(
    key="k",
    profile="cpu-smoke",
    seeds=[0, 1],
    loss=4.2,
    loss_sd=0.02,
    benchmark=0.3,
    benchmark_sd=0.01,
    tasks=["recall"],
)


def design(program: str = CHILD, name: str = "Delta-Net: gate!") -> dict[str, object]:
    return {"name": name, "motivation": "a gate\nhelps", "change": "adds\n a gate", "program": program}


def scripted(answers: Sequence[Reply]) -> ScriptedBackend:
    return ScriptedBackend(answers)


def test_the_planner_shows_everything_and_returns_the_whole_program() -> None:
    llm = scripted([design()])
    made = roles_over(llm).planner.propose(context())
    assert (made.name, made.operator, made.change) == ("delta_net_gate", "llm", "adds a gate")
    assert (made.program, made.motivation, made.genome, made.trust) == (CHILD, "a gate\nhelps", None, None)
    (call,) = llm.calls
    assert PARENT.rstrip() in call.prompt and "class DeltaNet" in call.system
    for part in ("experience number 1", "motivation number 2", "# reference 1", "4.01", "2412_06464", "combine both"):
        assert part in call.prompt, part


@pytest.mark.parametrize(
    ("wrapped", "expected"),
    [
        (f"```python\n{CHILD}```", CHILD),
        (f"````\n{CHILD}\n````\n", CHILD),
        (CHILD.replace("\n", "\r\n"), CHILD),
        (CHILD.rstrip("\n"), CHILD),
    ],
)
def test_a_fence_around_the_file_is_taken_off(wrapped: str, expected: str) -> None:
    assert roles_over(scripted([design(wrapped)])).planner.propose(context()).program == expected


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (PARENT, "without any change"),
        (PARENT.replace("\n", "  \n") + "\n\n", "without any change"),
        ("class DeltaNet(:\n", "line 1"),
        ("x = '\0'", "not valid Python"),
        ("(" * 4000, "not valid Python"),
        ("import torch\n# ... unchanged ...\n", "no class DeltaNet"),
    ],
)
def test_a_program_that_is_none_is_sent_back_once(bad: str, complaint: str) -> None:
    llm = scripted([design(bad), design()])
    assert roles_over(llm).planner.propose(context()).program == CHILD
    assert len(llm.calls) == 2
    assert complaint in llm.calls[1].prompt and llm.calls[0].prompt.strip() in llm.calls[1].prompt


def test_an_unchanged_program_twice_ends_the_experiment() -> None:
    with pytest.raises(ExperimentFailed) as caught:
        roles_over(scripted([design(PARENT), design(PARENT)])).planner.propose(context())
    assert (caught.value.stage, caught.value.reason) == ("evolve", "unchanged")


def test_a_planner_without_a_usable_answer_ends_the_experiment_and_a_dead_endpoint_the_loop() -> None:
    with pytest.raises(ExperimentFailed, match="unusable"):
        roles_over(scripted(["I would change the gate."])).planner.propose(context())
    with pytest.raises(LLMError, match="down"):
        roles_over(scripted([LLMError("down")])).planner.propose(context())


def test_deduplication_starts_from_the_parent_and_names_what_was_repeated() -> None:
    llm = scripted([design(name="delta_net_1")])
    made = roles_over(llm).planner.deduplicate(context(), proposal("rejected program"), [relative(7)])
    assert made.operator == "llm deduplication" and re.fullmatch(r"delta_net_1_[0-9a-f]{8}", made.name)
    prompt = llm.calls[0].prompt
    assert "motivation number 7" in prompt and PARENT.rstrip() in prompt and "rejected program" not in prompt


def test_programs_of_references_are_left_out_where_there_is_no_room() -> None:
    lengths = []
    for room in (1_000_000, 16_000, 4_000):
        llm = scripted([design()])
        big = tuple(relative(index, PARENT + f"# {index}\n" + "# x\n" * 1000) for index in (2, 3, 4))
        roles_over(llm, room).planner.propose(DesignContext(relative(1), big, (), (), "k"))
        prompt = llm.calls[0].prompt
        lengths.append(sum(f"# {index}\n# x" in prompt for index in (2, 3, 4)))
        assert all(f"motivation number {index}" in prompt for index in (2, 3, 4)) and PARENT.rstrip() in prompt
    assert lengths[0] == 3 and 0 < lengths[1] < 3 and lengths[2] == 0


def test_the_novelty_verdict_names_only_designs_that_were_shown() -> None:
    near = [relative(3), relative(5)]

    def judge(answer: dict[str, object]) -> tuple[bool, tuple[int, ...]]:
        verdict = roles_over(scripted([answer])).motivation_checker.judge(proposal(), near)
        return verdict.is_repeated, verdict.repeated_index

    base = {"judgement_reason": "same gate"}
    assert judge({**base, "is_repeated": True, "repeated_index": [5, 99]}) == (True, (5,))
    assert judge({**base, "is_repeated": True, "repeated_index": []}) == (True, (3, 5))
    assert judge({**base, "is_repeated": False, "repeated_index": [5]}) == (False, ())


def test_nothing_is_asked_without_neighbours_and_no_answer_is_no_repetition() -> None:
    llm = scripted(["perhaps"])
    checker = roles_over(llm).motivation_checker
    assert not checker.judge(proposal(), []).is_repeated and not llm.calls
    verdict = checker.judge(proposal(), [relative(3)])
    assert not verdict.is_repeated and "not judged" in verdict.judgement_reason


REPORT = CheckReport(
    program="p",
    accepted=False,
    checks=[
        CheckOutcome(name="shapes", passed=True),
        CheckOutcome(
            name="causality",
            passed=False,
            detail="output 3 depends on input 7",
            counterexample={"length": 9, "changed": 7, "seen": 3},
        ),
        CheckOutcome(name="cost", passed=False, severity="warn", detail="exponent 1.2"),
    ],
    facts={"work_exponent": 1.2},
)


def repair(role: str, llm: ScriptedBackend) -> Proposal | None:
    roles = roles_over(llm)
    if role == "code_checker":
        return roles.code_checker.repair(proposal(), REPORT, context(), 2)
    failed = run("x", 4.0, status="failed", reason="nan", detail="loss was nan at step 40")
    return roles.debugger.repair(proposal(), failed, "x" * 20_000 + "RuntimeError: inf", context(), 1)


@pytest.mark.parametrize("role", ["code_checker", "debugger"])
def test_a_repair_sees_the_failure_and_loses_its_genome_and_trust(role: str) -> None:
    fixed = CHILD + "# fixed\n"
    llm = scripted([{"changes_made": "fixed it", "fixed": True, "program": fixed}])
    made = repair(role, llm)
    assert made is not None and made.program == fixed and (made.genome, made.trust) == (None, None)
    assert (made.name, made.motivation, made.mechanisms) == ("delta_net_new", "because", ("gate",))
    prompt = llm.calls[0].prompt
    assert CHILD.rstrip() in prompt and llm.calls[0].role == role
    seen = {
        "code_checker": ("causality", '"changed": 7', "exponent 1.2", "round 2"),
        "debugger": ("failed (nan)", "nan at step 40", "RuntimeError: inf", "1,20,100"),
    }
    assert all(part in prompt for part in seen[role]) and len(prompt) < 20_000


@pytest.mark.parametrize("role", ["code_checker", "debugger"])
def test_a_repair_that_changes_nothing_or_gives_up_is_none(role: str) -> None:
    same = {"changes_made": "all is well", "fixed": True, "program": CHILD}
    gives_up = {"changes_made": "the idea is not causal", "fixed": False, "program": ""}
    for answers, asked in (([same, same], 2), ([gives_up], 1), ([same, gives_up], 2), (["no"], 1)):
        llm = scripted(answers)
        assert repair(role, llm) is None and len(llm.calls) == asked


def subject() -> AnalysisSubject:
    return AnalysisSubject(
        proposal(),
        run("new", 4.1234),
        BASELINE,
        parent=Kin(relative(1), run("parent", 4.3)),
        grandparent=Kin(relative(2)),
        siblings=(Kin(relative(3), run("sibling", 4.4, benchmarks={})),),
    )


PARTS = [field.name for field in fields(Analysis)]


def test_the_analyzer_sees_measurements_with_their_errors_and_the_relatives() -> None:
    llm = scripted([{part: f" {part} text " for part in PARTS}])
    analysis = roles_over(llm).analyzer.analyse(subject())
    assert [getattr(analysis, part) for part in PARTS] == [f"{part} text" for part in PARTS]
    prompt = llm.calls[0].prompt
    expected = (
        '4.1234 (SE 0.011, n 4096)"',
        "4.2000 (SD over seeds 0.02, n 2)",
        '"recall (accuracy, chance 0.25)",-,',
        "parent delta_net_1",
        "motivation number 3",
        "experience number 2",
        "step,1,20,100",
        "parameters of the model,-,412000",
        "parameters of all mixers,-",
    )
    for part in expected:
        assert part in prompt, part


def test_a_trained_run_is_analysed_even_when_the_model_gives_nothing() -> None:
    roles = roles_over(scripted(["no", "no"]))
    analysis = roles.analyzer.analyse(subject())
    assert "language model failed" in analysis.design_evaluation and "4.12" in analysis.experimental_results_analysis
    assert roles.summarizer.summarise("a gate. More.", "## Synthesis and insights\nKeep it.", "")


def test_the_summarizer_returns_the_experience() -> None:
    llm = scripted([{"experience": " keep the gate "}])
    assert roles_over(llm).summarizer.summarise("why", "what", "") == "keep the gate"
    assert "why" in llm.calls[0].prompt and "none" in llm.calls[0].prompt


@hypothesis.given(st.text(max_size=120), st.text(max_size=5))
@hypothesis.settings(max_examples=150)
def test_every_name_is_forced_into_form(name: str, program: str) -> None:
    made = forced_name(name, program)
    assert re.fullmatch(r"delta_net_[a-z0-9_]{1,50}", made) and forced_name(made, program) == made
    other = forced_name(name, program, {made})
    assert other != made and re.fullmatch(r"delta_net_[a-z0-9_]{1,50}", other)


def test_all_roles_over_a_real_endpoint(tmp_path: Path) -> None:
    with FakeEndpoint([status(503)], default=planner_answering(lambda number: f"{CHILD}# {number}\n")) as endpoint:
        values = endpoint.settings(output_mode="prompted").model_dump(exclude_none=True)
        roles = llm_roles(load(flags={"llm": values}), tmp_path)
        made = roles.planner.propose(context())
        other = roles.planner.deduplicate(context(), made, [relative(3)])
        assert made.program != other.program and made.name != other.name and made.motivation != other.motivation
        assert not roles.motivation_checker.judge(made, [relative(3)]).is_repeated
        repaired = roles.code_checker.repair(made, REPORT, context(), 1)
        assert repaired is not None and repaired.program != made.program
        failed = run("x", 4.0, status="failed", reason="crashed")
        assert roles.debugger.repair(made, failed, "Traceback", context(), 1) is not None
        assert roles.analyzer.analyse(subject()).design_evaluation
        assert roles.summarizer.summarise("why", "what", "papers")
    calls = list(CallLog.read(tmp_path / "llm.jsonl"))
    assert [call.outcome for call in calls] == ["server_error", *["ok"] * 7]
    assert [call.role for call in calls[1:]] == [
        "planner",
        "deduplication",
        "motivation_checker",
        "code_checker",
        "debugger",
        "analyzer",
        "summarizer",
    ]
    assert "sk-double" not in (tmp_path / "llm.jsonl").read_text()
