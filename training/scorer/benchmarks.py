"""Benchmarks through lm-eval, over the logits of a sandboxed worker.

The project's own tasks (recall, copying, induction, cloze) are multiple choice over items that the host generated; all
other names are tasks of lm-eval's own library, whose data come from the Hugging Face hub.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from common.errors import JobError, first_line
from training.data.tasks import Item
from training.data.tokenizer import Codec
from training.profiles import LONGEST_CONTEXT, OWN_TASKS
from training.scorer.heldout import LogitServer, NotFiniteError, log_softmax
from training.scorer.items import item_scores, perplexity_of

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

__all__ = ["WorkerLM", "require_official", "run_benchmarks"]

MOST_TOKENS = 8192
"""Tokens of one padded batch."""
MOST_LOGITS = 256 << 20
"""Bytes of the logits of one batch; a single row may take more."""
LONGEST = LONGEST_CONTEXT
"""Tokens kept of a long context, from its end."""
_METRICS = ("acc", "acc_norm", "contains", "exact_match", "f1")
_NORMED = ("hellaswag", "arc_challenge")
"""Tasks that the published system reports by acc_norm."""
_CHANCE = {
    "arc_challenge": 0.25,
    "arc_easy": 0.25,
    "boolq": 0.5,
    "hellaswag": 0.25,
    "openbookqa": 0.25,
    "piqa": 0.5,
    "social_iqa": 1 / 3,
    "winogrande": 0.5,
}


@dataclass(frozen=True)
class _Ask:
    """One request for a continuation: of `context`, up to one of `until` or `most` tokens."""

    context: str
    until: tuple[str, ...]
    most: int

    @classmethod
    def of(cls, request: Instance) -> _Ask:
        context, options = request.args
        until = options.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(filter(None, until))
        return cls(str(context), stops, int(options.get("max_gen_toks", 48)))


class WorkerLM(TemplateLM):
    """lm-eval's view of a worker: log-likelihoods and continuations in batches sorted by length, right-padded, each
    input scored once.

    Every input starts with the end token, as every training sequence does.

    Args:
        encoded: ids of texts that are known already.
    """

    def __init__(self, server: LogitServer, codec: Codec, encoded: Mapping[str, list[int]] | None = None) -> None:
        super().__init__()
        self._server, self._codec, self._known = server, codec, encoded or {}
        self._encode = functools.lru_cache(maxsize=4096)(codec.encode_items)  # lm-eval asks again for every choice
        self._written: dict[_Ask, str] = {}

    @property
    def eot_token_id(self) -> int:
        return self._codec.end

    @property
    def tokenizer_name(self) -> str:
        return "worker"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of `string`; task symbols in it are one token each. The list is shared: do not change it."""
        known = self._known.get(string)
        return self._encode(string) if known is None else known

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        inputs: dict[tuple[int, ...], int] = {}
        wanted: list[tuple[int, int, list[int]]] = []
        for _, context, continuation in requests:
            row = (self._codec.end, *context, *continuation[:-1])[-LONGEST:]
            number = inputs.setdefault(row, len(inputs))
            wanted.append((number, len(row) - len(continuation), continuation))
        rows = list(inputs)
        asked: dict[int, list[int]] = {}
        for index, (number, _, _) in enumerate(wanted):
            asked.setdefault(number, []).append(index)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(wanted)
        # A continuation ends where its row does, so the longest one of a row says how many places are asked for.
        places = [max(len(wanted[index][2]) for index in asked[number]) for number in range(len(rows))]
        for batch in _by_length(rows, places, MOST_LOGITS // (4 * self._server.vocab)):
            self._score(batch, rows, wanted, asked, results)
        return results

    def _score(
        self,
        batch: Sequence[int],
        rows: Sequence[tuple[int, ...]],
        wanted: Sequence[tuple[int, int, list[int]]],
        asked: Mapping[int, list[int]],
        results: list[tuple[float, bool]],
    ) -> None:
        tokens = _padded([rows[number] for number in batch], self._server.padding)
        places: dict[tuple[int, int], int] = {}
        for row, number in enumerate(batch):
            for index in asked[number]:
                _, start, continuation = wanted[index]
                for at in range(start, start + len(continuation)):
                    places.setdefault((row, at), len(places))
        scores = log_softmax(self._server.at(tokens, np.array(list(places), dtype=np.int32)))
        for row, number in enumerate(batch):
            for index in asked[number]:
                _, start, continuation = wanted[index]
                picked = [places[row, start + offset] for offset in range(len(continuation))]
                total = float(scores[picked, continuation].sum(dtype=np.float64))
                results[index] = (total, bool((scores[picked].argmax(-1) == continuation).all()))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in consecutive windows of LONGEST tokens; each knows the last token before
        it."""
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        ends: list[int] = []
        for request in requests:
            ids = self._codec.encode_text([str(request.args[0])]).tolist()[:-1]
            for at in range(0, len(ids), LONGEST):
                windows.append((("", ""), ids[max(0, at - 1) : at], ids[at : at + LONGEST]))
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        return [math.fsum(scores[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation of each context up to a stop string; equal requests are answered once."""
        asks = [_Ask.of(request) for request in requests]
        self._write(list(dict.fromkeys(ask for ask in asks if ask not in self._written)))
        return [self._written[ask] for ask in asks]

    def _write(self, asks: Sequence[_Ask]) -> None:
        """Answers `asks`, the longest first, as many at once as MOST_TOKENS holds; the next takes the place of one that
        ends.

        Every token takes a pass over its whole prefix, also where the program has `step`: a state that is carried on
        answers no question that the audit could ask again.
        """
        rows = {ask: [self._codec.end, *self.tok_encode(ask.context)][-LONGEST:] for ask in asks}
        begun = {ask: len(row) for ask, row in rows.items()}
        grown = {ask: length + ask.most for ask, length in begun.items()}
        waiting = sorted(asks, key=lambda ask: grown[ask])
        live: list[_Ask] = []
        while waiting or live:
            width = max(grown[ask] for ask in (*live, *waiting[-1:]))
            while waiting and (not live or (len(live) + 1) * width <= MOST_TOKENS):
                live.append(waiting.pop())
            tokens = _padded([rows[ask] for ask in live], self._server.padding)
            ends = np.array([(at, len(rows[ask]) - 1) for at, ask in enumerate(live)], dtype=np.int32)
            for ask, token in zip(live, self._server.at(tokens, ends).argmax(-1).tolist(), strict=True):
                row = rows[ask]
                row.append(token)
                text = self._codec.decode(row[begun[ask] :])
                stops = [stop for stop in ask.until if stop in text]
                if stops or len(row) - begun[ask] >= ask.most or token == self._codec.end:
                    self._written[ask] = min((text.split(stop)[0] for stop in stops), key=len, default=text)
            live = [ask for ask in live if ask not in self._written]


def _by_length(rows: Sequence[tuple[int, ...]], places: Sequence[int], most: int) -> list[list[int]]:
    """Row numbers in batches of similar length, the longest first, each of at most MOST_TOKENS padded tokens and `most`
    places asked for, or of one row.

    Args:
        places: asked for, of each row.
    """
    batches: list[list[int]] = []
    width = asked = 0
    for number in sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row)):
        asked += places[number]
        if batches and (len(batches[-1]) + 1) * width <= MOST_TOKENS and asked <= most:
            batches[-1].append(number)
        else:
            batches.append([number])
            width, asked = len(rows[number]), places[number]
    return batches


def _padded(rows: Sequence[Sequence[int]], padding: int) -> np.ndarray:
    tokens = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int32)
    for at, row in enumerate(rows):
        tokens[at, : len(row)] = row
    return tokens


def run_benchmarks(
    server: LogitServer,
    codec: Codec,
    names: Sequence[str],
    items: Mapping[str, list[Item]],
    limit: int,
    encoded: Mapping[str, list[int]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of each task as {value, n, se, chance, items}, of multiple choice also bits_per_byte (see `item_scores`).

    Args:
        names: tasks; those in `items` are the project's own, the others lm-eval's.
        limit: samples a task of lm-eval's own library.
        encoded: ids of texts that are known already.

    Returns:
        Scores of each task that counts right and wrong; of wikitext, and of lambada beside them, perplexity: {value, n,
        se}.

    Raises:
        JobError: the data of a task cannot be had here. NotFiniteError: the model's answers have an infinite
            perplexity. Otherwise as LogitServer.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = [name for name in names if name in items]
    official = [name for name in names if name not in items]
    model = WorkerLM(server, codec, encoded)
    scores: dict[str, dict[str, Any]] = {}
    if own:
        manager = TaskManager(include_defaults=False)
        scores |= _evaluate(model, manager, [_own_task(name, items[name]) for name in own], None)
        for name in own:
            scores[name]["chance"] = 1 / len(items[name][0]["choices"])
    if official:
        scores |= _official(model, official, limit)
    return {name: scores[name] for name in names}


def _own_task(name: str, items: list[Item]) -> dict[str, Any]:
    documents = Dataset.from_list([dict(item) for item in items])
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": documents},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda document: document["context"],
        "doc_to_choice": lambda document: document["choices"],
        "doc_to_target": lambda document: document["answer"],
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def require_official(names: Sequence[str]) -> None:
    """Loads the data of those tasks that are lm-eval's own, so that they are at hand when a run is scored.

    Raises:
        JobError: the data of one cannot be had here.
    """
    for name in names:
        if name not in OWN_TASKS:
            with _told(name):
                _manager().load([name])


def _official(model: WorkerLM, names: Sequence[str], limit: int) -> dict[str, dict[str, Any]]:
    scores: dict[str, dict[str, Any]] = {}
    for name in names:
        with _told(name):
            scores |= _evaluate(model, _manager(), [name], limit)
        if "value" in scores[name]:
            scores[name]["chance"] = _CHANCE.get(name)
    return scores


@functools.cache
def _manager() -> TaskManager:
    """lm-eval's own tasks: half a minute to index."""
    return TaskManager()


@contextmanager
def _told(name: str) -> Iterator[None]:
    """A task that cannot be loaded or run, as one clear error."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise JobError(
            f"benchmark {name} cannot run here: {type(error).__name__}: {first_line(error)[:300]}",
            "its data come from huggingface.co: connect, or set HF_HOME to a cache that has them, or score the "
            "project's own tasks alone with --benchmarks own",
        ) from error


def _evaluate(model: WorkerLM, manager: TaskManager, tasks: list[Any], limit: int | None) -> dict[str, dict[str, Any]]:
    # `evaluate` rather than `simple_evaluate`, which afterwards imports torch to describe the machine: 5 s more.
    loaded = manager.load(tasks)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    try:
        answer = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    except OverflowError as error:
        # lm-eval takes exp of a mean that finite, but very large, logits make.
        raise NotFiniteError(f"a perplexity of {', '.join(loaded['tasks'])} is infinite") from error
    assert answer is not None
    scores: dict[str, dict[str, Any]] = {}
    for name, result in answer["results"].items():
        n = int(answer["n-samples"][name]["effective"])
        metrics = ("acc_norm", *_METRICS) if name in _NORMED else _METRICS
        scores[name] = perplexity_of(answer["samples"][name])
        metric = next((metric for metric in metrics if f"{metric},none" in result), None)
        if metric is None:
            continue
        value = float(result[f"{metric},none"])
        # Every item counts 0 or 1, so the standard error follows from the mean.
        se = math.sqrt(value * (1 - value) / (n - 1)) if n > 1 and metric != "f1" else None
        kind = str(loaded["tasks"][name].get_config("output_type"))
        scores[name] |= {"value": value, "n": n, "se": se, **item_scores(answer["samples"][name], metric, kind)}
    return scores
