"""The host side of checks and training runs: prepares the corpus once, starts jobs, watches them, returns typed
results.

Imports no torch. One `Launcher` serves any number of threads; each job is a scorer process with a sandboxed worker
below it.
"""

from __future__ import annotations

import importlib.metadata
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from common.errors import AsiError, JobError, StoreError, UsageError
from common.files import read_json, sha256_text, write_json
from common.process import REPOSITORY
from common.records import Baseline, CheckOutcome, CheckReport, RunRecord
from common.settings import Settings
from training.benchmark_names import require_named
from training.checking import run_checks
from training.command import Command
from training.command_run import run_command
from training.data.corpus import Corpus, default_cache, prepare_corpus
from training.environment import (
    MODEL_SOURCE,
    TRAINER_SOURCES,
    find_device,
    require_processes,
    seed_programs,
    source_hash,
    versions,
)
from training.events import Event, OnEvent
from training.jobs import CANCELLED, run_job
from training.metric_writers import require_writers
from training.monitor import Peer, peer_of
from training.profiles import Profile, own_benchmarks
from training.programs import Program, load, to_job
from training.run import Run
from training.sandbox import Limits, on_device, training_memory_mb

__all__ = ["Event", "Launcher", "Peer", "find_device", "peer_of", "versions"]


_SCHEDULE = ("steps", "lr", "schedule", "warmup", "decay", "final_lr", "report_every", "micro_batch", "recompute")
"""Keys of a profile's train section that may differ where a run branches off a checkpoint."""


class Launcher:
    """Checks and trains programs at the scale of one profile.

    Args:
        settings: the sections sandbox, training and monitor are read.

    Attributes:
        command: the user's own training script, which then trains in place of ours; None: ours.

    Raises:
        UsageError: the device asked for is not there, there are more processes than rows or GPUs, the profile names a
            benchmark that is none, the project's own do not fit it, the user's own training script is not there, or a
            package that writes metrics is not installed.
    """

    def __init__(self, settings: Settings, profile: Profile) -> None:
        self.settings = settings
        if settings.training.command is None:
            require_named(profile.eval.benchmarks)
        self.profile = profile = own_benchmarks(profile) if settings.training.benchmarks == "own" else profile
        self.device = find_device(settings.training.device)
        require_processes(settings.training.processes, profile, self.device)
        training = settings.training
        self.command = (
            Command(training.command, training.command_seconds or profile.limits.seconds) if training.command else None
        )
        require_writers(training.tensorboard, training.wandb)
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

    def ready(self, on_event: OnEvent | None = None, cancel: threading.Event | None = None) -> Corpus | None:
        """Prepares what a run needs: the corpus; nothing (None) where the user's own script trains. Raises as
        `prepare`."""
        return self.prepare(on_event, cancel) if self.command is None else None

    def baseline_key(self) -> str:
        """Hash of all that must be equal for two scores to be compared. Prepares the corpus when that is not done.

        Taken once: a source file that changes while a pipeline runs must not split its results over two keys.
        """
        corpus = self.ready()
        if self._key is None:
            self._key = self._baseline_key(corpus) if corpus is not None else self._command_key()
        return self._key

    def _command_key(self) -> str:
        """Of the user's own script: never that of our trainer."""
        assert self.command is not None
        facts = {"profile": self.profile.fingerprint(), "seeds": seed_programs(), **self.command.facts()}
        return sha256_text(json.dumps(facts, sort_keys=True))

    def lineage(self) -> str:
        """Hash of all that training depends on but the schedule."""
        profile, corpus = self.profile, self.prepare()
        sections = profile.model_dump(mode="json", include={"model", "data", "tasks"})
        train = profile.train.model_dump(mode="json", exclude=set(_SCHEDULE))
        facts = {**self._facts(corpus), "sections": sections, "train": train}
        return sha256_text(json.dumps(facts, sort_keys=True))

    def _baseline_key(self, corpus: Corpus) -> str:
        facts = {
            "profile": self.profile.fingerprint(),
            "seeds": seed_programs(),
            "lm-eval": importlib.metadata.version("lm-eval"),
            **self._facts(corpus),
        }
        return sha256_text(json.dumps(facts, sort_keys=True))

    @property
    def compiles(self) -> bool:
        """Whether what surrounds the mixers is compiled."""
        return self.settings.training.compile and self.device == "cuda"

    def _facts(self, corpus: Corpus) -> dict[str, str]:
        return {
            **({"compile": "around the mixers"} if self.compiles else {}),
            "corpus": corpus.sha256,
            "tokenizer": corpus.tokenizer_sha256,
            "trainer": source_hash(TRAINER_SOURCES),
            "init": self.settings.training.init,
            "torch": importlib.metadata.version("torch"),
            "device": self.device,
            "dtype": self.dtype,
        }

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

        answer = run_checks(
            programs,
            self.settings,
            self.profile,
            self.device,
            show,
            cancel,
            baseline_mixer_parameters=baseline.mixer_parameters if baseline else None,
            baseline_flops_per_token=baseline.flops_per_token if baseline else None,
        )
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
        keep: bool = False,
        foreign: Literal["refuse", "discard"] = "refuse",
        threshold: float | None = None,
        origin: Path | None = None,
    ) -> RunRecord:
        """Trains and scores one program, without checking it, and writes metrics.jsonl, train.csv, test.csv,
        stderr.log (where the program printed something and was not stopped) and result.json. Where the user's own
        script trains (`command`), see training/command_run.py; peers, threshold, keep, foreign and origin mean nothing
        there.

        Where the profile asks for checkpoints and this run left some in `out`, it goes on from the last.

        Args:
            seed: of initialisation and data order.
            out: folder of the files, cleared of those of an earlier run; result.json comes last and appears whole.
            checks: the report of an earlier check: recorded, and its facts (dtype, FLOPs) are used.
            peers: earlier runs of this profile, for the monitor.
            counted_tasks: benchmarks that enter the mean; None counts all.
            cancel: once set, the run ends within a second as stopped, interrupted; its checkpoints stay.
            keep: a finished run's last checkpoint stays, and those that end a stable phase.
            foreign: what to do with checkpoints of another run in `out`.
            threshold: held-out loss above which a run is hopeless; None: none is.
            origin: a checkpoint to branch off, of this program and seed under another schedule (training/branch.py).

        Returns:
            The record. A fault of the program is a status and a reason in it.

        Raises:
            UsageError: `out` holds checkpoints of another run, and they are to be refused; or `origin` does not fit.
            JobError, SandboxError: a fault of ours. StoreError: `out` cannot be written.
        """
        if self.command is not None:
            return run_command(
                self, self.command, program, seed=seed, out=out, run_id=run_id, checks=checks,
                on_event=on_event or _ignore, cancel=cancel, repeat=command,
            )  # fmt: skip
        corpus = self.prepare(on_event, cancel)
        run = Run(self, program, seed, out, run_id, checks, counted_tasks, command, keep, foreign)
        run.threshold, run.origin = threshold, origin
        return run.execute(corpus, peers, on_event or _ignore, cancel)

    def _measure(self, tell: OnEvent, cancel: threading.Event | None) -> int:
        """Total parameters of the baseline at this profile: every candidate's budget. Cached by program and shape."""
        baseline = load(REPOSITORY / "training" / "architectures" / "delta_net.py", name="delta_net")
        key = sha256_text(f"{baseline.sha256} {self.profile.model.model_dump_json()} {source_hash(MODEL_SOURCE)}")[:20]
        file = self.cache / "sizes" / f"{key}.json"
        if file.is_file() and (known := _kept_size(file)) is not None:
            return known
        tell(Event("stage", "size"))
        answer = run_job("train", {**self.job(baseline, 0, None), "measure": True}, None, cancel)
        if answer == CANCELLED:
            raise JobError("measuring the baseline's size was cancelled")
        if answer.get("reason") is not None:
            raise self._unmeasured(answer)
        write_json(file, {"program": baseline.sha256, "profile": self.profile.name, "parameters": answer["parameters"]})
        return int(answer["parameters"])

    def _unmeasured(self, answer: Mapping[str, Any]) -> AsiError:
        """Why the baseline's size is not known: the profile is wrong, or something else went wrong."""
        name, limits, reason = self.profile.name, self.profile.limits, answer["reason"]
        if reason == "memory":
            memory = training_memory_mb(self.device, limits.memory_mb, self.settings.sandbox.memory_mb)
            most = on_device(Limits(memory_mb=memory), self.device).memory_mb
            raised = "limits.memory_mb of the profile" + (" and --sandbox.memory_mb" if self.device == "cpu" else "")
            return UsageError(
                f"profile {name} does not fit: its baseline alone needs more memory than {most:,} MB",
                f"raise {raised} where the machine has more, or take a smaller profile",
            )
        why = next(iter(str(answer.get("detail", "")).splitlines()), "it said nothing")
        if reason in ("refused", "crashed") and not answer.get("from_outside"):
            return UsageError(
                f"the baseline cannot be built at profile {name}: {why}",
                "correct [model] of the profile: docs/training.md says what its keys mean",
            )
        return JobError(
            f"the baseline's size at profile {name} was not measured ({reason}): {why}",
            "repeat the command; where its time was over, raise limits.seconds of the profile or free the machine",
        )

    def job(self, program: Program, seed: int, dtype: str | None) -> dict[str, Any]:
        """What every training job of this launcher says."""
        return {
            "program": to_job([program])[0],
            "profile": self.profile.model_dump(mode="json"),
            "seed": seed,
            "init": self.settings.training.init,
            "device": self.device,
            "dtype": dtype or self.dtype,
            "processes": self.settings.training.processes,
            "deterministic": self.settings.training.deterministic,
            "compile": self.compiles,
            "sandbox": {
                "backend": self.settings.sandbox.backend,
                "image": self.settings.sandbox.image,
                "disk_mb": self.settings.sandbox.disk_mb,
                "memory_mb": self.settings.sandbox.memory_mb,
            },
            "budget": self._budget,
        }


def _kept_size(file: Path) -> int | None:
    """Parameters in a cached file; None where it is damaged: they are counted again."""
    try:
        found = read_json(file)
    except StoreError:
        return None
    size = found.get("parameters") if isinstance(found, dict) else None
    return size if type(size) is int and size > 0 else None


def _ignore(event: Event) -> None:
    return None
