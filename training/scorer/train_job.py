"""The trusted side of one training run: starts the worker, lets it train, then measures it from its logits.

Everything that is scored is computed here. What the worker says of itself (its training loss, its sizes) is passed on
as said; the CPU seconds beside it are read by the host.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training.data.packing import row_type
from training.profiles import Profile
from training.programs import from_job
from training.sandbox import Limits, choose
from training.scorer import answers
from training.scorer.client import CandidateFault, Worker, WorkerDied
from training.scorer.confirm import write_weights
from training.scorer.heldout import ForgedError, NotFiniteError
from training.scorer.scoring import Scoring

__all__ = ["run"]

Emit = Callable[[dict[str, Any]], None]
PULSE = 1.0
"""Seconds between two readings of the worker's CPU time."""
_REASONS = {"timeout": "timeout", "memory": "memory"}
_REMEMBERED = 5
"""Words by which an item of the cloze task is recognised in other text."""


def run(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Runs one job.

    Args:
        job: {program, profile, seed, init, device, dtype, sandbox: {backend, image, disk_mb, memory_mb}, budget}; with
            `measure` only the sizes of the model are returned, else also {stream, heldout, items, tokenizer, end}: the
            files of the corpus.
        emit: told {event: "stage", name}, {event: "metrics", step, loss, task_loss, lr, grad_norm, tokens,
            seconds, cpu_seconds} and, once a second, {event: "pulse", cpu_seconds, step}.

    Returns:
        {status, reason, detail, audit: {passed, detail}, seconds: {start, train, audit, score}, stderr: the end of
        what the worker wrote there, ...}: whatever was measured before the end. A fault of the program is a status,
        never an exception.
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
    limits = Limits(
        seconds=profile.limits.seconds,
        cpu_seconds=profile.limits.cpu_seconds,
        memory_mb=min(profile.limits.memory_mb, int(job["sandbox"]["memory_mb"])) if job["device"] == "cpu" else None,
        file_mb=int(job["sandbox"]["disk_mb"]),
    )
    program = from_job([job["program"]])[0]
    emit({"event": "stage", "name": "start"})
    started = time.perf_counter()
    reads = [] if job.get("measure") else [Path(job["stream"])]

    def start(reads: list[Path]) -> Worker:
        return Worker(sandbox, program, reads=reads, limits=limits, timeout=profile.limits.seconds)

    with start(reads) as worker:
        pulse = _Pulse(worker, emit, profile.train.steps)
        try:
            _phases(job, profile, worker, partial(start, []), pulse, result, started)
        except CandidateFault as fault:
            result |= {"status": "failed", "reason": _REASONS.get(fault.reason, "crashed"), "detail": _detail(fault)}
            result["from_outside"] = isinstance(fault, WorkerDied) and fault.from_outside
        except ForgedError as error:
            result |= {"status": "failed", "reason": "forged", "detail": str(error)}
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
    start: Callable[[], Worker],
    pulse: _Pulse,
    result: dict[str, Any],
    started: float,
) -> None:
    seconds: dict[str, float] = result["seconds"]
    model = profile.model
    built, facts = _build(job, profile, worker)
    result["versions"], hardware = answers.prepared_facts(facts)
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
    benchmarks = threading.Thread(target=_import_benchmarks, name="import-lm-eval", daemon=True)
    benchmarks.start()
    pulse.emit({"event": "stage", "name": "train", **{name: result[name] for name in ("parameters", "ffn_width")}})
    begun = time.perf_counter()
    call = {
        "stream": job["stream"],
        "type": row_type(model.vocab).name,
        "train": profile.train.model_dump(mode="json"),
    }
    cpu = worker.cpu_seconds()
    answer, _ = worker.call("train.run", call, on_event=pulse.metrics)
    seconds["train"] = time.perf_counter() - begun
    tokens = profile.train.steps * profile.train.tokens_per_step
    result |= {"tokens": tokens, "tokens_per_second": tokens / seconds["train"]}
    result["train_cpu_seconds"] = worker.cpu_seconds() - cpu
    result["hardware"]["peak_memory_mb"] = round(answers.peak_memory(answer), 1)
    pulse.emit({"event": "stage", "name": "score"})
    begun = time.perf_counter()

    def restored(weights: list[np.ndarray]) -> Worker:
        return _restored(job, profile, start(), result["parameters"], weights)

    scoring = Scoring(job, profile, worker, restored, result)
    scoring.check_reported(*pulse.last)
    scoring.run(benchmarks)
    seconds["score"] = time.perf_counter() - begun


def _restored(
    job: dict[str, Any], profile: Profile, worker: Worker, parameters: int, weights: list[np.ndarray]
) -> Worker:
    """`worker`, a fresh process, with these weights; closed where they do not fit."""
    try:
        built, _ = _build(job, profile, worker)
        if "refused" in built or answers.model_sizes(built)["parameters"] != parameters:
            raise ForgedError(f"a fresh process builds another model: {str(built)[:300]}")
        write_weights(worker, weights)
    except BaseException:
        worker.close()
        raise
    return worker


def _build(job: dict[str, Any], profile: Profile, worker: Worker) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prepares the process, loads the program, builds the model: (its sizes as said, facts of the process)."""
    facts, _ = worker.call("train.prepare", {"seed": job["seed"], "dtype": job["dtype"]})
    worker.load()
    model = profile.model
    built, _ = worker.call(
        "train.build",
        {
            "model": model.model_dump(mode="json"),
            "mixers": [model.mixer_arguments(layer) for layer in range(model.layers)],
            "budget": job["budget"],
            "init": job["init"],
        },
    )
    return built, facts


class _Pulse:
    """Passes metrics on, and tells the host once a second how much CPU time the worker has used."""

    def __init__(self, worker: Worker, emit: Emit, steps: int) -> None:
        self.emit = emit
        self.last: tuple[float | None, int] = None, 0
        """Training loss of the last report, and the steps it stands for."""
        self._worker, self._steps, self._step = worker, steps, 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def metrics(self, meta: dict[str, Any]) -> None:
        report = answers.training_report(meta, self._step, self._steps)
        self.last = report["loss"], report["step"] - self._step
        self._step = report["step"]
        self.emit({"event": "metrics", **report, "cpu_seconds": self._worker.cpu_seconds()})

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stopped.wait(PULSE):
            with suppress(OSError):
                self.emit({"event": "pulse", "cpu_seconds": self._worker.cpu_seconds(), "step": self._step or None})


def _import_benchmarks() -> None:
    """lm-eval takes seconds to import; it does so while the worker trains."""
    os.environ["TQDM_DISABLE"] = "1"
    import training.scorer.benchmarks  # noqa: F401


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
