"""Scores a trained worker: the audit's questions, the benchmarks, the held-out loss, and what to do with suspects."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from training.data.corpus import load_items
from training.data.packing import row_type
from training.data.tasks import Item
from training.data.tokenizer import Codec
from training.profiles import Profile
from training.scorer.audit import TOLERANCE, BenchmarkAudit, HeldoutAudit, Suspect
from training.scorer.client import Worker
from training.scorer.confirm import FEWEST, confirm, leaks_in_place, read_weights
from training.scorer.heldout import ForgedError, LogitServer, heldout_loss
from training.scorer.validation import sample_of

__all__ = ["Scoring", "heldout_windows", "unseen_items"]

AUDITED_BENCHMARKS = 0.25
"""Share of the benchmark calls with a future to see that are audited."""
_REPORTED_ROWS = 128
_REPORTED_NATS, _REPORTED_SHARE = 0.3, 0.1
"""How much lower a reported training loss may be than the one measured afterwards; noise of the last steps is less."""
_FEWEST_ITEMS = 8
_REMEMBERED = 5
"""Words by which an item of the cloze task is recognised in other text."""
Restored = Callable[[list[np.ndarray]], Worker]


class Scoring:
    """Measures a trained worker: asks for places without their future, then for benchmarks, then for whole rows.

    In this order no answer that is scored can use text that a later question shows, and an earlier answer stands
    against it where it does.

    Args:
        restored: starts a fresh process of the same program and gives its model these weights.
        result: gets heldout_loss, benchmarks and audit, all together or none.
    """

    def __init__(
        self,
        job: dict[str, Any],
        profile: Profile,
        worker: Worker,
        restored: Restored,
        result: dict[str, Any],
    ) -> None:
        self._job, self._profile, self._worker, self._restored, self._result = job, profile, worker, restored, result
        self._codec = Codec(Path(job["tokenizer"]))
        tokens = np.memmap(job["heldout"], dtype=np.uint16, mode="r")
        self._rows = heldout_windows(tokens, profile.eval.heldout_sequences, profile.train.seq_len)
        shown = sample_of(profile, tokens)
        known = self._rows if shown is None else np.concatenate([self._rows, shown.rows])
        self._items = unseen_items(load_items(Path(job["items"])), known, self._codec)
        self._secret = self._rows.tobytes() + str(job["seed"]).encode()

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
            ForgedError: what is scored depends on what comes after. Otherwise as LogitServer.
        """
        tolerance = TOLERANCE[self._job["dtype"]]
        server = self._serve(self._worker)
        begun = time.perf_counter()
        audit = HeldoutAudit(self._rows, self._secret, self._profile.eval.audit_gain, tolerance)
        audit.ask(server)
        self._result["seconds"]["audit"] = time.perf_counter() - begun
        benchmarks.join()
        audited = BenchmarkAudit(server, self._secret, tolerance, AUDITED_BENCHMARKS)
        scores = self._benchmarks(audited)
        loss = heldout_loss(server, self._rows, audit.see)
        preferred = audit.preference()
        if preferred is not None:
            raise ForgedError(
                f"the held-out loss is {preferred[0]:.3f} at places that were asked for before their future was shown, "
                f"and {preferred[1]:.3f} at places drawn alike that were not"
            )
        suspects = [*audit.suspects(), *audited.found]
        compared = audit.compared + audited.compared
        said = f"{compared:,} places were asked before their future was shown"
        if len(suspects) < FEWEST:
            note = f"; one changed: {suspects[0]}" if suspects else ", and answered alike after it"
            self._result["audit"] = {"passed": not suspects, "detail": said + note}
        else:
            loss, scores = self._confirmed(server, suspects)
            self._result["audit"] = {
                "passed": False,
                "detail": f"{said}; {len(suspects)} answers changed, but in fresh processes with the trained weights "
                "none does: the trained process keeps state beside its weights, and the scores are the weights' own",
            }
        self._result |= {"heldout_loss": loss, "benchmarks": scores}

    def _benchmarks(self, server: LogitServer) -> dict[str, dict[str, Any]]:
        from training.scorer.benchmarks import run_benchmarks

        spec = self._profile.eval
        return run_benchmarks(server, self._codec, spec.benchmarks, self._items, spec.items)

    def _confirmed(self, server: LogitServer, suspects: list[Suspect]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The scores of the trained weights in a fresh process, where the suspects are none there."""
        random = np.random.default_rng(list(hashlib.sha256(b"confirm" + self._secret).digest()))
        calls = list(server.calls)
        weights = read_weights(self._worker, self._result["parameters"])
        found = leaks_in_place(server, suspects, random)
        self._worker.close()  # a GPU has room for one
        found = found or confirm(calls, suspects, lambda: self._restored(weights), self._serve, random)
        if found is not None:
            raise ForgedError(found)
        with self._restored(weights) as worker:
            again = self._serve(worker)
            scores = self._benchmarks(again)
            return heldout_loss(again, self._rows), scores

    def _serve(self, worker: Worker) -> LogitServer:
        return LogitServer(worker, self._profile.model.vocab, int(self._job["end"]))


def heldout_windows(tokens: np.ndarray, count: int, seq_len: int) -> np.ndarray:
    """int32 [count, seq_len + 1]: evenly spaced windows of the held-out tokens, the same for every run."""
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
