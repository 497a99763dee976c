"""One training run on the host side: what is known of it so far, and how that becomes its record and its files.

metrics.jsonl grows while the run goes on: one object a report, {step, loss, task_loss, lr, grad_norm, tokens, seconds,
tokens_per_second, memory_mb, cpu_seconds}, on a GPU also mfu, where the profile validates in that step also val_loss
and val_tasks, and at the end {step, heldout_loss, n} of the scored text.
The monitor and every plot read these. A run that goes on from a checkpoint tells its reports again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.errors import JobError, UsageError
from common.files import sha256_text, write_atomic, write_json
from common.records import BenchmarkScore, CheckOutcome, CheckReport, Efficiency, Forecast, Measurement, RunRecord
from common.text import printable
from training import checkpoints
from training.branch import require_lineage
from training.checkpoints import Identity
from training.data.corpus import Corpus
from training.environment import git_commit, versions
from training.events import Event, OnEvent
from training.flops import gpu_name, mfu, training_flops
from training.items import of_run, write_items
from training.jobs import CANCELLED, run_job
from training.metric_writers import TensorBoard, WandB, Writer
from training.metrics import Metrics
from training.monitor import Monitor, Peer, Stop
from training.programs import Program
from training.repeat import profile_word, repeating_command
from training.results import benchmark_mean, clear, curve_columns, element_result, learning_curve

if TYPE_CHECKING:
    import threading

    from training.launcher import Launcher

__all__ = ["Run", "run_identity"]

COMPILING = 900.0
"""Seconds that a first step may take on a GPU, where kernels are compiled and tuned in it (an estimate)."""


_INTERRUPTED = {"status": "stopped", "reason": "interrupted", "detail": "the run was interrupted"}


class _StoppedError(Exception):
    """The monitor ends the run."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.detail)
        self.stop = stop


class Run:
    """One training run: what is known of it so far, and how that becomes its record.

    Args:
        keep: the last checkpoint stays after scoring.
        foreign: what to do with checkpoints of another run in `out`: refuse to go on, or discard them.
    """

    def __init__(
        self,
        launcher: Launcher,
        program: Program,
        seed: int,
        out: Path,
        run_id: str,
        checks: CheckReport | Sequence[CheckOutcome],
        counted: Sequence[str] | None,
        command: str,
        keep: bool = False,
        foreign: Literal["refuse", "discard"] = "refuse",
    ) -> None:
        self.launcher, self.program, self.seed, self.out, self.run_id = launcher, program, seed, out, run_id
        self.checks = checks.checks if isinstance(checks, CheckReport) else list(checks)
        self.facts: Mapping[str, Any] = checks.facts if isinstance(checks, CheckReport) else {}
        self.counted, self.command, self.keep, self.foreign = counted, command, keep, foreign
        self.profile = launcher.profile
        self.dtype = str(self.facts.get("dtype") or launcher.dtype) if launcher.device == "cpu" else launcher.dtype
        self.reports: list[tuple[int, float]] = []
        self.validated: list[tuple[int, float]] = []
        self.tasks: dict[str, list[tuple[int, float]]] = {}
        self.resumed = 0
        self.tries, self.earlier = 0, 0.0
        self.flops: float | None = None
        self.gpu = gpu_name() if launcher.device == "cuda" else None
        self.metrics = Metrics(out)
        self.threshold: float | None = None
        self.origin: Path | None = None
        self.data: float | None = None
        self.forecast: Forecast | None = None

    def execute(
        self, corpus: Corpus, peers: Sequence[Peer], tell: OnEvent, cancel: threading.Event | None
    ) -> RunRecord:
        folder = self.out / checkpoints.FOLDER
        identity = run_identity(self.launcher, self.program, self.seed)
        try:
            checkpoints.refuse_foreign(folder, identity)
        except UsageError:
            if self.foreign == "refuse":
                raise
            checkpoints.settle(folder, keep=False)
        if self.origin is not None:
            require_lineage(self.origin, identity)
        clear(self.out)
        self.metrics = Metrics(self.out, self._writers(), lambda text: tell(Event("note", "train", text=text)))
        started = time.perf_counter()
        with self.metrics:
            tell(Event("stage", "data"))
            job = cache(partial(self._job, corpus, folder, identity, cancel))
            try:
                answer = self._tried(job, peers, tell, cancel)
            except JobError:
                if cancel is None or not cancel.is_set() or self.data is not None:
                    raise
                answer = _INTERRUPTED
            if self.data is not None:
                answer = {**answer, "seconds": {"data": self.data, **answer.get("seconds", {})}}
            record = self._finish(answer, corpus, time.perf_counter() - started)
        if record.reason != "interrupted":
            checkpoints.settle(folder, self.keep and record.status == "finished")
        return record

    def _writers(self) -> list[Callable[[], Writer]]:
        training = self.launcher.settings.training
        facts = {"profile": self.profile.name, "seed": self.seed, "program_sha256": self.program.sha256}
        board, name = partial(TensorBoard, self.out), f"{self.program.name} seed {self.seed}"
        wandb = partial(WandB, self.out, training.wandb, name, facts)
        return ([board] if training.tensorboard else []) + ([wandb] if training.wandb != "off" else [])

    def _job(self, corpus: Corpus, folder: Path, identity: Identity, cancel: threading.Event | None) -> dict[str, Any]:
        """What the scorer is told. Makes the training stream, where there is none of this seed, beside its start."""
        begun = time.perf_counter()
        stream = corpus.stream(self.profile, self.seed, cancel)
        self.data = time.perf_counter() - begun
        return {
            **self.launcher.job(self.program, self.seed, self.dtype),
            "stream": str(stream),
            "heldout": str(corpus.heldout),
            "items": str(corpus.items),
            "tokenizer": str(corpus.tokenizer),
            "end": corpus.end,
            "checkpoints": {
                "folder": str(folder.absolute()),
                "identity": asdict(identity),
                "origin": str(self.origin.absolute()) if self.origin else None,
            },
        }

    def _tried(
        self, job: Callable[[], dict[str, Any]], peers: Sequence[Peer], tell: OnEvent, cancel: threading.Event | None
    ) -> Mapping[str, Any]:
        """What the scorer says of the run; once more where the worker was killed, and as often as the micro-batch can
        be halved where memory ran out."""
        answer = self._answer(job, peers, tell, cancel)
        if answer.get("from_outside"):
            # Somebody killed the worker, or it killed itself: once more, and if that ends so too it is the program's.
            tell(Event("note", "train", text=f"{answer['detail']}: trained again"))
            answer = self._answer(job, peers, tell, cancel)
        # Only training takes less memory with a smaller micro-batch; once it is over, a time for it is told.
        while (
            answer.get("reason") == "memory"
            and "train" not in answer.get("seconds", {})
            and (half := self._half()) is not None
        ):
            tell(Event("note", "train", text=f"{answer['detail']}: tried again with {half} sequences a forward pass"))
            train = self.profile.train.model_copy(update={"micro_batch": half})
            self.profile = self.profile.model_copy(update={"train": train})
            smaller = {**job(), "profile": self.profile.model_dump(mode="json")}
            answer = self._answer(partial(dict, smaller), peers, tell, cancel)
        return answer

    def _half(self) -> int | None:
        """Half the sequences that one process takes in a forward pass, None where it is one already."""
        rows = -(-self.profile.train.batch // self.launcher.settings.training.processes)
        return min(rows, self.profile.train.micro_batch or rows) // 2 or None

    def _answer(
        self, job: Callable[[], dict[str, Any]], peers: Sequence[Peer], tell: OnEvent, cancel: threading.Event | None
    ) -> Mapping[str, Any]:
        """What the scorer says of one try, or why it was ended from here."""
        self.reports, self.validated, self.tasks, self.resumed = [], [], {}, 0
        self.tries += 1
        self.metrics.begin()
        rules = self.launcher.settings.monitor
        spared = _share(self.program, self.seed) < rules.hopeless_spared
        warm_up = COMPILING if self.launcher.device == "cuda" else 0.0
        monitor = Monitor(
            rules, self.profile.train.steps, peers, threshold=self.threshold, spared=spared, warm_up=warm_up
        )
        try:
            answer = run_job(
                "train",
                job,
                lambda event: self._event(event, monitor, tell),
                cancel,
                2 * self.profile.limits.seconds + 120,
            )
        except _StoppedError as ended:
            return {"status": "stopped", "reason": ended.stop.reason, "detail": ended.stop.detail}
        finally:
            self.forecast = monitor.forecast
        if answer == CANCELLED:
            return _INTERRUPTED
        return answer

    def _event(self, event: dict[str, Any], monitor: Monitor, tell: OnEvent) -> None:
        kind, stop = event["event"], None
        if kind == "stage":
            if event["name"] == "train":
                monitor.started()
                self.flops = training_flops(self.profile, event, self.facts.get("flops_per_token"))
            elif event["name"] == "score":
                monitor.finished()
            tell(Event("stage", event["name"]))
        elif kind == "resumed":
            self.resumed = int(event["step"])
            if self.tries == 1:  # what a later try goes on from was trained while this command ran
                self.earlier = float(event["seconds"])
            tell(Event("note", "train", text=f"goes on from the checkpoint of step {event['step']}"))
        elif kind == "note":
            tell(Event("note", "train", text=str(event["text"])))
        elif kind == "metrics":
            line = {key: value for key, value in event.items() if key != "event"}
            share = mfu(event.get("tokens_per_second"), self.flops, self.gpu)
            self.metrics.add(line if share is None else {**line, "mfu": round(share, 4)})
            step, loss = int(event["step"]), event["loss"]
            if loss is not None:
                self.reports.append((step, float(loss)))
            if event.get("val_loss") is not None:
                self.validated.append((step, float(event["val_loss"])))
            for name, right in event.get("val_tasks", {}).items():
                if right is not None:
                    self.tasks.setdefault(name, []).append((step, float(right)))
            stop = monitor.report(step, loss, event.get("cpu_seconds"))
            if step > self.resumed:  # the reports before it, which are told again, are no progress
                tell(self._progress(event, step))
        else:
            stop = monitor.tick()
        if stop is not None:
            raise _StoppedError(stop)

    def _progress(self, event: Mapping[str, Any], step: int) -> Event:
        steps = self.profile.train.steps
        seconds = event.get("seconds")
        rate = event["tokens"] / seconds if seconds else None
        left = seconds * (steps - step) / step if seconds and step else None
        return Event("progress", "train", step, steps, event["loss"], rate, left)

    def _finish(self, answer: Mapping[str, Any], corpus: Corpus, wall: float) -> RunRecord:
        record = self.record(answer, corpus, wall)
        if record.heldout_loss is not None:
            held = record.heldout_loss
            self.metrics.add({"step": self.profile.train.steps, "heldout_loss": held.value, "n": held.n})
        columns = {"train": record.train_loss, "test": {**record.benchmarks, **record.perplexities}}
        for name, text in element_result(record).items():
            if columns[name]:
                write_atomic(self.out / f"{name}.csv", text)
        if record.benchmarks:
            items = {name: answer["benchmarks"][name]["items"] for name in record.benchmarks}
            write_items(self.out, of_run(record.run_id, record.name, self.seed, record.baseline_key, items))
        if answer.get("stderr"):
            write_atomic(self.out / "stderr.log", printable(str(answer["stderr"])))
        write_json(self.out / "result.json", record.model_dump(mode="json"))
        return record

    def record(self, answer: Mapping[str, Any], corpus: Corpus, wall: float) -> RunRecord:
        """The record of a run that ended with `answer`, `wall` seconds after its checks."""
        launcher, profile = self.launcher, self.profile
        benchmarks = {
            name: BenchmarkScore(
                **{key: value for key, value in score.items() if key not in ("items", "perplexity")},
                counted=self.counted is None or name in self.counted,
            )
            for name, score in answer.get("benchmarks", {}).items()
            if "value" in score
        }
        perplexities = {
            name: Measurement(**score["perplexity"])
            for name, score in answer.get("benchmarks", {}).items()
            if "perplexity" in score
        }
        heldout = answer.get("heldout_loss")
        checked = sum(check.seconds or 0.0 for check in self.checks)
        seconds = {**answer.get("seconds", {}), **({"check": round(checked, 3)} if self.checks else {})}
        if self.earlier:
            seconds["train_earlier"] = self.earlier
        seconds["total"] = wall + checked + self.earlier
        if "train_cpu_seconds" in answer:
            seconds["train_cpu"] = answer["train_cpu_seconds"]
        sizes = {
            key: answer.get(key)
            for key in ("parameters", "mixer_parameters", "ffn_width", "tokens", "tokens_per_second")
        }
        hardware = dict(answer.get("hardware", {}))
        hardware["deterministic"] = launcher.settings.training.deterministic
        if launcher.compiles:
            hardware["compile"] = True
        if launcher.settings.training.processes > 1:
            hardware["processes"] = launcher.settings.training.processes
        if profile.train.micro_batch != launcher.profile.train.micro_batch:
            hardware["micro_batch"] = profile.train.micro_batch
        parts = {name: answer[name] for name in ("embedding", "head", "mlps", "norms") if name in answer}
        if "mixer_parameters" in answer:
            parts["mixers"] = answer["mixer_parameters"]
        return RunRecord(
            run_id=self.run_id,
            name=self.program.name,
            profile=profile.name,
            seed=self.seed,
            status=answer["status"],
            reason=answer.get("reason"),
            detail=str(answer.get("detail", "")),
            program_sha256=self.program.sha256,
            fingerprint=self.facts.get("fingerprint"),
            baseline_key=launcher.baseline_key(),
            heldout_loss=Measurement(**heldout) if heldout else None,
            benchmarks=benchmarks,
            benchmark_mean=benchmark_mean(benchmarks),
            perplexities=perplexities,
            train_loss=curve_columns(self.reports, profile.train.steps),
            validation_loss={str(step): loss for step, loss in self.validated},
            learning_curve=learning_curve(self.validated),
            task_curves={name: area for name, points in self.tasks.items() if (area := learning_curve(points))},
            flops_per_token=self.facts.get("flops_per_token"),
            work_exponent=self.facts.get("work_exponent"),
            efficiency=_efficiency(answer, self.facts),
            seconds=seconds,
            checks=[*self.checks, *_audit_outcome(answer.get("audit"))],
            sandbox=str(answer.get("sandbox", "")),
            trust=self.program.trust,
            device=launcher.device,
            dtype=self.dtype,
            versions={**versions(), **answer.get("versions", {})},
            hardware=hardware,
            init=launcher.settings.training.init,
            parameters_by_part=parts,
            training_flops_per_token=training_flops(profile, parts, self.facts.get("flops_per_token"))
            if "mlps" in parts
            else None,
            corpus_sha256=corpus.sha256,
            git_commit=git_commit(),
            command=self.command or self._repeating(),
            reference=self.program.reference,
            forecast=self.forecast,
            **sizes,
        )

    def _repeating(self) -> str:
        settings = self.launcher.settings
        return repeating_command(settings, profile_word(settings, self.profile.name), self.program, self.seed)


def _share(program: Program, seed: int) -> float:
    """A number in [0, 1) that nobody chose, the same each time the run is started."""
    return int(sha256_text(f"spared {program.sha256} {seed}")[:12], 16) / 16**12


def run_identity(launcher: Launcher, program: Program, seed: int) -> Identity:
    """Whose checkpoints those of this run are. Prepares the corpus when that is not done."""
    key, name = launcher.baseline_key(), launcher.profile.name
    return Identity(program.sha256, key, seed, program.name, name, launcher.lineage())


def _efficiency(answer: Mapping[str, Any], facts: Mapping[str, Any]) -> Efficiency | None:
    """None for a run that did not come to be scored."""
    if "prefill" not in answer:
        return None
    return Efficiency(
        prefill={length: Measurement(**speed) for length, speed in answer["prefill"].items()},
        # A step that computes something else than forward has no speed that means anything.
        decode=Measurement(**answer["decode"]) if answer["decode"] and facts.get("decode") else None,
        state_bytes=facts.get("state_bytes"),
        peak_memory_mb=answer["worker_memory_mb"],
    )


def _audit_outcome(audit: Mapping[str, Any] | None) -> list[CheckOutcome]:
    """The audit of the scored answers, as one more check of the record."""
    if audit is None:
        return []
    return [CheckOutcome(name="audit", passed=audit["passed"], severity="warn", detail=audit["detail"])]
