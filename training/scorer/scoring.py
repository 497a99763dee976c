"""Scores a trained worker: its held-out loss, its benchmarks, and whether they count (training/scorer/verdict.py)."""

from __future__ import annotations

import secrets
import threading
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

__all__ = ["Scoring", "heldout_windows", "unseen_items"]

_REPORTED_ROWS = 128
_REPORTED_NATS, _REPORTED_SHARE = 0.3, 0.1
"""How much lower a reported training loss may be than the one measured afterwards; noise of the last steps is less."""
_FEWEST_ITEMS = 8
_REMEMBERED = 5
"""Words by which an item of the cloze task is recognised in other text."""


class Scoring:
    """Measures a trained worker, and ends it.

    Args:
        fresh: makes processes of the same program.
        result: gets heldout_loss, benchmarks and audit, all together or none; and into its seconds what each of these
            three took, and used of the CPU (audit_cpu): of the audit all, the start of a process beside other work
            included.
    """

    def __init__(
        self, job: dict[str, Any], profile: Profile, worker: Worker, fresh: Fresh, result: dict[str, Any]
    ) -> None:
        self._job, self._profile, self._worker, self._fresh, self._result = job, profile, worker, fresh, result
        self._codec = Codec(Path(job["tokenizer"]))
        tokens = np.memmap(job["heldout"], dtype=np.uint16, mode="r")
        self._rows = heldout_windows(tokens, profile.eval.heldout_sequences, profile.train.seq_len)
        shown = sample_of(profile, tokens)
        known = self._rows if shown is None else np.concatenate([self._rows, shown.rows])
        self._items = unseen_items(load_items(Path(job["items"])), known, self._codec)
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

    def run(self, benchmarks: threading.Thread) -> None:
        """Waits for the import of `benchmarks` before they are run.

        Raises:
            ForgedError: what is scored depends on what comes after. UnrepeatableError: no score can be audited.
            Otherwise as LogitServer.
        """
        try:
            self._run(benchmarks)
        finally:
            self._spending.add("audit", max(self._fresh.overlapped, 0.0), self._fresh.cpu_seconds())
            self._result["seconds"] |= self._spending.seconds

    def _run(self, benchmarks: threading.Thread) -> None:
        with self._spending.on("audit"):
            # Before anything that is scored is shown, or the weights could carry it.
            weights = read_weights(self._worker, self._result["parameters"])
        server = self._serve(self._worker)
        scored = self._scored(benchmarks, server)
        with self._spending.on("audit"):
            bench = Bench(
                fresh=partial(self._fresh.open, weights),
                serve=self._serve,
                score=partial(self._scored, benchmarks),
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

    def _scored(self, benchmarks: threading.Thread, server: LogitServer) -> Scored:
        """Held-out rows first: no text of a benchmark is known then."""
        with self._spending.on("heldout"):
            from_rows = heldout_scores(server, self._rows)
        places, owners = heldout_places(from_rows, self._rows)
        recorder = Recorder(server, len(self._rows))
        with self._spending.on("benchmarks"):
            benchmarks.join()
            scores = self._benchmarks(recorder)
        return Scored(from_rows.loss, scores, list(server.calls), places, recorder.places(), owners | recorder.owners)

    def _benchmarks(self, server: LogitServer) -> dict[str, dict[str, Any]]:
        from training.scorer.benchmarks import run_benchmarks

        spec = self._profile.eval
        return run_benchmarks(server, self._codec, spec.benchmarks, self._items, spec.items)

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
