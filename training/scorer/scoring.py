"""Scores a trained worker: its held-out loss, its benchmarks, and whether they count (training/scorer/verdict.py)."""

from __future__ import annotations

import os
import secrets
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training.data.corpus import load_items
from training.data.packing import row_type
from training.data.tasks import Item
from training.data.tokenizer import Codec
from training.profiles import Profile
from training.scorer.client import Worker
from training.scorer.fresh import Fresh, read_weights
from training.scorer.heldout import ForgedError, LogitServer, heldout_loss, heldout_scores
from training.scorer.scored import Recorder, Scored, heldout_places
from training.scorer.spending import Spending
from training.scorer.validation import sample_of
from training.scorer.verdict import Bench, verdict

__all__ = ["Material", "Scoring", "heldout_windows", "import_benchmarks", "material", "unseen_items"]

_REPORTED_ROWS = 128
_REPORTED_NATS, _REPORTED_SHARE = 0.3, 0.1
"""How much lower a reported training loss may be than the one measured afterwards; noise of the last steps is less."""
_FEWEST_ITEMS = 8
_REMEMBERED = 5
"""Words by which an item of the cloze task is recognised in other text."""


@dataclass(frozen=True)
class Material:
    """What a run is scored on.

    Attributes:
        rows: int32 [n, seq_len + 1], the held-out windows.
        items: of the project's own tasks, by name.
        encoded: ids of the texts that these ask for.
    """

    codec: Codec
    rows: np.ndarray
    items: dict[str, list[Item]]
    encoded: dict[str, list[int]]


def import_benchmarks() -> None:
    """Imports lm-eval, whose progress bars are of no use here: they are switched off before."""
    os.environ["TQDM_DISABLE"] = "1"
    import training.scorer.benchmarks  # noqa: F401


def material(job: dict[str, Any], profile: Profile) -> Material:
    """Takes seconds, with the import of lm-eval, and needs nothing of the run: to be made while the worker trains."""
    import_benchmarks()
    codec = Codec(Path(job["tokenizer"]))
    tokens = np.memmap(job["heldout"], dtype=np.uint16, mode="r")
    rows = heldout_windows(tokens, profile.eval.heldout_sequences, profile.train.seq_len)
    shown = sample_of(profile, tokens)
    known = rows if shown is None else np.concatenate([rows, shown.rows])
    items = unseen_items(load_items(Path(job["items"])), known, codec)
    asked = (item for name in profile.eval.benchmarks for item in items.get(name, []))
    texts = (text for item in asked for text in ("", *item["choices"]) for text in [item["context"] + text])
    return Material(codec, rows, items, {text: codec.encode_items(text) for text in texts})


class Scoring:
    """Measures a trained worker, and ends it.

    Args:
        fresh: makes processes of the same program.
        material: waited for when it is needed.
        result: gets heldout_loss, benchmarks and audit, all together or none; and into its seconds what each of these
            three took, and used of the CPU (audit_cpu): of the audit all, the start of a process beside other work
            included.
    """

    def __init__(
        self,
        job: dict[str, Any],
        profile: Profile,
        worker: Worker,
        fresh: Fresh,
        material: Future[Material],
        result: dict[str, Any],
    ) -> None:
        self._job, self._profile, self._worker, self._fresh, self._result = job, profile, worker, fresh, result
        self._material = material
        self._spending = Spending(worker.cpu_seconds)

    def check_reported(self, reported: float | None, steps: int) -> None:
        """Measures the training loss of the last `steps` steps again, which the worker reported as `reported`.

        One-sided: the weights are those after these steps, so an honest report is hardly ever lower.

        Raises:
            ForgedError: the model is far worse on these very rows than the worker said.
        """
        spec = self._profile.train
        width = spec.seq_len + 1
        kind = row_type(self._profile.model.vocab)
        stream = np.memmap(self._job["stream"], dtype=kind, mode="r", shape=(spec.steps * spec.batch, width))
        rows = np.asarray(stream[-min(steps * spec.batch, _REPORTED_ROWS) :], dtype=np.int32)
        text = rows[(rows[:, 1:] >= 0).all(axis=1)]
        if reported is None or not len(text):
            return
        with self._spending.on("audit"):
            measured = heldout_loss(self._serve(self._worker), np.where(text < 0, -1 - text, text))["value"]
        assert measured is not None
        if measured > reported + max(_REPORTED_NATS, _REPORTED_SHARE * reported):
            raise ForgedError(
                f"the worker reported a training loss of {reported:.3f} for its last steps; measured from its "
                f"logits on the same rows it is {measured:.3f}"
            )

    def run(self) -> None:
        """
        Raises:
            ForgedError: what is scored depends on what comes after. UnrepeatableError: no score can be audited.
            Otherwise as LogitServer.
        """
        try:
            self._run()
        finally:
            self._spending.add("audit", max(self._fresh.overlapped, 0.0), self._fresh.cpu_seconds())
            self._result["seconds"] |= self._spending.seconds

    def _run(self) -> None:
        with self._spending.on("audit"):
            # Before anything that is scored is shown, or the weights could carry it.
            weights = read_weights(self._worker, self._result["parameters"])
        server = self._serve(self._worker)
        scored = self._scored(server)
        with self._spending.on("audit"):
            bench = Bench(
                fresh=partial(self._fresh.open, weights),
                serve=self._serve,
                score=self._scored,
                random=np.random.default_rng(secrets.randbits(128)),  # what a program could compute, it could obey
                gain=self._profile.eval.audit_gain,
                dtype=self._job["dtype"],
            )
            found = verdict(self._worker, server, scored, bench)
        self._result |= {
            "heldout_loss": found.scored.loss,
            "benchmarks": found.scored.benchmarks,
            "audit": {"passed": found.passed, "detail": found.detail},
        }

    def _scored(self, server: LogitServer) -> Scored:
        """Held-out rows first: no text of a benchmark is known then."""
        rows = self._material.result().rows
        with self._spending.on("heldout"):
            from_rows = heldout_scores(server, rows)
        places, owners = heldout_places(from_rows, rows)
        recorder = Recorder(server, len(rows))
        with self._spending.on("benchmarks"):
            scores = self._benchmarks(recorder)
        return Scored(from_rows.loss, scores, list(server.calls), places, recorder.places(), owners | recorder.owners)

    def _benchmarks(self, server: LogitServer) -> dict[str, dict[str, Any]]:
        from training.scorer.benchmarks import run_benchmarks

        spec, given = self._profile.eval, self._material.result()
        return run_benchmarks(server, given.codec, spec.benchmarks, given.items, spec.items, given.encoded)

    def _serve(self, worker: Worker) -> LogitServer:
        return LogitServer(worker, self._profile.model.vocab, int(self._job["end"]))


def heldout_windows(tokens: np.ndarray, count: int, seq_len: int) -> np.ndarray:
    """int32 [count, seq_len + 1]: evenly spaced windows of the held-out tokens, the same for every run, apart where
    there are count * (seq_len + 1) tokens."""
    starts = np.linspace(0, len(tokens) - seq_len - 1, count).astype(np.int64)
    return tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def unseen_items(items: dict[str, list[Item]], rows: np.ndarray, codec: Codec) -> dict[str, list[Item]]:
    """`items` without the cloze items whose answer stands in `rows`: the windows that are scored or validated on.

    Both are cut from the held-out text, and a program that remembers one would know the other. An item is known by the
    last words of its context and the first of its answer. A text so short that nearly all of it is scored leaves too
    few items: then all stay.
    """
    known: set[tuple[str, ...]] = set()
    for row in rows:
        words = codec.decode(row.tolist()).split()
        known |= {tuple(words[at : at + _REMEMBERED]) for at in range(len(words) - _REMEMBERED + 1)}

    def seen(item: Item) -> bool:
        answer = item["choices"][item["answer"]].split()[:1]
        return (*item["context"].split()[1 - _REMEMBERED :], *answer) in known

    left = [item for item in items.get("cloze", []) if not seen(item)]
    return {**items, "cloze": left} if len(left) >= _FEWEST_ITEMS else items
