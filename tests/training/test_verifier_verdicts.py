"""The verifier refuses each planted fault by the check that is meant to, with a counterexample, and accepts honest
programs."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verifier_assets as assets

from common.process import REPOSITORY
from common.records import CheckOutcome, CheckReport
from training.programs import Program, load
from training.reports import failure_text
from training.sandbox import Limits, choose
from training.scorer import verifier
from training.scorer.client import OperationFailed, Worker, WorkerDied
from training.scorer.verifier import CHECKS, Options, verify, verify_many
from training.scorer.verifier.context import Context, plain

BEST = choose("auto")
pytestmark = pytest.mark.skipif(BEST.backend != "bubblewrap", reason=f"no bubblewrap here: {BEST.note}")

PLANTED = {
    "static": assets.STATIC,
    "construct": assets.CONSTRUCT,
    "shapes": assets.SHAPES,
    "cost": assets.COST,
    "gradients": assets.GRADIENTS,
    "causality": {**assets.CAUSALITY, **assets.SWITCHES},
    "batch": assets.BATCH,
    "state": assets.STATE,
    "length": assets.LENGTH,
    "learns": assets.LEARNS,
}
"""All in the slow suite; test_verifier_checks.py runs most of them against their check alone."""

REPORTS: dict[str, CheckReport] = {}


def reports(programs: dict[str, str], options: Options | None = None) -> dict[str, CheckReport]:
    """Reports by name, two programs at a time; each program is verified once in a session."""
    new = [Program(name, text) for name, text in programs.items() if name not in REPORTS]
    for report in verify_many(new, BEST, options or Options(memory_mb=2048)):
        REPORTS[report.program] = report
    return {name: REPORTS[name] for name in programs}


def refusal(report: CheckReport) -> CheckOutcome:
    """The first refusal that is more than words in the text, where there is one."""
    assert report.accepted is False, report
    by_running = [outcome for outcome in report.refusals() if outcome.name != "reach"]
    return (by_running or report.refusals())[0]


def refused_by(check: str, names: list[str]) -> None:
    found = reports({f"{check}/{name}": PLANTED[check][name] for name in names})
    for name, report in found.items():
        assert report.accepted is False, report
        own = [outcome for outcome in report.refusals() if outcome.name == check]  # others may refuse it as well
        assert own and own[0].detail and own[0].counterexample, (name, report)
        assert len(str(own[0].counterexample)) < 3000, name


@pytest.mark.parametrize("name", assets.STATIC)
def test_static_faults_are_refused_without_running_anything(name: str) -> None:
    report = verify(Program(name, assets.STATIC[name]), BEST)
    first = refusal(report)
    assert first.name == "static" and len(report.checks) == 1
    assert first.counterexample and first.counterexample["line"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("check", PLANTED)
def test_every_planted_fault_is_refused_by_its_check(check: str) -> None:
    refused_by(check, list(PLANTED[check]))
    print(f"{check}: {len(PLANTED[check])} of {len(PLANTED[check])} planted faults refused")


def accepts(programs: dict[str, str]) -> None:
    for name, report in reports(programs).items():
        assert report.accepted, (name, failure_text(report))


@pytest.mark.slow
def test_every_honest_program_is_accepted() -> None:
    honest = {**assets.HONEST, **assets.COUNTS, **{f"decode/{name}": text for name, text in assets.DECODE.items()}}
    accepts({**honest, "unsupported": assets.UNSUPPORTED, "hard_bfloat16": assets.HARD_BFLOAT16})
    state = [check for check in REPORTS["step_counter"].checks if check.name == "state" and not check.passed]
    assert state[0].severity == "warn"
    assert REPORTS["hard_bfloat16"].facts["dtype"] == "bfloat16" and REPORTS["base"].facts["dtype"] == "float32"
    warnings = [check for check in REPORTS["hard_bfloat16"].checks if not check.passed and check.name == "shapes"]
    assert "does not run in float32" in warnings[0].detail
    for name in assets.COUNTS:
        found = [check.severity for check in REPORTS[name].checks if check.name == "state" and not check.passed]
        assert found and set(found) == {"warn"}, name
    print(f"{len(REPORTS)} programs accepted")


def test_a_seed_passes_every_check_and_its_cost_is_measured() -> None:
    program = load(REPOSITORY / "training" / "architectures" / "delta_net.py")
    baseline: dict[str, float] = {"baseline_mixer_parameters": 50_000, "baseline_flops_per_token": 2e5}
    report = verify(program, BEST, Options(profile_width=128, profile_length=256, **baseline))
    assert report.accepted, failure_text(report)
    assert [check.name for check in report.checks] == ["static", "reach", *CHECKS, "sandbox"]
    memory = re.search(r"at most ([\d,]+) MB of memory", report.checks[-1].detail)
    assert memory is not None and 100 < int(memory[1].replace(",", "")) < 2048
    facts = report.facts
    assert 0.95 < facts["work_exponent"] < 1.05 and 0.9 < facts["memory_exponent"] < 1.05
    assert facts["mixer_parameters"] > 4 * 128 * 128
    # Four projections of width 128 alone are 8 * 128^2 FLOPs a token.
    assert 8 * 128**2 < facts["flops_per_token"] < 40 * 128**2
    assert facts["ops_per_token"] < 1 and abs(facts["length_exponent"]) < 0.2 and facts["learns"] > 0.1
    assert facts["parameter_ratio"] == round(facts["mixer_parameters"] / 50_000, 4) and 0.5 < facts["flops_ratio"] < 3
    assert facts["decode"] is None and facts["unsupported"] == [] and len(facts["fingerprint"]) == 32


@pytest.mark.slow
def test_softmax_attention_is_only_a_reference() -> None:
    path = REPOSITORY / "training" / "references" / "softmax_attention.py"
    report = verify(load(path, reference=True), BEST)
    (cost,) = [check for check in report.checks if check.name == "cost"]
    assert report.accepted and not cost.passed and cost.severity == "warn" and "table" in (cost.counterexample or {})


HOSTILE_FAST = ["memory_bomb", "fork_bomb"]


def contained(names: list[str], seconds: float = 120) -> None:
    programs = {f"hostile/{name}": assets.hostile(assets.HOSTILE[name][0]) for name in names}
    for name, report in reports(programs, Options(seconds=seconds, memory_mb=2048)).items():
        wanted = assets.HOSTILE[name.removeprefix("hostile/")][1]
        first = refusal(report)
        if wanted is not None:
            assert first.name == "sandbox" and (first.counterexample or {})["reason"] == wanted, (name, first)


def test_hostile_programs_are_refused_with_the_reason() -> None:
    contained(HOSTILE_FAST)
    fork = refusal(REPORTS["hostile/fork_bomb"])
    assert "os.fork()" in str(fork.counterexample)


@pytest.mark.slow
def test_every_hostile_program_is_contained() -> None:
    endless = [name for name, (_, reason) in assets.HOSTILE.items() if reason == "timeout"]
    contained([name for name in assets.HOSTILE if name not in endless])
    contained(endless, 20)
    print(f"{len(assets.HOSTILE)} hostile programs contained")


PATCHES = """

for name in ('allclose', 'equal', 'isfinite', 'isnan', 'count_nonzero', 'randn', 'manual_seed'):
    setattr(torch, name, lambda *a, **k: torch.ones((), dtype=torch.bool))
for name in ('requires_grad_', 'detach', 'numpy', 'copy_', 'cpu', 'sum', 'mul', 'abs', 'amax', 'any', 'all'):
    setattr(torch.Tensor, name, lambda self, *a, **k: self)
torch.autograd.grad = lambda *a, **k: (None,) * 9
torch.autograd.backward = torch.Tensor.backward = lambda *a, **k: None
torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward = lambda *a, **k: (None,) * 9
"""


def test_a_program_that_patches_torch_in_its_process_does_not_fool_the_verdict() -> None:
    """The checks alone, which cost no more than they must; each still finds what it looks for."""
    for text, name in ((assets.CAUSALITY["mean_over_time"], "causality"), (assets.BASE, "state")):
        program = Program("patched", text + PATCHES)
        with Worker(BEST, program) as worker:
            context = Context(worker, program, Options(), precise="float64", lowest="float64")
            worker.load()
            (outcome, *_) = CHECKS[name](context)
            assert not outcome.passed and outcome.severity == "refuse", (name, outcome)
    assert "torch.allclose" in (outcome.counterexample or {})["replaced"]


@pytest.mark.slow
def test_a_patched_leak_is_refused_by_the_whole() -> None:
    found = refusal(verify(Program("patched", assets.CAUSALITY["mean_over_time"] + PATCHES), BEST))
    assert found.counterexample


def test_a_job_that_cannot_be_started_is_no_verdict_on_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # bwrap is gone since it was chosen
    report = verify(Program("p", assets.BASE), BEST)
    assert report.accepted is None and report.error and "not installed" in report.error
    assert [check.name for check in report.checks] == ["static", "reach"]
    stranger = verify(Program("p", assets.BASE), choose("process"))
    assert stranger.accepted is False and stranger.refusals()[0].name == "sandbox"


class Answering(Worker):
    """A worker whose process answers one operation as `answer` says: what hostile code in it could send."""

    answer: Callable[[str, dict[str, Any], list[np.ndarray]], tuple[dict[str, Any], list[np.ndarray]]]

    def call(self, op: str, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
        return type(self).answer(op, *super().call(op, *args, **kwargs))


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def _infinite_counts(op: str, meta: dict[str, Any], arrays: list[np.ndarray]) -> Any:
    rows = [{**row, "flops": math.inf, "operations": math.inf, "seconds": 1.0} for row in meta.get("rows", [])]
    return {**meta, **({"rows": rows} if rows else {})}, arrays


def _huge_outputs(op: str, meta: dict[str, Any], arrays: list[np.ndarray]) -> Any:
    return meta, [np.full_like(array, 1e300) for array in arrays] if op == "forward" else arrays


def _nested_error(op: str, meta: dict[str, Any], arrays: list[np.ndarray]) -> Any:
    if op == "construct":
        raise OperationFailed({"type": _nested(900), "message": _nested(900), "line": _nested(900), "source": 1e400})
    return meta, arrays


@pytest.mark.parametrize("answer", [_infinite_counts, _huge_outputs, _nested_error])
def test_no_answer_of_the_process_is_a_fault_of_ours(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answering, "answer", staticmethod(answer), raising=False)
    monkeypatch.setattr(verifier, "Worker", Answering)
    text = assets.BASE
    if answer is _huge_outputs:  # where the checks before it let such outputs pass, one with a warning
        text = assets.STATE["constructor_sets_the_seed"]
        monkeypatch.setattr(verifier, "CHECKS", {name: CHECKS[name] for name in ("construct", "fingerprint")})
    started = time.monotonic()
    report = verify(Program("p", text), BEST)
    spent = time.monotonic() - started
    assert len(json.dumps(report.model_dump(), allow_nan=False)) < 20_000
    assert report.accepted is (answer is _huge_outputs) and report.error is None
    assert sum(outcome.seconds or 0.0 for outcome in report.checks) <= spent


def test_what_a_process_says_is_bounded_in_a_counterexample() -> None:
    found = plain({"deep": _nested(900), "long": "x" * 10_000, "many": list(range(1000)), "large": 10**400})
    assert found is not None and len(json.dumps(found)) < 5000


def test_an_endless_loop_ends_with_the_cpu_time_of_one_call() -> None:
    program = Program("p", assets.hostile("while True: pass"))
    with Worker(BEST, program, limits=Limits(seconds=120)) as worker:
        worker.load()
        worker.cpu_timeout = 0.3
        context = Context(worker, program, Options())
        with pytest.raises(WorkerDied, match=r"0\.3 s CPU time during forward"):
            worker.call("forward", {"spec": context.spec()}, [context.inputs(0, 1, 5)])


def test_a_failure_reads_as_text() -> None:
    report = verify(Program("p", assets.STATIC["imports_numpy"]), BEST)
    text = failure_text(report)
    assert text.startswith("static refuses: line 5: imports numpy; use torch") and "problem" in text
