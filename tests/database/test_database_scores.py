"""The score's parts: CSV reading, terms, the rubric's bands, program distance."""

from __future__ import annotations

import csv
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.records import Measurement
from database.evaluate_agent.rubric import Novelty, judge
from database.evaluate_agent.score import (
    PUBLISHED,
    Evidence,
    benchmark_mean,
    evaluate,
    evidence_of,
    is_accuracy,
    last_loss,
    parse_table,
    sigma_term,
)
from database.novelty import LONGEST_PROGRAM, PERMUTATIONS, distance, shingles, sketch

TRAIN = "step,1,100,2000\nx,10.9,9.0,4.2\n"


@pytest.mark.parametrize(
    "name",
    ["ARC Challenge", "LAMBADA OpenAI", "Social IQA", "SQuAD Completion", "arc_challenge", "boolq", "piqa", "swde",
     "fda", "associative_recall", "selective_copying", "induction", "cloze", "meaning_task"],
)  # fmt: skip
def test_tasks_count_by_name(name: str) -> None:
    assert is_accuracy(name)


@pytest.mark.parametrize(
    "name",
    ["average", "Avg.", "mean", "perplexity", "lambada_perplexity", "Wikitext ppl", "wikitext", "word_perplexity",
     "loss", "val loss", "bits_per_byte", "arc_easy_stderr", ""],
)  # fmt: skip
def test_what_is_no_accuracy_does_not_count(name: str) -> None:
    assert not is_accuracy(name)


def test_averages_and_perplexities_stay_out_of_the_mean() -> None:
    mean, wrong = benchmark_mean("Model,ARC Easy,PIQA,average,Wikitext ppl,word_perplexity\nx,0.3,0.5,nan,44.1,nan\n")
    assert mean is not None and mean.value == pytest.approx(0.4) and mean.n == 2 and not wrong
    assert mean.se is None, "the tasks are fixed, not drawn"


@pytest.mark.parametrize("cell", ["nan", "", "inf", "-0.1", "45.2", "n/a", "1_0", " "])
def test_a_scored_number_that_is_missing_makes_the_mean_missing(cell: str) -> None:
    mean, wrong = benchmark_mean(f"Model,ARC Easy,PIQA\nx,0.3,{cell}\n")
    assert mean is None and wrong
    evaluation = evaluate(evidence_of(TRAIN, f"m,a\nx,{cell}", None), None)
    assert evaluation.score is None and evaluation.benchmark_term is None


@given(st.lists(st.tuples(st.text(max_size=12), st.floats(0, 1)), min_size=1, max_size=12), st.text(max_size=5))
def test_any_columns_are_read_back(cells: list[tuple[str, float]], label: str) -> None:
    out = io.StringIO()
    csv.writer(out).writerows(
        [[label or "m", *(name for name, _ in cells)], [label, *(repr(value) for _, value in cells)]]
    )
    mean, wrong = benchmark_mean(out.getvalue())
    scored = [value for name, value in cells if is_accuracy(name)]
    if scored and mean is not None:
        assert mean.value == pytest.approx(math.fsum(scored) / len(scored)) and mean.n == len(scored)
    elif not scored:
        assert mean is None and wrong


@pytest.mark.parametrize("cell", ["-1", "0", "-0.0", "1e-400"])
def test_a_loss_that_is_not_above_zero_is_none(cell: str) -> None:
    """No cross-entropy is; its term would be above that of every sound design."""
    evidence = evidence_of(f"step,1,2000\nx,10.8,{cell}", "m,a\nx,0.3", None)
    assert evidence.loss is None and evidence.missing
    judged = evidence.model_copy(update={"novelty": Novelty()})
    assert evaluate(judged, None).score is None
    # As an earlier release stored it.
    stored = judged.model_copy(update={"loss": Measurement(value=float(cell), n=1)})
    evaluation = evaluate(stored, None)
    assert evaluation.score is None and evaluation.loss_term is None and "above zero" in " ".join(evaluation.missing)


def test_a_spread_between_tasks_that_was_stored_is_no_standard_error() -> None:
    evidence = evidence_of(TRAIN, "m,a,b\nx,0.3,0.5", None)
    assert evidence.benchmark is not None and evidence.benchmark.se is None
    stored = evidence.model_dump() | {"benchmark": {"value": 0.4, "n": 2, "se": 0.1}}
    assert Evidence.model_validate(stored) == evidence


def test_a_missing_benchmark_says_nothing_of_the_loss() -> None:
    missing = evaluate(evidence_of(TRAIN, "m,a\nx,", None), None).missing
    assert not any("above zero" in reason for reason in missing), missing


def test_more_cells_than_columns_leave_a_row_complete() -> None:
    assert parse_table("m,a\nx,0.5,0.7").complete
    for text in ("m,a,b\nx,0.5", "m,a\nx,", "m,a\nx,0.5,", "m,a\n", "m\nx,0.5", ""):
        assert not parse_table(text).complete, text


def test_only_the_first_two_rows_are_read() -> None:
    """A text of many megabytes is not read to its end, in which there may be anything."""
    table = parse_table("\n ,\nm,a\nx,0.5\n" + "y" * 200_000)
    assert table.complete and (table.columns, table.cells) == (["a"], ["0.5"])


@given(st.text())
def test_no_text_breaks_the_reader(text: str) -> None:
    table = parse_table(text)
    assert not table.complete or len(table.cells) >= len(table.columns) > 0
    loss = last_loss(text)
    assert loss is None or math.isfinite(loss.value)
    benchmark_mean(text)


@given(st.floats(0.1, 20), st.floats(0.1, 20), st.floats(0.01, 1))
def test_the_term_is_bounded_monotonic_and_clipped(base: float, value: float, clip: float) -> None:
    term = sigma_term(base - value, base, clip)
    assert term is not None and sigma_term(0, base, clip) == 0.5
    low, high = 1 / (1 + math.exp(6)), 1 / (1 + math.exp(-6))
    assert low <= term <= high
    better = sigma_term(base - value + 0.1, base, clip)
    assert better is not None and better >= term
    if value <= base * (1 - clip):
        assert term == pytest.approx(high)


def test_terms_by_hand() -> None:
    # DeltaNet's published second run, 4.5787 against 4.575.
    assert sigma_term(4.575 - 4.5787, 4.575, 0.1) == pytest.approx(1 / (1 + math.exp(6 * 0.0037 / 0.4575)))
    # One standard error of the published benchmark mean moves its term from 0.50 to about 0.8.
    assert sigma_term(0.0048, 0.224, 0.1) == pytest.approx(0.78, abs=0.01)
    assert sigma_term(0.1, 0.0, 0.1) is None


def test_the_published_setting_scores_from_the_csv_texts() -> None:
    evidence = evidence_of(TRAIN, "m,a,b\nx,0.2,0.3\n", None).model_copy(
        update={"novelty": Novelty(motivation=0.3, program=0.3)}
    )
    evaluation = evaluate(evidence, None)
    assert evaluation.loss_term == pytest.approx(1 / (1 + math.exp(-6 * (4.575 - 4.2) / 0.4575)))
    assert evaluation.benchmark_term == pytest.approx(1 / (1 + math.exp(-6 * 1.0)))
    assert evaluation.judgement is not None and evaluation.judge is not None
    terms = (evaluation.loss_term, evaluation.benchmark_term, evaluation.judge)
    assert evaluation.score == pytest.approx(sum(term for term in terms if term is not None))
    assert "not counted" in evaluation.judgement.parts["complexity"].how


@pytest.mark.parametrize(
    ("gain", "score"),
    [
        (-0.2, 1),
        (-0.06, 2),
        (-0.04, 3),
        (-0.02, 4),
        (0, 5),
        (0.009, 5),
        (0.02, 6),
        (0.05, 7),
        (0.1, 8),
        (0.2, 9),
        (0.3, 10),
    ],
)
def test_performance_bands(gain: float, score: int) -> None:
    found = judge(
        loss=Measurement(value=PUBLISHED.loss * (1 - gain), n=1),
        benchmark=None,
        flops_per_token=None,
        work_exponent=None,
        novelty=Novelty(),
        anchor=False,
        baseline=PUBLISHED,
    )
    assert found is not None and found.performance_score == score


@pytest.mark.parametrize(
    ("exponent", "flops", "score"),
    [(2.0, 1000, 1), (1.6, 1000, 2), (1.4, 1000, 3), (1.2, 1000, 4), (1.1, 1000, 5), (1.0, 5000, 3), (1.0, 2000, 6),
     (1.0, 1300, 7), (1.0, 1000, 8), (1.0, 900, 9), (1.0, 700, 10), (1.0, None, 7), (None, 700, 8)],
)  # fmt: skip
def test_complexity_bands(exponent: float | None, flops: float | None, score: int) -> None:
    found = judge(
        loss=Measurement(value=4.5, n=1),
        benchmark=None,
        flops_per_token=flops,
        work_exponent=exponent,
        novelty=Novelty(),
        anchor=False,
        baseline=PUBLISHED.model_copy(update={"flops_per_token": 1000.0}),
    )
    assert found is not None and found.complexity_score == score


@pytest.mark.parametrize(("seeds", "margin"), [(2, 12.706 * 0.03 * 1.5**0.5), (3, 4.303 * 0.03 * (4 / 3) ** 0.5)])
def test_few_seeds_widen_what_is_no_difference(seeds: int, margin: float) -> None:
    baseline = PUBLISHED.model_copy(
        update={"seeds": list(range(seeds)), "sd_dof": seeds - 1, "loss": 2.0, "loss_sd": 0.03}
    )

    def performance(gain: float) -> int:
        found = judge(
            loss=Measurement(value=2.0 - gain, n=1),
            benchmark=None,
            flops_per_token=None,
            work_exponent=None,
            novelty=Novelty(),
            anchor=False,
            baseline=baseline,
        )
        assert found is not None
        return found.performance_score

    assert performance(margin * 0.999) == performance(-margin * 0.999) == 5
    assert performance(margin * 1.001) > 5 > performance(-margin * 1.001)


def test_the_standard_is_five_and_a_copy_gains_next_to_nothing() -> None:
    def weighted(anchor: bool, distance_: float, flops: float | None = 1000.0) -> float:
        found = judge(
            loss=Measurement(value=4.575, n=1),
            benchmark=None,
            flops_per_token=flops,
            work_exponent=None if flops is None else 1.0,
            novelty=Novelty(motivation=distance_, motivation_index=1, program=distance_, program_index=1),
            anchor=anchor,
            baseline=PUBLISHED.model_copy(update={"flops_per_token": 1000.0}),
        )
        assert found is not None
        return found.weighted_final_score

    assert weighted(True, 0.0) == 5
    assert weighted(False, 0.0) == pytest.approx(0.30 * 5 + 0.25 * 1 + 0.45 * 8)
    assert weighted(False, 0.3) > weighted(False, 0.0) > weighted(False, 0.0, 1300.0)


@given(st.floats(0, 1), st.floats(0, 1))
def test_innovation_grows_with_distance(a: float, b: float) -> None:
    def innovation(distance_: float) -> int:
        found = judge(
            loss=Measurement(value=4.5, n=1),
            benchmark=None,
            flops_per_token=None,
            work_exponent=None,
            novelty=Novelty(motivation=distance_, motivation_index=1, program=distance_, program_index=1),
            anchor=False,
            baseline=PUBLISHED,
        )
        assert found is not None
        return found.innovation_score

    low, high = sorted((a, b))
    assert 1 <= innovation(low) <= innovation(high) <= 10
    assert innovation(0) == 1


@given(st.lists(st.sampled_from("abcdefgh"), min_size=30, max_size=300), st.integers(0, 20))
def test_sketches_estimate_the_distance_of_programs(tokens: list[str], changes: int) -> None:
    program = " ".join(tokens)
    changed = " ".join(tokens[changes:] + ["z"] * changes)
    a, b = shingles(program), shingles(changed)
    assert distance(a, a) == 0 and shingles(f"# a comment\n{program}  # another").tolist() == a.tolist()
    exact = distance(a, b)
    assert 0 <= exact <= 1 and exact == distance(b, a)
    left, right = sketch(a), sketch(b)
    equal = sum(left[4 * i : 4 * i + 4] == right[4 * i : 4 * i + 4] for i in range(PERMUTATIONS)) / PERMUTATIONS
    assert equal == pytest.approx(1 - exact, abs=0.25)


def test_of_a_long_program_only_the_beginning_is_compared() -> None:
    """The tokens of 60 MiB took gigabytes, and all requests waited for seconds while they were found."""
    beginning = "x = y\n" * (LONGEST_PROGRAM // 6) + "#" * (LONGEST_PROGRAM % 6)
    assert shingles(beginning + "\nanother = z + 1\n").tolist() == shingles(beginning).tolist()
    assert len(shingles("\nanother = z + 1\n" + beginning)) > len(shingles(beginning))
