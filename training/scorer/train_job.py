"""The trusted side of one training run: starts the worker, lets it train, then measures it from its logits.

Everything that is scored is computed here. What the worker says of itself (its training loss, its sizes) is passed on
as said; steps, tokens, wall and CPU seconds beside it are counted here.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training import checkpoints
from training.checkpoints import Checkpoint, Identity
from training.data.packing import row_type
from training.profiles import OWN_TASKS, Profile, TrainSpec
from training.programs import from_job
from training.sandbox import Limits, choose, training_memory_mb
from training.scorer import answers
from training.scorer.building import build, launched, prepare, rebuild
from training.scorer.client import CandidateFault, Worker, WorkerDied
from training.scorer.confirm import UnrepeatableError
from training.scorer.efficiency import decode_speed, prefill_speed
from training.scorer.fresh import Fresh
from training.scorer.heldout import ForgedError, NotFiniteError
from training.scorer.saving import Place, Saver, send
from training.scorer.scoring import Scoring, import_benchmarks, material
from training.scorer.validation import Sample, Told, sample_of

__all__ = ["run"]

Emit = Callable[[dict[str, Any]], None]
PULSE = 1.0
"""Seconds between two readings of the worker's CPU time."""
_REASONS = {"timeout": "timeout", "memory": "memory"}


def run(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Runs one job.

    Args:
        job: {program, profile, seed, init, device, dtype, processes: that share each batch while it trains,
            deterministic, sandbox: {backend, image, disk_mb, memory_mb}, budget}; with
            `measure` only the sizes of the model are returned, else also {stream, heldout, items, tokenizer, end}: the
            files of the corpus; and optionally checkpoints: {folder, identity, origin}, where the run goes on from what
            it finds in the folder, at first from the file `origin` (None: from the beginning).
        emit: told {event: "stage", name}, {event: "metrics", step, loss, task_loss, lr, grad_norm, tokens,
            seconds, tokens_per_second, memory_mb, cpu_seconds} and in some val_loss and val_tasks, {event: "resumed",
            step, seconds: of training until there} before the reports that a checkpoint holds are told again,
            {event: "note", text} and, once a second, {event: "pulse", cpu_seconds, step}.

    Returns:
        {status, reason, detail, from_outside: whether the worker was killed by somebody else, sandbox, seconds: {start,
        train, score, and as parts of score heldout, benchmarks and audit, each also as *_cpu}, cpu_seconds,
        train_cpu_seconds, versions, hardware, parameters and the other sizes of the model, tokens, tokens_per_second,
        prefill, decode, worker_memory_mb, heldout_loss, benchmarks, audit: {passed, detail}, stderr: the end of what
        the worker wrote there}: whatever was measured before the end. A fault of the program is a status, never an
        exception.
    """
    profile = Profile.model_validate(job["profile"])
    sandbox = choose(job["sandbox"]["backend"], job["device"], job["sandbox"]["image"])
    result: dict[str, Any] = {
        "status": "finished",
        "reason": None,
        "detail": "",
        "sandbox": sandbox.backend,
        "seconds": {},
    }
    place = _place(job, profile)
    found = _found(job, place, emit)
    # What a killed run has used counts, or a program that kills itself could train for longer.
    limits = Limits(
        seconds=max(1.0, profile.limits.seconds - (found.seconds if found else 0.0)),
        cpu_seconds=max(1.0, profile.limits.cpu_seconds - (found.cpu_seconds if found else 0.0)),
        memory_mb=training_memory_mb(job["device"], profile.limits.memory_mb, int(job["sandbox"]["memory_mb"])),
        file_mb=int(job["sandbox"]["disk_mb"]),
    )
    world = 1 if job.get("measure") else int(job.get("processes", 1))
    program = from_job([job["program"]])[0]
    if not job.get("measure") and any(name not in OWN_TASKS for name in profile.eval.benchmarks):
        emit({"event": "stage", "name": "benchmarks"})
        import_benchmarks()
        from training.scorer.benchmarks import require_official

        require_official(profile.eval.benchmarks)  # a run that could not be scored is not begun
    emit({"event": "stage", "name": "start"})
    started = time.perf_counter()
    reads = [] if job.get("measure") else [Path(job["stream"])]

    def start(seconds: float, reads: Sequence[Path] = (), world: int = 1) -> Worker:
        allowed = replace(limits, seconds=seconds, ranks=world)
        return Worker(sandbox, program, reads=reads, limits=allowed, env={"ASI_WORLD": str(world)}, timeout=seconds)

    with start(limits.seconds, reads, world) as worker:
        pulse = _Pulse(worker, emit, profile.train, found)
        try:
            _phases(job, profile, worker, start, pulse, place, result, started)
        except CandidateFault as fault:
            result |= {"status": "failed", "reason": _REASONS.get(fault.reason, "crashed"), "detail": _detail(fault)}
            result["from_outside"] = isinstance(fault, WorkerDied) and fault.from_outside
        except ForgedError as error:
            result |= {"status": "failed", "reason": "forged", "detail": str(error)}
        except UnrepeatableError as error:
            result |= {"status": "failed", "reason": "refused", "detail": str(error)}
        except NotFiniteError as error:
            result |= {"status": "failed", "reason": "nan", "detail": str(error)}
        finally:
            pulse.stop()
            result["cpu_seconds"] = worker.cpu_seconds()
    result["stderr"] = worker.process.stderr_tail()
    return result


def _phases(
    job: dict[str, Any],
    profile: Profile,
    worker: Worker,
    start: Callable[[float], Worker],
    pulse: _Pulse,
    place: Place | None,
    result: dict[str, Any],
    started: float,
) -> None:
    seconds: dict[str, float] = result["seconds"]
    model = profile.model
    result["versions"], hardware = answers.prepared_facts(prepare(job, worker))
    built = build(job, profile, worker)
    result["hardware"] = {**_hardware(), **hardware}
    if "refused" in built:
        result |= {"status": "failed", "reason": "refused", "detail": str(built["refused"])[:500]}
        return
    result |= answers.model_sizes(built)
    refusal = answers.size_refusal(result["parameters"], job["budget"], model.tolerance)
    if refusal is not None:
        result |= {"status": "failed", "reason": "refused", "detail": refusal}
        return
    seconds["start"] = time.perf_counter() - started
    if job.get("measure"):
        return
    preparing = ThreadPoolExecutor(1, thread_name_prefix="material")
    given = preparing.submit(material, job, profile)
    preparing.shutdown(wait=False)
    pulse.emit({"event": "stage", "name": "train", **{name: result[name] for name in ("parameters", "mlps")}})
    answer = _train(job, profile, worker, pulse, place, result)
    peak = round(answers.peak_memory(answer), 1)
    if job["device"] == "cuda":  # on a CPU it is the process's memory, which the host reads itself, below
        result["hardware"]["device_memory_mb"] = peak
    pulse.emit({"event": "stage", "name": "score"})
    result["prefill"], result["decode"] = prefill_speed(worker, profile), decode_speed(worker)
    result["worker_memory_mb"] = round(worker.peak_memory_mb(), 1)
    begun = time.perf_counter()
    rebuilt = partial(rebuild, job, profile, result["parameters"])
    with Fresh(partial(launched, job, start), rebuilt, profile.limits.seconds) as fresh:
        fresh.begin()  # beside the scoring
        scoring = Scoring(job, profile, worker, fresh, given, result)
        scoring.check_reported(*pulse.last)
        scoring.run()
    seconds["score"] = time.perf_counter() - begun


def _train(
    job: dict[str, Any],
    profile: Profile,
    worker: Worker,
    pulse: _Pulse,
    place: Place | None,
    result: dict[str, Any],
) -> dict[str, Any]:
    """Lets the worker train, from its checkpoint where there is one, and returns its answer."""
    call = {
        "stream": job["stream"],
        "type": row_type(profile.model.vocab).name,
        "train": profile.train.model_dump(mode="json"),
    }
    if place is not None:
        call["checkpoint"] = {
            **profile.checkpoint.model_dump(include={"steps", "seconds"}),
            "at": sorted(place.stable),
        }
    pulse.sample = sample_of(profile, np.memmap(job["heldout"], dtype=np.uint16, mode="r"))
    if pulse.sample is not None:
        call["validation"] = {"every": profile.eval.validation_every}
    found = pulse.found
    if found is not None:
        send(worker, found)
        sizes = {name: array.size for name, array in found.tensors.items()}
        call["resume"] = {"step": found.step, "sizes": sizes}
    pulse.train()
    saver = None
    if place is not None:
        begun_at = found.step if found else 0
        saver = Saver(
            place, result["parameters"], begun_at, profile.train.steps, pulse.facts(place), partial(_note, pulse.emit)
        )
    try:
        asked = pulse.sample.asked() if pulse.sample is not None else []
        answer, _ = worker.call("train.run", call, asked, on_event=partial(pulse.event, saver))
    finally:
        if saver is not None:
            saver.close()
    if "refused" in answer:
        raise UnrepeatableError(
            "the run cannot go on from its checkpoint: what the model keeps in parameters and buffers is not what a "
            f"fresh process has after one forward; make it in __init__, or train without checkpoints: "
            f"{str(answer['refused'])[:500]}"
        )
    if "changed" in answer:
        raise ForgedError(answers.changed_parameter(answer["changed"]))
    pulse.require_all()
    result["seconds"]["train"] = pulse.train_seconds()
    tokens = profile.train.steps * profile.train.tokens_per_step
    result |= {"tokens": tokens, "tokens_per_second": tokens / result["seconds"]["train"]}
    result["train_cpu_seconds"] = pulse.train_cpu_seconds()
    return answer


def _place(job: dict[str, Any], profile: Profile) -> Place | None:
    """Where checkpoints go; None where there are none."""
    spec = job.get("checkpoints")
    if spec is None or not (profile.checkpoint.on or profile.checkpoint.stable):
        return None
    return Place(
        Path(spec["folder"]),
        Identity(**spec["identity"]),
        profile.checkpoint.last,
        frozenset(profile.stable_steps()),
    )


def _found(job: dict[str, Any], place: Place | None, emit: Emit) -> Checkpoint | None:
    """What the run goes on from: its own last checkpoint, or at first the one that it branches off."""
    found = checkpoints.newest(place.folder, place.identity, partial(_note, emit)) if place is not None else None
    origin = job.get("checkpoints", {}).get("origin")
    return checkpoints.read(Path(origin)) if found is None and origin is not None else found


def _note(emit: Emit, text: str) -> None:
    emit({"event": "note", "text": text})


class _Pulse:
    """The trusted account of a run, over kills: passes metrics on, and tells the host once a second how much CPU time
    the worker has used.

    Args:
        spec: which steps are reported, and the tokens of each.
        found: the checkpoint that the run goes on from; what it used before counts here.

    Attributes:
        last: training loss of the last report, and the steps it stands for.
        sample: what is asked while the run trains; None: nothing.
    """

    sample: Sample | None = None

    def __init__(self, worker: Worker, emit: Emit, spec: TrainSpec, found: Checkpoint | None = None) -> None:
        self.emit, self.found = emit, found
        self.last: tuple[float | None, int] = None, 0
        self._reports: list[dict[str, Any]] = []
        self._validated: dict[int, Told] = {}
        self._worker, self._spec, self._step = worker, spec, 0
        self._before = (found.seconds, found.cpu_seconds) if found else (0.0, 0.0)
        self._begun, self._cpu = time.perf_counter(), 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def train(self) -> None:
        """Training begins now. Reports of the checkpoint are told again, so that whoever listens knows them all."""
        self._begun, self._cpu = time.perf_counter(), self._worker.cpu_seconds()
        if self.found is not None:
            self.emit({"event": "resumed", "step": self.found.step, "seconds": self.found.seconds})
            for report in self.found.reports:
                self._tell(report)

    def train_seconds(self) -> float:
        return self._before[0] + time.perf_counter() - self._begun

    def train_cpu_seconds(self) -> float:
        return self._before[1] + self._worker.cpu_seconds() - self._cpu

    def facts(self, place: Place) -> Callable[[int], Checkpoint]:
        """What is known of the run when a snapshot of it begins to arrive. Raises ForgedError where that cannot be now:
        before an earlier report, or behind the one that comes next."""

        def known(step: int) -> Checkpoint:
            due = self._due()
            if step < self._done() or (due is not None and step >= due):
                raise ForgedError(
                    f"expected a checkpoint between the steps {self._done()} and {due}, got one of step {step}"
                )
            return Checkpoint(
                place.identity, step, self.train_seconds(), self.train_cpu_seconds(), list(self._reports), {}
            )

        return known

    def event(self, saver: Saver | None, meta: dict[str, Any], arrays: list[np.ndarray]) -> None:
        """One event of the worker: a report, a piece of a checkpoint, or logits of the validation sample, which come
        before the report of their step."""
        piece = meta.get("checkpoint")
        if self.sample is not None and type(meta.get("validation")) is int:
            self._validated = {meta["validation"]: self.sample.told(arrays)}
        elif piece is None:
            self._report(meta)
        elif saver is None or not isinstance(piece, dict):
            raise ForgedError(f"expected a report of training, got {str(meta)[:200]}")
        else:
            saver.piece(piece, arrays)

    def require_all(self) -> None:
        """Raises ForgedError where training ended before its last report."""
        if (due := self._due()) is not None:
            raise ForgedError(f"expected the report of step {due} before the end of training, got none")

    def _done(self) -> int:
        """The last step that is known to be done."""
        return max(self._step, self.found.step if self.found else 0)

    def _due(self) -> int | None:
        return answers.next_report(self._done(), self._spec.report_every, self._spec.steps)

    def _report(self, meta: dict[str, Any]) -> None:
        report = answers.training_report(meta, self._due())
        before = self._reports[-1] if self._reports else {"tokens": 0, "seconds": 0.0}
        tokens, seconds = report["step"] * self._spec.tokens_per_step, self.train_seconds()
        passed = seconds - before["seconds"]
        counted = {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": (tokens - before["tokens"]) / passed if passed > 0 else None,
            "cpu_seconds": self._worker.cpu_seconds() + self._before[1],
        }
        said = self._validated.get(report["step"])
        validated = {} if said is None else {"val_loss": said.loss, **({"val_tasks": said.tasks} if said.tasks else {})}
        self._tell({**report, **validated, **counted})

    def _tell(self, report: dict[str, Any]) -> None:
        self._reports.append(report)
        self.last = report["loss"], report["step"] - self._step
        self._step = report["step"]
        self.emit({"event": "metrics", **report})

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stopped.wait(PULSE):
            with suppress(OSError):
                used = self._worker.cpu_seconds() + self._before[1]
                self.emit({"event": "pulse", "cpu_seconds": used, "step": self._step or None})


def _detail(fault: CandidateFault) -> str:
    error = getattr(fault, "error", None)
    where = f"\n{error['traceback']}" if isinstance(error, dict) and error.get("traceback") else ""
    tail = f"\n{fault.stderr.strip()[-1000:]}" if fault.stderr.strip() and not where else ""
    return f"{fault.detail}{where}{tail}"[:4000]


def _hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count() or 1,
        "cpu": _cpu_name(),
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
