"""Each check on its own, on programs with one planted fault: all in one sandboxed process, loaded one after another.

The whole verifier, with a process for each program, is tested in test_verifier_verdicts.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import verifier_assets as assets

from common.records import CheckOutcome
from pipeline.designer import DELTA_NET, render
from training.programs import Program
from training.reports import failure_text
from training.sandbox import choose
from training.scorer.client import Worker
from training.scorer.verifier import CHECKS, Options, cost, reach, switches
from training.scorer.verifier.context import Context
from training.scorer.verifier.source import chunk_sizes, own_switches, raises_at

BEST = choose("auto")
pytestmark = pytest.mark.skipif(BEST.backend != "bubblewrap", reason=f"no bubblewrap here: {BEST.note}")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(BEST, Program("base", assets.BASE)) as started:
        yield started


def judged(
    worker: Worker, text: str, *checks: str, options: Options | None = None
) -> tuple[Context, list[CheckOutcome]]:
    """The outcomes of these checks of a program that is taken to run in float64 and both training precisions."""
    worker.program = Program("p", text)
    context = Context(worker, worker.program, options or Options(), precise="float64", lowest="float64")
    context.dtypes = ("float32", "bfloat16")
    worker.load()
    found: list[CheckOutcome] = []
    for check in checks:
        found += CHECKS[check](context)
    return context, found


def refusal(found: list[CheckOutcome]) -> CheckOutcome:
    (first, *_) = [outcome for outcome in found if not outcome.passed and outcome.severity == "refuse"]
    assert first.detail and first.counterexample and len(str(first.counterexample)) < 3000, first
    return first


@pytest.mark.parametrize(
    ("check", "name", "group"),
    [
        ("construct", "seven_heads_at_most", assets.CONSTRUCT),
        ("construct", "breaks_behind_a_switch", assets.CONSTRUCT),
        ("cost", "quadratic_in_eval_mode", assets.COST),
        ("cost", "quadratic_in_the_backward_pass", assets.COST),
        ("gradients", "unused_parameters", assets.GRADIENTS),
        ("gradients", "distance_of_equal_tokens", assets.GRADIENTS),
        ("shapes", "float64_output", assets.SHAPES),
        ("causality", "leak_1e-4", assets.CAUSALITY),
        ("causality", "zero_gated_leak", assets.CAUSALITY),
        ("causality", "under_autocast_only", assets.CAUSALITY),
        ("causality", "data_dependent_length", assets.CAUSALITY),
        ("causality", "sorted_ranks", assets.CAUSALITY),
        ("causality", "token_173", assets.CAUSALITY),
        ("causality", "token_173_recording", assets.CAUSALITY),
        ("causality", "length_256_without_gradients", assets.CAUSALITY),
        ("causality", "last_bits", assets.CAUSALITY),
        ("causality", "from_eight_rows", assets.CAUSALITY),
        ("causality", "behind_a_layer_only", assets.CAUSALITY),
        ("causality", "with_frozen_weights", assets.CAUSALITY),
        ("causality", "between_layers_in_training", assets.CAUSALITY),
        ("causality", "between_layers_when_scored", assets.CAUSALITY),
        ("batch", "mean_over_the_batch_of_training", assets.BATCH),
        ("state", "layer_of_before", assets.STATE),
        ("state", "remembers_in_training", assets.STATE),
        ("batch", "first_row_leaks", assets.BATCH),
        ("state", "remembers_content", assets.STATE),
        ("state", "module_remembers_content", assets.STATE),
        ("state", "running_mean", assets.STATE),
        ("state", "noise_in_eval_mode", assets.STATE),
        ("state", "keeps_weights", assets.STATE),
        ("state", "remembers_by_first_token", assets.STATE),
        ("state", "constructor_sets_the_seed", assets.STATE),
        ("state", "fixes_the_seed", assets.STATE),
        ("state", "draws_for_nothing", assets.STATE),
        ("state", "drifts", assets.STATE),
        ("gradients", "frozen", assets.GRADIENTS),
        ("batch", "five_rows_and_more", assets.BATCH),
        ("learns", "no_memory", assets.LEARNS),
        ("length", "huge", assets.LENGTH),
        ("length", "sum_over_time", assets.LENGTH),
        ("length", "hidden_growth", assets.LENGTH),
        ("length", "table_of_positions", assets.LENGTH),
        ("length", "jumps", assets.LENGTH),
        ("learns", "gradient_turned_around", assets.LEARNS),
    ],
)
def test_a_planted_fault_is_refused(worker: Worker, check: str, name: str, group: dict[str, str]) -> None:
    _, found = judged(worker, group[name], check)
    assert refusal(found).name == check


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ("[o, None, past_key_values]", "got a list of 3"),
        ("(o, None)", "got a tuple of 2"),
        ("o", "got one float32"),
    ],
)
def test_what_was_returned_instead_of_three_values_is_told(worker: Worker, returned: str, told: str) -> None:
    _, found = judged(worker, assets.planted(assets.RETURN, f"        return {returned}\n"), "shapes")
    assert refusal(found).detail.endswith(told)


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("sums_without_own_chunk", ("causality", "switches")),
        ("output_from_zero", ("gradients", "learns")),
        ("chunks_of_48", ("cost", "switches")),
        ("operator_of_fla", ("shapes", "cost", "gradients")),
    ],
)
def test_an_honest_habit_is_no_fault(worker: Worker, name: str, checks: tuple[str, ...]) -> None:
    context, found = judged(worker, assets.HONEST[name], "construct", *checks)
    assert all(outcome.passed or outcome.severity == "warn" for outcome in found), found
    assert context.switches


def test_counted_lengths_favour_no_chunk_size() -> None:
    for lengths in (cost.LENGTHS, cost.EVAL_LENGTHS, switches.COUNTED):
        for size in range(1, 257):
            chunks = [math.ceil(length / size) for length in lengths]
            growth = [later / earlier for earlier, later in itertools.pairwise(chunks)]
            wanted = [later / earlier for earlier, later in itertools.pairwise(lengths)]
            assert all(got <= most for got, most in zip(growth, wanted, strict=True)), (lengths, size)
            assert size < 8 or len({length % size == 0 for length in lengths}) == 1, (lengths, size)


@pytest.mark.parametrize("name", ["reference_switch", "own_switch", "later_layers"])
def test_a_leak_behind_a_switch_is_refused_as_a_leak(worker: Worker, name: str) -> None:
    _, found = judged(worker, assets.SWITCHES[name], "construct", "switches")
    first = refusal(found)
    assert first.name == "causality" and first.counterexample and first.counterexample["with"] in first.detail


def test_what_fla_has_on_a_gpu_only_is_said_to_be(worker: Worker) -> None:
    worker.program = Program("p", assets.CONSTRUCT["no_stand_in"])
    found = CHECKS["construct"](Context(worker, worker.program, Options()))
    assert "fla.ops.kda needs a CUDA device; without one there are fla.modules" in refusal(found).detail


def test_what_a_program_raises_itself_is_unsupported_and_no_fault(worker: Worker) -> None:
    context, found = judged(worker, assets.UNSUPPORTED, "construct", "switches")
    assert all(outcome.passed for outcome in found), found
    assert context.facts["unsupported"] == ["expand_v=2.0", "qk_norm='sum'"]
    assert "unsupported: expand_v=2.0" in found[0].detail


def test_what_other_models_use_is_not_replaced() -> None:
    """In a process of its own: the next program would be judged by what this one left."""
    with Worker(BEST, Program("p", assets.REPLACES)) as own:
        context, (outcome, *_) = judged(own, assets.REPLACES, "state")
        reply, _ = own.call("environment", {"spec": context.spec()}, [context.inputs(0, 2, 9)])
    assert set(reply["imported"]["replaced"]) == assets.REPLACED
    assert not outcome.passed and "hooks on all modules from 0 to" in outcome.detail


@pytest.mark.parametrize("name", assets.COUNTS)
def test_what_only_counts_calls_or_changes_speed_is_a_warning(worker: Worker, name: str) -> None:
    _, found = judged(worker, assets.COUNTS[name], *(("shapes",) if "module" in name else ()), "state")
    failed = [outcome for outcome in found if not outcome.passed]
    assert failed and all(outcome.severity == "warn" for outcome in failed), found


STEP = """
    def step(self, x_t, state=None):
        past = x_t if state is None else torch.cat([state, x_t], dim=1)
        return self(past)[0][:, -1:]{wrong}, {kept}
"""


@pytest.mark.parametrize(
    ("wrong", "kept", "said"),
    [
        ("", "past", "the cache grows"),
        (" * 1.01", "past", "differs from the parallel form"),
        ("[:, :, :3]", "past", "of another shape"),
        ("", "past.no", "raises AttributeError"),
    ],
)
def test_a_step_is_compared_with_forward(worker: Worker, wrong: str, kept: str, said: str) -> None:
    text = assets.BASE.rstrip() + "\n" + STEP.format(wrong=wrong, kept=kept)
    context, (outcome,) = judged(worker, text, "decode")
    assert outcome.severity == "warn" and not outcome.passed and said in outcome.detail
    assert context.facts == {"decode": False, "state_bytes": None}


def test_a_step_of_a_design_is_found_equal_to_forward(worker: Worker) -> None:
    context, (outcome,) = judged(worker, render(DELTA_NET, "delta_net_step"), "decode")
    assert outcome.passed, outcome.detail
    assert context.facts["decode"] is True and context.facts["state_bytes"] > 0


def test_decoding_is_reported_only_where_it_holds(worker: Worker) -> None:
    context, found = judged(worker, assets.DECODING, "decode")
    assert found[0].passed and context.facts == {"decode": True, "state_bytes": 64 * 8}
    for name, text in assets.DECODE.items():
        context, (outcome,) = judged(worker, text, "decode")
        assert outcome.severity == "warn" and not outcome.passed, name
        assert context.facts == {"decode": False, "state_bytes": None}
    context, (outcome,) = judged(worker, assets.BASE, "decode")
    assert outcome.passed and context.facts["decode"] is None


def test_size_beside_the_baseline_is_recorded(worker: Worker) -> None:
    options = Options(baseline_mixer_parameters=10_000, baseline_flops_per_token=None)
    context = Context(worker, Program("p", assets.BASE), options, facts={"mixer_parameters": 20_000})
    (outcome,) = CHECKS["matched"](context)
    assert outcome.passed and context.facts["parameter_ratio"] == 2.0 and context.facts["flops_ratio"] is None


def test_a_counterexample_reads_as_text(worker: Worker) -> None:
    from common.records import CheckReport

    _, found = judged(worker, assets.CAUSALITY["mask_includes_next"], "causality")
    text = failure_text(CheckReport(program="p", accepted=False, checks=found))
    assert text.startswith("causality refuses: ") and "\n  t: " in text and "\n  seed: " in text


@pytest.mark.parametrize(
    "line",
    [
        "torch.sys.exit",
        "torch.serialization.os.listdir",
        "__import__('os')",
        "globals()",
        "torch.zeros(1).numpy()",
        "(lambda: 0).__globals__",
        "__builtins__",
        "torch._C._len_torch_dispatch_stack()",
    ],
)
def test_ways_around_the_import_list_are_named(line: str) -> None:
    honest = reach.run(assets.BASE)
    assert honest.passed
    found = reach.run(f"{assets.BASE}\n\nX = {line}\n")
    assert not found.passed and found.severity == "refuse"
    assert found.counterexample and found.counterexample["line"] == assets.BASE.count("\n") + 3


def test_the_text_suggests_what_to_try() -> None:
    assert chunk_sizes("CHUNK = 48\ndef f(x, chunk_size=48, width=7):\n    return g(x, window=20)\n") == [48, 20]
    text = (
        "class DeltaNet:\n    def __init__(self, mode='chunk', ahead=False, num_heads=4, **kwargs):\n"
        "        if mode == 'all':\n            raise ValueError(\n                'no')\n"
        "        self.extra = kwargs.get('extra', True)\n"
    )
    assert own_switches(text) == {
        "mode='all'": {"mode": "all"},
        "ahead=True": {"ahead": True},
        "extra=False": {"extra": False},
    }
    assert raises_at(text, 5) and not raises_at(text, 6) and not raises_at("not python (", 1)
