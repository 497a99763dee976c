"""The parts of benchmarks/gpu_check.py: `python benchmarks/gpu_parts.py NAME < options.json`, one JSON on stdout.

machine: the card, the driver, versions. tests: tests/gpu. sandbox: a job sees the card, and no network. check: the
verifier over every architecture. train: each learns for some steps, in the sandbox. speed: tokens a second, share of
the card's peak and memory of the profile's step. fla: the same beside fla's own model in a plain loop (fla_loop.py), in
turns. ranks: two processes have the losses of one. run: train.py from check to score.

A part says {value} and ends with 0; {value, error} with 1 where something of it failed; {reason} where this machine
cannot show it. A fault that nobody expected is a traceback on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import importlib.metadata
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.process import REPOSITORY, exit_with_parent
from common.settings import Settings
from training.architectures import ARCHITECTURES
from training.checking import run_checks
from training.data.packing import row_type, write_stream
from training.environment import git_commit, versions, visible_cards
from training.flops import gpu_name, mfu, training_flops
from training.profiles import Profile, load_profile
from training.programs import Program, load
from training.sandbox import Limits, choose, worker_reads
from training.scorer.client import CandidateFault, Worker

__all__ = ["main"]

_HOUR = 3600.0
_CLOSE = {"cpu": 1e-4, "cuda": 2e-2}
"""Relative difference of losses that rounding explains: float32, and bfloat16 with sums in another order."""
_JOB = """
import json, os, socket, torch
device = os.environ["ASI_DEVICE"]
x = torch.ones(256, 256, device=device)
try:
    socket.create_connection(("1.1.1.1", 53), 2)
    network = True
except OSError:
    network = False
name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps({"gpu": name, "sum": float((x @ x).sum()), "network": network, "uid": os.getuid()}))
"""


class NotHereError(Exception):
    """This machine cannot show it."""


class FailedError(Exception):
    """Something of a part failed; `value` is what was seen all the same."""

    def __init__(self, message: str, value: Any = None) -> None:
        super().__init__(message)
        self.value = value


@dataclass(frozen=True)
class Options:
    """What gpu_check.py was told; `found`: what earlier parts said."""

    device: str
    profile: str
    run_profile: str
    steps: int
    repeats: int
    programs: list[str]
    text: str | None
    found: dict[str, Any]

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"


def machine(options: Options) -> dict[str, Any]:
    smi = shutil.which("nvidia-smi") if options.device == "cuda" else None
    query = "--query-gpu=name,memory.total,driver_version,compute_cap,power.limit,clocks.max.sm"
    said = subprocess.run([smi, query, "--format=csv"], capture_output=True, text=True, check=True) if smi else None
    packages = ("triton", "flash-linear-attention", "fla-core", "transformers")
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {
        "gpu": gpu_name() if options.device == "cuda" else None,
        "cards": visible_cards(),
        "nvidia_smi": said.stdout.strip().splitlines() if said else None,
        "versions": {**versions(), **installed},
        "commit": git_commit(),
    }


def tests(options: Options) -> dict[str, int]:
    _need_gpu(options)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-n", "0", "--timeout", "900"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    words = ("passed", "failed", "skipped", "errors?")
    counts = {word.strip("?"): sum(map(int, re.findall(rf"(\d+) {word}", done.stdout))) for word in words}
    if done.returncode != 0 or counts["skipped"] or not counts["passed"]:
        raise FailedError(done.stdout[-3000:] + done.stderr[-500:], counts)
    return counts


def sandbox(options: Options) -> dict[str, Any]:
    box = choose("auto", options.device)
    job = box.start(
        [sys.executable, "-c", _JOB],
        reads=worker_reads(),
        env={"ASI_DEVICE": options.device},
        limits=Limits(seconds=300, cpu_seconds=300),
    )
    try:
        said = job.stdout.read()
        status = job.wait(300)
    finally:
        job.kill()
    value = {"backend": box.backend, "note": box.note, **(json.loads(said) if said.strip() else {})}
    if status != 0:
        raise FailedError(f"the job ended with status {status}, {job.ending()}: {job.stderr_tail()[-2000:]}", value)
    if value["network"] or value["sum"] != 256.0**3 or (value["gpu"] is not None) != (options.device == "cuda"):
        raise FailedError("expected a job without network that computes on the device", value)
    if box.backend == "process":
        raise FailedError(f"expected a real sandbox, got the limited process: {box.note}", value)
    return value


def check(options: Options) -> dict[str, Any]:
    profile = load_profile(options.profile)
    programs = [_program(name) for name in options.programs]
    answer = run_checks(programs, Settings(), profile, options.device, lambda event: None)
    value = {
        program.name: {
            "accepted": report["accepted"],
            "failed": {c["name"]: c["detail"] for c in report["checks"] if not c["passed"]},
            "seconds": round(sum(c["seconds"] or 0.0 for c in report["checks"]), 1),
            "flops_per_token": report["facts"].get("flops_per_token"),
        }
        for program, report in zip(programs, answer["reports"], strict=True)
    }
    if refused := [name for name, said in value.items() if not said["accepted"]]:
        raise FailedError(f"expected all to be accepted, refused: {', '.join(refused)}", value)
    return value


def train(options: Options) -> dict[str, Any]:
    profile = _profile(options)
    micro = profile.train.micro_batch or profile.train.batch
    spec = profile.train.model_copy(update={"batch": min(profile.train.batch, 2 * micro)})
    profile = profile.model_copy(update={"train": spec})
    value: dict[str, Any] = {}
    with _stream(options, profile) as stream:
        budget = _trained(options, profile, "delta_net", stream)["parameters"]
        for name in options.programs:
            try:
                value[name] = _trained(options, profile, name, stream, budget)
            except CandidateFault as fault:
                value[name] = {"error": f"{fault.detail}\n{fault.stderr[-1000:]}"}
    failed = [name for name, said in value.items() if not _learnt(said)]
    if failed:
        raise FailedError(f"expected every program to learn, these did not: {', '.join(failed)}", value)
    return value


def speed(options: Options) -> dict[str, Any]:
    profile = _profile(options)
    with _stream(options, profile) as stream:
        runs = [_trained(options, profile, "delta_net", stream) for _ in range(options.repeats)]
        compiled = [_trained(options, profile, "delta_net", stream, compiled=True)] if options.device == "cuda" else []
    rate = statistics.median(run["tokens_per_second"] for run in runs)
    checked = ((options.found.get("check") or {}).get("value") or {}).get("delta_net", {})
    flops = training_flops(profile, runs[0], checked.get("flops_per_token"))
    value: dict[str, Any] = {
        "runs": runs,
        "tokens_per_second": rate,
        "training_flops_per_token": flops,
        "mfu": mfu(rate, flops, gpu_name() if options.device == "cuda" else None),
        "peak_memory_mb": max(run["peak_memory_mb"] for run in runs),
        "compiled": compiled,
    }
    if options.device == "cuda" and value["mfu"] is None:
        why = "FLOPs were not counted (part check)" if flops is None else f"the peak of {gpu_name()} is not known"
        raise FailedError(f"there is no MFU: {why}; training/flops.py lists the cards", value)
    return value


def fla(options: Options) -> dict[str, Any]:
    _need_gpu(options)
    profile = _profile(options)
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    with _stream(options, profile) as stream:
        job = _job(options, profile, "delta_net", stream)
        for _ in range(options.repeats):
            ours.append(_trained(options, profile, "delta_net", stream))
            theirs.append(_fla(job))
    one, other = (statistics.median(run["tokens_per_second"] for run in runs) for runs in (ours, theirs))
    return {"ours": ours, "theirs": theirs, "ratio": one / other}


def ranks(options: Options) -> dict[str, Any]:
    if options.device == "cuda" and visible_cards() < 2:
        raise NotHereError("one GPU: two processes take two")
    profile = _profile(options)
    with _stream(options, profile) as stream:
        one, two = (_trained(options, profile, "delta_net", stream, world=world) for world in (1, 2))
    pairs = list(zip(one["losses"], two["losses"], strict=True))
    value = {"one": one, "two": two, "largest_difference": max(abs(a - b) / abs(a) for a, b in pairs)}
    if not value["largest_difference"] <= _CLOSE[options.device]:
        raise FailedError(f"expected losses of two ranks within {_CLOSE[options.device]:g} of those of one", value)
    return value


def run(options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "training/train.py", str(ARCHITECTURES["delta_net"]), "--out", folder]
        command += ["--profile", options.run_profile, *(["--text", options.text] if options.text else [])]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        file = Path(folder) / "result.json"
        record = json.loads(file.read_text()) if file.is_file() else {}
    names = ("status", "reason", "device", "dtype", "heldout_loss", "seconds", "tokens_per_second", "hardware")
    value = {name: record.get(name) for name in (*names, "sandbox", "training_flops_per_token", "efficiency")}
    audit = [c["passed"] for c in record.get("checks", []) if c["name"] == "audit"]
    if done.returncode != 0 or value["device"] != options.device or audit != [True]:
        raise FailedError(f"status {done.returncode}, audit {audit}: {done.stderr[-2000:]}{done.stdout[-1000:]}", value)
    return value


def _need_gpu(options: Options) -> None:
    if options.device != "cuda":
        raise NotHereError("no GPU")


def _program(name: str) -> Program:
    return load(ARCHITECTURES[name], name=name)


def _profile(options: Options) -> Profile:
    """The profile for so many steps of text alone."""
    profile = load_profile(options.profile)
    warmup, every = min(profile.train.warmup, options.steps // 2), max(1, options.steps // 4)
    train = {"steps": options.steps, "warmup": warmup, "decay": 0, "report_every": every}
    return profile.model_copy(
        update={
            "train": profile.train.model_copy(update=train),
            "tasks": profile.tasks.model_copy(update={"share": 0.0}),
        }
    )


@contextmanager
def _stream(options: Options, profile: Profile) -> Iterator[Path]:
    """The rows of a run: the bytes of a text are its tokens, so that no tokenizer is needed."""
    files = [Path(options.text)] if options.text else sorted(REPOSITORY.glob("training/**/*.py"))
    tokens = np.frombuffer(b"\n".join(file.read_bytes() for file in files), dtype=np.uint8).astype(np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream"
        write_stream(profile, tokens, 0, path)
        yield path


def _job(options: Options, profile: Profile, name: str, stream: Path, budget: int | None = None) -> dict[str, Any]:
    model = profile.model
    return {
        "program": _program(name).text,
        "model": model.model_dump(mode="json"),
        "mixers": [model.mixer_arguments(layer) for layer in range(model.layers)],
        "budget": budget,
        "stream": str(stream),
        "type": row_type(model.vocab).name,
        "train": profile.train.model_dump(mode="json"),
        "device": options.device,
    }


def _trained(
    options: Options,
    profile: Profile,
    name: str,
    stream: Path,
    budget: int | None = None,
    world: int = 1,
    compiled: bool = False,
) -> dict[str, Any]:
    """{parameters, mlps, losses of the reports, tokens_per_second, peak_memory_mb, seconds} of one worker in its
    sandbox; the speed is the host's, from the first report after a quarter of the steps on, so that compiling does not
    count.

    Raises:
        CandidateFault: the program failed.
    """
    job = _job(options, profile, name, stream, budget)
    begun, seen = time.perf_counter(), []
    limits = Limits(seconds=_HOUR, cpu_seconds=_HOUR * 4, memory_mb=profile.limits.memory_mb, ranks=world)
    box = choose("auto", options.device)

    def heard(meta: dict[str, Any], arrays: list[Any]) -> None:
        if "loss" in meta:
            seen.append((meta["step"], meta["loss"], time.perf_counter()))

    env = {"ASI_WORLD": str(world)}
    with Worker(box, _program(name), reads=[stream], limits=limits, env=env, timeout=_HOUR) as worker:
        worker.call("train.prepare", {"seed": 0, "dtype": options.dtype})
        worker.load()
        call = {key: job[key] for key in ("model", "mixers", "budget")}
        sizes, _ = worker.call("train.build", {**call, "init": "program", "compile": compiled})
        if "refused" in sizes:
            raise FailedError(f"{name} cannot be built: {sizes['refused']}")
        answer, _ = worker.call("train.run", {key: job[key] for key in ("stream", "type", "train")}, on_event=heard)
    warm = next(at for at in seen if at[0] >= profile.train.steps // 4)
    passed = (seen[-1][0] - warm[0]) * profile.train.tokens_per_step
    return {
        "parameters": sizes["parameters"],
        "mlps": sizes["mlps"],
        "losses": [loss for _, loss, _ in seen],
        "tokens_per_second": passed / (seen[-1][2] - warm[2]),
        "peak_memory_mb": answer["peak_memory_mb"],
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _learnt(said: dict[str, Any]) -> bool:
    losses = said.get("losses") or [None]
    return all(loss is not None and math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]


def _fla(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "fla_loop.py")]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode != 0:
        raise FailedError(f"fla's own loop ended with status {done.returncode}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


PARTS: dict[str, Callable[[Options], Any]] = {
    part.__name__: part for part in (machine, tests, sandbox, check, train, speed, fla, ranks, run)
}


def main() -> int:
    exit_with_parent()
    os.environ["ASI_PARENT_PID"] = str(os.getpid())  # for what a part starts: its parent is this process
    options = Options(**json.load(sys.stdin))
    try:
        answer = {"value": PARTS[sys.argv[1]](options)}
    except NotHereError as reason:
        answer = {"reason": str(reason)}
    except FailedError as failure:
        print(json.dumps({"value": failure.value, "error": str(failure)}, allow_nan=False))
        return 1
    print(json.dumps(answer, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
