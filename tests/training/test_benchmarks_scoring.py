"""Scoring from logits: held-out loss, the causality audit, lm-eval's log-likelihoods, and the mean over counted tasks.

The logit servers here stand in for a sandboxed worker behind the same two methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from common.errors import JobError
from common.records import BenchmarkScore, RunRecord
from tests.training.models import Hashed, Model
from training.baseline import build_baseline, counted_tasks, recount
from training.data import tokenizer
from training.data.tasks import SEPARATOR, Item, generate_items
from training.profiles import TaskSpec, load_profile
from training.results import benchmark_mean, csv_text, curve_columns, element_result
from training.scorer.benchmarks import WorkerLM, require_official, run_benchmarks
from training.scorer.heldout import NotFiniteError, heldout_loss, log_softmax
from training.scorer.items import item_scores, perplexity_of

SPEC = TaskSpec(symbols=32, recall_pairs=4, copy_items=4, copy_length=12, induction_length=12)
VOCAB = 384


class Recaller(Model):
    """Knows what followed the last token before."""

    def next(self, seen: np.ndarray) -> np.ndarray:
        logits = np.zeros(self.vocab, dtype=np.float32)
        earlier = np.flatnonzero(seen[:-1] == seen[-1])
        if len(earlier) and seen[-1] != SEPARATOR:
            logits[seen[earlier[-1] + 1]] = 20
        return logits


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Codec:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.train(["The state of a layer is a matrix, and a token writes into it. " * 3], VOCAB, SPEC.symbols).save(
        str(path)
    )
    return tokenizer.Codec(path)


def test_heldout_loss_is_the_mean_over_tokens_with_its_error_over_rows() -> None:
    model = Hashed(vocab=50)
    rows = np.random.default_rng(0).integers(0, 50, (6, 9)).astype(np.int32)
    losses = [np.mean([-log_softmax(model.next(row[: at + 1]))[row[at + 1]] for at in range(8)]) for row in rows]
    answer = heldout_loss(model, rows)
    assert answer["n"] == 48
    assert answer["value"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert answer["se"] == pytest.approx(np.std(losses, ddof=1) / math.sqrt(6), abs=1e-5)


def test_heldout_loss_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 50, (3, 9)).astype(np.int32)
    whole = heldout_loss(Hashed(vocab=50), rows)
    monkeypatch.setattr("training.scorer.heldout.MOST_BYTES", 4 * 50 * 3)
    pieces = heldout_loss(Hashed(vocab=50), rows)
    assert pieces["value"] == pytest.approx(whole["value"], abs=1e-6)


def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary() -> None:
    rows = np.zeros((4, 5), dtype=np.int32)
    assert heldout_loss(Model(vocab=64), rows)["value"] == pytest.approx(math.log(64), abs=1e-6)


def test_loglikelihoods_of_several_tokens_and_shared_inputs(codec: tokenizer.Codec) -> None:
    model = Hashed()
    worker = WorkerLM(model, codec)
    context, answers = (
        codec.encode_items("The state of"),
        [codec.encode_items(text) for text in (" a layer", " tokens")],
    )
    got = worker._loglikelihood_tokens([(("", ""), context, answer) for answer in answers])
    for (score, _), answer in zip(got, answers, strict=True):
        row = [codec.end, *context, *answer]
        start = len(row) - len(answer)
        wanted = sum(float(log_softmax(model.next(np.array(row[:at])))[row[at]]) for at in range(start, len(row)))
        assert score == pytest.approx(wanted, abs=1e-4)
    model.rows = 0
    worker._loglikelihood_tokens([(("", ""), context, [token]) for token in range(20)])
    assert model.rows == 1, "choices of one token share one input"


def test_lm_eval_scores_a_model_that_knows_and_one_that_guesses(codec: tokenizer.Codec) -> None:
    names = tokenizer.special_tokens(SPEC.symbols)
    items = {task: generate_items(task, SPEC, 60, names, 3) for task in ("recall", "induction")}
    known = run_benchmarks(Recaller(), codec, ["recall", "induction"], items, 10)
    right = {name: known["recall"][name] for name in ("value", "n", "se", "chance")}
    assert right == {"value": 1.0, "n": 60, "se": 0.0, "chance": 0.25}
    assert known["induction"]["value"] == 1.0
    assert known["recall"]["items"]["right"] == "1" * 60 and known["recall"]["bits_per_byte"]["value"] < 0.01
    guessed = run_benchmarks(Hashed(), codec, ["recall"], items, 10)["recall"]
    assert abs(guessed["value"] - 0.25) < 4 * guessed["se"] and guessed["se"] == pytest.approx(0.056, abs=0.02)


def test_every_item_is_kept_with_the_bits_of_its_answer(codec: tokenizer.Codec) -> None:
    names = tokenizer.special_tokens(SPEC.symbols)
    items = generate_items("recall", SPEC, 30, names, 3)
    scores = run_benchmarks(Hashed(), codec, ["recall"], {"recall": items}, 10)["recall"]
    kept = scores["items"]
    assert [mark == "1" for mark in kept["right"]] == [_chosen(codec, item) == item["answer"] for item in items]
    assert scores["value"] == kept["right"].count("1") / 30
    for item, bits in zip(items, kept["bits_per_byte"], strict=True):
        answer = item["choices"][item["answer"]]
        log_p = _log_p(codec, item["context"])[codec.encode_items(answer)[0]]
        assert bits == pytest.approx(-log_p / math.log(2) / len(answer.encode()), abs=1e-4)
    mean = scores["bits_per_byte"]
    assert mean["value"] == pytest.approx(np.mean(kept["bits_per_byte"]), abs=1e-4) and mean["n"] == 30
    assert mean["se"] == pytest.approx(np.std(kept["bits_per_byte"], ddof=1) / math.sqrt(30), abs=1e-4)


def _log_p(codec: tokenizer.Codec, context: str) -> np.ndarray:
    return log_softmax(Hashed().next(np.array([codec.end, *codec.encode_items(context)])))


def _chosen(codec: tokenizer.Codec, item: Item) -> int:
    said = _log_p(codec, item["context"])
    return int(np.argmax([said[codec.encode_items(choice)[0]] for choice in item["choices"]]))


@pytest.mark.parametrize(
    ("sample", "bits"),
    [
        ({"target": 1, "arguments": [("q", " a"), ("q", " bcd")]}, 2.0),
        ({"target": "bcd", "arguments": [("q", " a"), ("q", " bcd")]}, 2.0),
        ({"target": [0, 1], "arguments": [("q", " a"), ("q", " bcd")]}, None),
        ({"target": "other", "arguments": [("q", " a"), ("q", " bcd")]}, None),
        ({"target": 1, "arguments": [("q", " a"), ("q", " éd")]}, 2.0),  # four bytes too
    ],
)
def test_the_correct_answer_is_found_in_every_form_of_target(sample: dict[str, Any], bits: float | None) -> None:
    said = [(-1.0, False), (-8 * math.log(2), True)]
    logged = {"doc_id": 0, "acc": 1.0, "filtered_resps": said, **sample}
    found = item_scores([{"doc_id": 0, "filtered_resps": []}, logged], "acc", "multiple_choice")
    assert found["items"]["right"] == "1"
    assert found.get("bits_per_byte", {"value": None})["value"] == (None if bits is None else pytest.approx(bits))


def test_scores_between_right_and_wrong_are_kept_as_they_are() -> None:
    logged = [{"doc_id": 1, "f1": 0.25}, {"doc_id": 0, "f1": 1.0}]
    assert item_scores(logged, "f1", "generate_until") == {"items": {"partial": [1.0, 0.25], "bits_per_byte": None}}


def test_greedy_generation_stops_where_it_is_told(codec: tokenizer.Codec) -> None:
    text = codec.encode_items("a layer is a")

    class Says(Model):
        def next(self, seen: np.ndarray) -> np.ndarray:
            logits = np.zeros(self.vocab, dtype=np.float32)
            logits[text[(len(seen) - 2) % len(text)]] = 1
            return logits

    asked = Request(("T", {"until": [" is"], "max_gen_toks": 12}))
    assert WorkerLM(Says(), codec).generate_until([asked]) == ["a layer"]


@dataclass
class Request:
    args: tuple[Any, ...]


WORDS = "Six zebras vex two quick dwarfs, who jump by night and hide at dawn."


def test_continuations_are_batched_by_length_and_equal_requests_answered_once(
    codec: tokenizer.Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.scorer.benchmarks.MOST_TOKENS", 400)
    random = np.random.default_rng(0)
    contexts = [" ".join(random.choice(WORDS.split(), random.integers(1, 12))) for _ in range(20)]
    options = [{"until": until, "max_gen_toks": most} for until in (["e"], [], "a", ["t", " i"]) for most in (3, 9)]
    requests = [Request((context, options[at % 8])) for at, context in enumerate([*contexts, *contexts[:8]])]
    model = Hashed(VOCAB)
    worker = WorkerLM(model, codec)
    got = worker.generate_until(requests)
    assert got == [_continued(codec, *request.args) for request in requests]
    # Places of those that ended were taken by others, and no batch of several is over the bound.
    shapes = [call.tokens.shape for call in model.calls]
    assert all(rows == 1 or rows * width <= 400 for rows, width in shapes) and 1 < shapes[0][0] < max(shapes)[0]
    read = sum(int(call.places[:, 1].sum()) + len(call.places) for call in model.calls if call.places is not None)
    padded = sum(rows * width for rows, width in shapes)
    assert len(shapes) < model.rows / 3 and padded < 1.4 * read, "rows of a batch are of about one length"
    asked = len(model.calls)
    assert worker.generate_until(requests[::-1]) == got[::-1] and len(model.calls) == asked


def _continued(codec: tokenizer.Codec, context: str, options: dict[str, Any]) -> str:
    """Token by token, alone."""
    row, begun, until = (
        [codec.end, *codec.encode_items(context)],
        1 + len(codec.encode_items(context)),
        options["until"],
    )
    stops = [until] if isinstance(until, str) else until
    while True:
        row.append(int(Hashed(VOCAB).next(np.array(row, dtype=np.int32)).argmax()))
        text = codec.decode(row[begun:])
        cut = min((text.index(stop) for stop in stops if stop in text), default=None)
        if cut is not None or len(row) - begun == options["max_gen_toks"] or row[-1] == codec.end:
            return text[:cut]


def test_whole_texts_are_scored_together_and_as_alone(codec: tokenizer.Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.scorer.benchmarks.LONGEST", 16)
    texts = [WORDS[:size] for size in (68, 5, 30, 68, 12)]
    model = Hashed(VOCAB)
    together = WorkerLM(model, codec).loglikelihood_rolling([Request((text,)) for text in texts])
    alone = [WorkerLM(Hashed(VOCAB), codec).loglikelihood_rolling([Request((text,))])[0] for text in texts]
    assert together == pytest.approx(alone, rel=1e-6) and together[0] == together[3]
    assert len(model.calls) == 1 < len(texts) < model.rows
    # As many places a batch as their logits may take.
    monkeypatch.setattr("training.scorer.benchmarks.MOST_LOGITS", 4 * VOCAB * 40)
    model.calls.clear()
    assert WorkerLM(model, codec).loglikelihood_rolling([Request((text,)) for text in texts]) == pytest.approx(alone)
    asked = [len(call.places) for call in model.calls if call.places is not None]
    assert len(asked) > 1 and max(asked) <= 40
    assert WorkerLM(model, codec).loglikelihood_rolling([]) == []


def test_whole_texts_are_scored_in_windows_that_follow_each_other(
    codec: tokenizer.Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.scorer.benchmarks.LONGEST", 8)
    model, text = Hashed(vocab=VOCAB), "The state of a layer is a matrix, and a token writes into it. So it does."

    ids = codec.encode_text([text]).tolist()[:-1]
    assert len(ids) > 20
    expected = 0.0
    for at, token in enumerate(ids):
        start = at // 8 * 8
        # A full window knows the token before it; there is room for the end token only where it is short.
        before = [ids[start - 1]] if start and start + 8 <= len(ids) else [codec.end, *ids[max(0, start - 1) : start]]
        seen = np.array([*before, *ids[start:at]], dtype=np.int32)
        expected += float(log_softmax(model.next(seen))[token])
    assert WorkerLM(model, codec).loglikelihood_rolling([Request((text,))]) == [pytest.approx(expected, abs=1e-3)]


def test_perplexities_of_words_and_of_answers_come_with_their_error(codec: tokenizer.Codec) -> None:
    """Tasks of lm-eval's two forms over a model that gives every token the same probability."""
    from training.scorer import benchmarks

    texts = ["a layer is", "a matrix and a token is", "it writes"]
    documents = Dataset.from_list([{"page": text} for text in texts])
    common = {
        "custom_dataset": lambda **_: {"test": documents}, "test_split": "test", "doc_to_target": "{{page}}",
    }  # fmt: skip
    rolling = {
        **common, "task": "wiki", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }  # fmt: skip
    answers = {
        **common, "task": "lambada", "output_type": "loglikelihood", "doc_to_text": "The",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }  # fmt: skip
    manager, model = benchmarks.TaskManager(include_defaults=False), Model(VOCAB)
    scores = benchmarks._evaluate(WorkerLM(model, codec), manager, [rolling], None)
    sizes = [len(codec.encode_text([text])) - 1 for text in texts]
    words = [len(text.split()) for text in texts]
    found = scores["wiki"].pop("perplexity")
    assert scores["wiki"] == {} and found["n"] == 3 and found["se"] > 0
    assert found["value"] == pytest.approx(VOCAB ** (sum(sizes) / sum(words)), rel=1e-4)
    model.calls.clear()
    told = benchmarks._evaluate(WorkerLM(model, codec), manager, [answers], None)["lambada"]
    assert told["value"] == 0 and told["n"] == 3 and len(told["items"]["right"]) == 3
    asked = sum(len(call.places) for call in model.calls if call.places is not None)
    assert told["perplexity"]["value"] == pytest.approx(VOCAB ** (asked / 3), rel=1e-4)
    assert told["perplexity"]["se"] > 0


class Sure(Model):
    """Finite logits that leave everything but one token next to impossible."""

    def next(self, seen: np.ndarray) -> np.ndarray:
        logits = np.zeros(self.vocab, dtype=np.float32)
        logits[1] = 1e5
        return logits


@pytest.mark.parametrize("kind", ["loglikelihood_rolling", "loglikelihood"])
def test_an_infinite_perplexity_is_the_programs_fault(codec: tokenizer.Codec, kind: str) -> None:
    from training.scorer import benchmarks

    documents = Dataset.from_list([{"page": text} for text in ("a layer is", "it writes")])
    metric = {"metric": "word_perplexity"} if kind.endswith("rolling") else {
        "metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False,
    }  # fmt: skip
    task = {
        "task": "text", "output_type": kind, "custom_dataset": lambda **_: {"test": documents}, "test_split": "test",
        "doc_to_text": "" if kind.endswith("rolling") else "The", "doc_to_target": "{{page}}", "metric_list": [metric],
    }  # fmt: skip
    with pytest.raises(NotFiniteError, match="a perplexity of text is infinite"):
        benchmarks._evaluate(WorkerLM(Sure(VOCAB), codec), benchmarks.TaskManager(include_defaults=False), [task], None)


def test_a_perplexity_over_what_a_number_holds_is_left_out() -> None:
    said = perplexity_of([{"perplexity": -699.0}, {"perplexity": -701.0}])["perplexity"]
    assert said["value"] == pytest.approx(math.exp(700)) and said["se"] > 0
    # The mean can be told, its error cannot.
    assert perplexity_of([{"perplexity": 1e8}, {"perplexity": -1e8 - 1390}])["perplexity"]["se"] is None
    assert perplexity_of([{"word_perplexity": (-2804.0, 4)}]) == {}
    assert perplexity_of([{"word_perplexity": (-1e30, 4)}, {"word_perplexity": (-math.inf, 4)}]) == {}


def test_an_official_task_without_its_data_names_the_task(
    codec: tokenizer.Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("training.scorer.benchmarks.TaskManager", _OnlyPiqa)
    with pytest.raises(JobError, match="piqa"):
        run_benchmarks(Model(), codec, ["piqa"], {}, 10)
    # And so before a run begins, which costs nothing then.
    with pytest.raises(JobError, match=r"piqa[^$]*--benchmarks own"):
        require_official(["cloze", "piqa"])


def test_an_error_of_an_official_task_that_says_nothing_is_told_by_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def load(self, names: list[str]) -> None:
            raise TimeoutError

    monkeypatch.setattr("training.scorer.benchmarks._manager", Silent)
    with pytest.raises(JobError, match="piqa cannot run here: TimeoutError"):
        require_official(["piqa"])


class _OnlyPiqa:
    """lm-eval's own task list takes half a minute to index; one entry of it is enough here."""

    def __new__(cls, **_: object) -> object:
        import lm_eval.tasks as library

        return library.TaskManager(include_path=Path(library.__file__).parent / "piqa", include_defaults=False)


def record(name: str, seed: int, loss: float, scores: dict[str, float]) -> RunRecord:
    benchmarks = {task: BenchmarkScore(value=value, n=100, se=0.04, chance=0.25) for task, value in scores.items()}
    run = RunRecord(
        run_id=f"{name}{seed}", name=name, profile="cpu", seed=seed, status="finished", program_sha256=name,
        baseline_key="k", benchmarks=benchmarks, benchmark_mean=benchmark_mean(benchmarks), parameters=1000,
    )  # fmt: skip
    return run.model_copy(update={"heldout_loss": BenchmarkScore(value=loss, n=1000, se=0.01)})


def test_the_baseline_is_delta_nets_mean_over_the_tasks_that_carry_signal() -> None:
    runs = [
        record("delta_net", 0, 4.0, {"recall": 0.8, "copying": 0.30, "cloze": 0.26, "parity": 0.05}),
        record("delta_net", 1, 4.2, {"recall": 0.6, "copying": 0.31, "cloze": 0.20, "parity": 0.02}),
        record("gated_delta_net", 0, 3.9, {"recall": 0.8, "copying": 0.5, "cloze": 0.30, "parity": 0.0}),
    ]
    assert counted_tasks(runs) == ["recall", "copying"]
    base = build_baseline(runs, "k", load_profile("cpu"))
    assert base.tasks == ["recall", "copying"] and base.seeds == [0, 1]
    assert base.loss == pytest.approx(4.1) and base.loss_sd == pytest.approx(0.1414, abs=1e-4)
    assert base.sd_dof == 1  # gated_delta_net has one seed, which says nothing of spread
    both = build_baseline([*runs, record("gated_delta_net", 1, 3.9, {"recall": 0.8})], "k", load_profile("cpu"))
    assert both.sd_dof == 2 and both.loss_sd == pytest.approx(0.1)
    assert base.benchmark == pytest.approx((0.55 + 0.455) / 2)
    assert base.loss_clip == pytest.approx(8 * 0.1414 / 4.1, abs=1e-3) and base.benchmark_clip > 0.1
    published = build_baseline(runs, "k", load_profile("20m"))
    assert (published.loss_clip, published.benchmark_clip) == (0.1, 0.1)
    again = recount(runs[0], base.tasks)
    assert again.benchmark_mean is not None and again.benchmark_mean.value == pytest.approx(0.55)
    assert again.benchmark_mean.n == 200 and not again.benchmarks["cloze"].counted
    assert not again.benchmarks["parity"].counted, "far below chance is no signal"


def test_runs_of_another_key_and_no_runs_are_refused() -> None:
    run = record("delta_net", 0, 4.0, {"recall": 0.8})
    with pytest.raises(JobError, match="another baseline key"):
        build_baseline([run], "other", load_profile("cpu"))
    with pytest.raises(JobError, match="delta_net"):
        build_baseline([run.model_copy(update={"name": "x"})], "k", load_profile("cpu"))


@pytest.mark.parametrize(("value", "marked"), [(0.1, True), (0.33, True), (0.34, False)])
def test_a_score_is_marked_unless_it_is_above_chance(value: float, marked: bool) -> None:
    assert BenchmarkScore(value=value, n=40, se=0.04, chance=0.25).not_above_chance is marked


def test_where_no_task_carries_signal_all_count() -> None:
    assert counted_tasks([record("delta_net", 0, 4.0, {"recall": 0.26, "cloze": 0.24})]) == ["recall", "cloze"]


def test_columns_are_means_since_the_column_before() -> None:
    reports = [(1, 7.0)] + [(step, 6.0 - step / 1000) for step in range(10, 2001, 10)]
    columns = curve_columns(reports, 2000)
    assert list(columns)[:3] == ["1", "100", "200"] and list(columns)[-1] == "2000" and len(columns) == 21
    inside = [loss for step, loss in reports if 100 < step <= 200]
    assert columns["200"] == pytest.approx(np.mean(inside))
    short = curve_columns(reports[:8], 2000)
    assert list(short) == ["1", "70"], "a run that ended early keeps what it reached"


def test_element_text_has_a_header_and_one_row() -> None:
    run = record("delta_net_a,b", 0, 4.0, {"recall": 0.8}).model_copy(update={"train_loss": {"1": 7.0, "100": 4.56789}})
    result = element_result(run)
    assert result["train"] == 'step,1,100\n"delta_net_a,b",7,4.56789\n'
    assert result["test"].splitlines()[0] == "Model,recall"
    assert csv_text("step", "x", {}) == "step\nx\n"
