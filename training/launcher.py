"""The host side of checks and training runs: prepares the corpus once, starts jobs, watches them, returns typed
results.

Imports no torch. One `Launcher` serves any number of threads; each job is a scorer process with a sandboxed worker
below it.
"""

from __future__ import annotations

import importlib.metadata
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import JobError
from common.files import read_json, sha256_text, write_atomic, write_json
from common.process import REPOSITORY
from common.records import Baseline, BenchmarkScore, CheckOutcome, CheckReport, Measurement, RunRecord
from common.settings import Settings
from common.text import printable
from training.data.corpus import Corpus, default_cache, prepare_corpus
from training.environment import (
    MODEL_SOURCE,
    TRAINER_SOURCES,
    find_device,
    git_commit,
    seed_programs,
    source_hash,
    versions,
)
from training.jobs import CANCELLED, run_job
from training.monitor import Monitor, Peer, Stop, peer_of
from training.profiles import Profile
from training.programs import Program, load, to_job
from training.results import benchmark_mean, clear, csv_text, curve_columns

__all__ = ["Event", "Launcher", "Peer", "find_device", "peer_of", "refused_record", "versions"]


@dataclass(frozen=True)
class Event:
    """Something to show while it happens. Missing numbers are None.

    Attributes:
        kind: "stage" (name: corpus, size, check, start, train, score), "progress" (of training) or "note" (text to
        show).
    """

    kind: Literal["stage", "progress", "note"]
    name: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    text: str = ""


OnEvent = Callable[[Event], None]


class _StoppedError(Exception):
    """The monitor ends the run."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.detail)
        self.stop = stop


class Launcher:
    """Checks and trains programs at the scale of one profile.

    Args:
        settings: the sections sandbox, training and monitor are read.

    Raises:
        UsageError: the device asked for is not there.
    """

    def __init__(self, settings: Settings, profile: Profile) -> None:
        self.settings, self.profile = settings, profile
        self.device = find_device(settings.training.device)
        self.dtype = "bfloat16" if self.device == "cuda" else "float32"
        self.cache = settings.training.cache_dir or default_cache()
        self._lock = threading.Lock()
        self._corpus: Corpus | None = None
        self._budget: int | None = None
        self._key: str | None = None

    def prepare(self, on_event: OnEvent | None = None, cancel: threading.Event | None = None) -> Corpus:
        """Makes the corpus and measures the baseline's size, once; later calls and processes find both cached.

        Raises:
            UsageError, JobError, StoreError: as `prepare_corpus`; JobError also once `cancel` is set.
        """
        tell = on_event or _ignore
        with self._lock:
            if self._corpus is None:
                tell(Event("stage", "corpus"))
                corpus = prepare_corpus(
                    self.profile,
                    self.cache,
                    self.settings.training.text,
                    lambda line: tell(Event("note", "corpus", text=line)),
                    cancel,
                )
                self._budget = self._measure(tell, cancel)
                self._corpus = corpus
            return self._corpus

    def baseline_key(self) -> str:
        """Hash of all that must be equal for two scores to be compared. Prepares the corpus when that is not done.

        Taken once: a source file that changes while a pipeline runs must not split its results over two keys.
        """
        corpus = self.prepare()
        if self._key is None:
            self._key = self._baseline_key(corpus)
        return self._key

    def _baseline_key(self, corpus: Corpus) -> str:
        facts = {
            "profile": self.profile.fingerprint(),
            "corpus": corpus.sha256,
            "tokenizer": corpus.tokenizer_sha256,
            "seeds": seed_programs(),
            "trainer": source_hash(TRAINER_SOURCES),
            "init": self.settings.training.init,
            "torch": importlib.metadata.version("torch"),
            "lm-eval": importlib.metadata.version("lm-eval"),
            "device": self.device,
            "dtype": self.dtype,
        }
        return sha256_text(json.dumps(facts, sort_keys=True))

    def check(
        self,
        programs: Sequence[Program],
        on_event: OnEvent | None = None,
        cancel: threading.Event | None = None,
        baseline: Baseline | None = None,
    ) -> list[CheckReport]:
        """Verifies programs, two at a time, in one scorer process. Reports come in the order of `programs`.

        Args:
            baseline: its parameters and FLOPs a token stand beside the programs' in the reports.

        Raises:
            JobError: the verifier failed through a fault of ours, or the check was cancelled.
        """
        tell = on_event or _ignore
        tell(Event("stage", "check"))

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "check":
                outcome = event["check"]
                verdict = "ok" if outcome["passed"] else "failed"
                tell(Event("note", "check", text=f"{event['program']}: {outcome['name']} {verdict}"))
            elif event["event"] == "sandbox" and event["note"]:
                tell(Event("note", "check", text=event["note"]))

        job = {
            "kind": "check",
            "programs": to_job(programs),
            "backend": self.settings.sandbox.backend,
            "image": self.settings.sandbox.image,
            "device": self.device,
            "options": {
                "memory_mb": self.settings.sandbox.memory_mb,
                "profile_width": self.profile.model.hidden_size,
                "profile_heads": self.profile.model.heads,
                "profile_length": self.profile.train.seq_len,
                "baseline_mixer_parameters": baseline.mixer_parameters if baseline else None,
                "baseline_flops_per_token": baseline.flops_per_token if baseline else None,
            },
        }
        answer = run_job(job, show, cancel)
        if answer == CANCELLED:
            raise JobError("the check was cancelled")
        reports = [CheckReport.model_validate(report) for report in answer["reports"]]
        for report in reports:
            if report.accepted is None:
                raise JobError(f"the verifier failed on {report.program}: {report.error}")
        return reports

    def train(
        self,
        program: Program,
        *,
        seed: int,
        out: Path,
        run_id: str,
        checks: CheckReport | Sequence[CheckOutcome] = (),
        peers: Sequence[Peer] = (),
        counted_tasks: Sequence[str] | None = None,
        on_event: OnEvent | None = None,
        cancel: threading.Event | None = None,
        command: str = "",
    ) -> RunRecord:
        """Trains and scores one program, without checking it, and writes metrics.jsonl, train.csv, test.csv,
        stderr.log (where the program printed something and was not stopped) and result.json.

        Args:
            seed: of initialisation and data order.
            out: folder of the files, cleared of those of an earlier run; result.json comes last and appears whole.
            checks: the report of an earlier check: recorded, and its facts (dtype, FLOPs) are used.
            peers: earlier runs of this profile, for the monitor.
            counted_tasks: benchmarks that enter the mean; None counts all.
            cancel: once set, the run ends within a second as stopped, interrupted.

        Returns:
            The record. A fault of the program is a status and a reason in it.

        Raises:
            JobError, SandboxError: a fault of ours. StoreError: `out` cannot be written.
        """
        corpus = self.prepare(on_event, cancel)
        run = _Run(self, program, seed, out, run_id, checks, counted_tasks, command)
        return run.execute(corpus, peers, on_event or _ignore, cancel)

    def _measure(self, tell: OnEvent, cancel: threading.Event | None) -> int:
        """Total parameters of the baseline at this profile: every candidate's budget. Cached by program and shape."""
        baseline = load(REPOSITORY / "training" / "architectures" / "delta_net.py", name="delta_net")
        key = sha256_text(f"{baseline.sha256} {self.profile.model.model_dump_json()} {source_hash(MODEL_SOURCE)}")[:20]
        file = self.cache / "sizes" / f"{key}.json"
        if file.is_file():
            return int(read_json(file)["parameters"])
        tell(Event("stage", "size"))
        answer = run_job({**self._job(baseline, 0, None), "measure": True}, None, cancel)
        if answer == CANCELLED:
            raise JobError("measuring the baseline's size was cancelled")
        if answer.get("reason") is not None:
            raise JobError(f"the baseline cannot be built at profile {self.profile.name}: {answer['detail']}")
        write_json(file, {"program": baseline.sha256, "profile": self.profile.name, "parameters": answer["parameters"]})
        return int(answer["parameters"])

    def _job(self, program: Program, seed: int, dtype: str | None) -> dict[str, Any]:
        return {
            "kind": "train",
            "program": to_job([program])[0],
            "profile": self.profile.model_dump(mode="json"),
            "seed": seed,
            "init": self.settings.training.init,
            "device": self.device,
            "dtype": dtype or self.dtype,
            "sandbox": {
                "backend": self.settings.sandbox.backend,
                "image": self.settings.sandbox.image,
                "disk_mb": self.settings.sandbox.disk_mb,
                "memory_mb": self.settings.sandbox.memory_mb,
            },
            "budget": self._budget,
        }


class _Run:
    """One training run: what is known of it so far, and how that becomes its record."""

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
    ) -> None:
        self.launcher, self.program, self.seed, self.out, self.run_id = launcher, program, seed, out, run_id
        self.checks = checks.checks if isinstance(checks, CheckReport) else list(checks)
        self.facts: Mapping[str, Any] = checks.facts if isinstance(checks, CheckReport) else {}
        self.counted, self.command = counted, command
        self.dtype = str(self.facts.get("dtype") or launcher.dtype) if launcher.device == "cpu" else launcher.dtype
        self.reports: list[tuple[int, float]] = []
        self.lines: list[str] = []

    def execute(
        self, corpus: Corpus, peers: Sequence[Peer], tell: OnEvent, cancel: threading.Event | None
    ) -> RunRecord:
        profile = self.launcher.profile
        clear(self.out)
        job = {
            **self.launcher._job(self.program, self.seed, self.dtype),
            "stream": str(corpus.stream(profile, self.seed)),
            "heldout": str(corpus.heldout),
            "items": str(corpus.items),
            "tokenizer": str(corpus.tokenizer),
            "end": corpus.end,
        }
        started = time.perf_counter()
        answer = self._answer(job, peers, tell, cancel)
        if answer.get("from_outside"):
            # Somebody killed the worker, or it killed itself: once more, and if that ends so too it is the program's.
            tell(Event("note", "train", text=f"{answer['detail']}: trained again"))
            self.reports, self.lines = [], []
            answer = self._answer(job, peers, tell, cancel)
        return self._finish(answer, corpus, time.perf_counter() - started)

    def _answer(
        self, job: dict[str, Any], peers: Sequence[Peer], tell: OnEvent, cancel: threading.Event | None
    ) -> Mapping[str, Any]:
        """What the scorer says of one try, or why it was ended from here."""
        profile = self.launcher.profile
        monitor = Monitor(self.launcher.settings.monitor, profile.train.steps, peers)
        try:
            answer = run_job(
                job, lambda event: self._event(event, monitor, tell), cancel, 2 * profile.limits.seconds + 120
            )
        except _StoppedError as ended:
            return {"status": "stopped", "reason": ended.stop.reason, "detail": ended.stop.detail}
        if answer == CANCELLED:
            return {"status": "stopped", "reason": "interrupted", "detail": "the run was interrupted"}
        return answer

    def _event(self, event: dict[str, Any], monitor: Monitor, tell: OnEvent) -> None:
        kind, stop = event["event"], None
        if kind == "stage":
            if event["name"] == "train":
                monitor.started()
            elif event["name"] == "score":
                monitor.finished()
            tell(Event("stage", event["name"]))
        elif kind == "metrics":
            self.lines.append(json.dumps({key: value for key, value in event.items() if key != "event"}))
            step, loss = int(event["step"]), event["loss"]
            if loss is not None:
                self.reports.append((step, float(loss)))
            stop = monitor.report(step, loss, event.get("cpu_seconds"))
            tell(self._progress(event, step))
        else:
            stop = monitor.tick()
        if stop is not None:
            raise _StoppedError(stop)

    def _progress(self, event: Mapping[str, Any], step: int) -> Event:
        steps = self.launcher.profile.train.steps
        seconds = event.get("seconds")
        rate = event["tokens"] / seconds if seconds else None
        left = seconds * (steps - step) / step if seconds and step else None
        return Event("progress", "train", step, steps, event["loss"], rate, left)

    def _finish(self, answer: Mapping[str, Any], corpus: Corpus, wall: float) -> RunRecord:
        record = self._record(answer, corpus, wall)
        write_atomic(self.out / "metrics.jsonl", "".join(f"{line}\n" for line in self.lines))
        write_atomic(self.out / "train.csv", csv_text("step", record.name, record.train_loss))
        scores = {name: score.value for name, score in record.benchmarks.items()}
        write_atomic(self.out / "test.csv", csv_text("Model", record.name, scores))
        if answer.get("stderr"):
            write_atomic(self.out / "stderr.log", printable(str(answer["stderr"])))
        write_json(self.out / "result.json", record.model_dump(mode="json"))
        return record

    def _record(self, answer: Mapping[str, Any], corpus: Corpus, wall: float) -> RunRecord:
        launcher, profile = self.launcher, self.launcher.profile
        scored = answer.get("benchmarks", {})
        benchmarks = {
            name: BenchmarkScore(**score, counted=self.counted is None or name in self.counted)
            for name, score in scored.items()
        }
        heldout = answer.get("heldout_loss")
        checked = sum(check.seconds or 0.0 for check in self.checks)
        seconds = {**answer.get("seconds", {}), **({"check": round(checked, 3)} if self.checks else {}), "total": wall}
        if "train_cpu_seconds" in answer:
            seconds["train_cpu"] = answer["train_cpu_seconds"]
        sizes = {
            key: answer.get(key)
            for key in ("parameters", "mixer_parameters", "ffn_width", "tokens", "tokens_per_second")
        }
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
            train_loss=curve_columns(self.reports, profile.train.steps),
            flops_per_token=self.facts.get("flops_per_token"),
            work_exponent=self.facts.get("work_exponent"),
            seconds=seconds,
            checks=[*self.checks, *_audit_outcome(answer.get("audit"))],
            sandbox=str(answer.get("sandbox", "")),
            trust=self.program.trust,
            device=launcher.device,
            dtype=self.dtype,
            versions={**versions(), **answer.get("versions", {})},
            hardware=answer.get("hardware", {}),
            corpus_sha256=corpus.sha256,
            git_commit=git_commit(),
            command=self.command
            or f"python training/train.py PROGRAM --profile {profile.name} --seed {self.seed} --out DIR",
            reference=self.program.reference,
            **sizes,
        )


def refused_record(
    launcher: Launcher, program: Program, report: CheckReport | None, *, seed: int, run_id: str, command: str
) -> RunRecord:
    """The record of a program that was not trained: the check refused it, or was interrupted (`report` None)."""
    corpus = launcher.prepare()
    ended = {"status": "stopped", "reason": "interrupted", "detail": "the check was interrupted"}
    if report is not None:
        ended = {"status": "failed", "reason": "refused", "detail": report.why_refused()}
    run = _Run(launcher, program, seed, Path(), run_id, report or (), None, command)
    return run._record(ended, corpus, 0.0)


def _audit_outcome(audit: Mapping[str, Any] | None) -> list[CheckOutcome]:
    """The audit of the scored answers, as one more check of the record."""
    if audit is None:
        return []
    return [CheckOutcome(name="audit", passed=audit["passed"], severity="warn", detail=audit["detail"])]


def _ignore(event: Event) -> None:
    return None
