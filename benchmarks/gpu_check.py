"""Everything that needs a GPU to be seen, in one JSON.

    bash benchmarks/gpu_check.sh                            on a machine with a GPU, after `make setup`; about an hour
    bash benchmarks/gpu_check.sh --device cpu --profile cpu-smoke --steps 4     the same on a CPU, as far as that goes
    bash benchmarks/gpu_check.sh --parts machine speed --json FILE

The parts stand in benchmarks/gpu_parts.py. Each runs in a process of its own; one that fails is recorded with its
error, the others go on, and the exit status is 1. The file is written anew after every part: {device, profile, command,
parts: {name: {ok, seconds, value, error, reason}}}. `ok` is null, with the reason, for what this machine cannot show:
it was neither seen to work nor to fail. Needs no network: the models learn bytes of this repository, or of --text.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from common.errors import UsageError
from common.files import write_json
from common.process import REPOSITORY, exit_with_parent, kill_group, spawn
from common.settings import usage_exit
from training.architectures import ARCHITECTURES
from training.environment import find_device
from training.profiles import load_profile

__all__ = ["PARTS", "main"]

PARTS = ("machine", "tests", "sandbox", "check", "train", "speed", "fla", "ranks", "run")
_TAIL = 4000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts and returns the exit status: 0 none failed, 1 one did, 2 wrong usage."""
    exit_with_parent()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--profile", default="20m", help="whose model, batch and optimisation are measured")
    parser.add_argument("--run-profile", default="cpu-smoke", help="of the part run, which trains and scores in full")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of one measurement, 4 or more")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of the parts speed and fla")
    parser.add_argument("--programs", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the models learn, in place of this repository")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part-seconds", type=float, default=3600.0, help="after which a part has failed")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu_check.json"), metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.steps < 4 or arguments.repeats < 1:
        parser.error("--steps must be at least 4 and --repeats at least 1")
    try:
        find_device(arguments.device)
        load_profile(arguments.profile), load_profile(arguments.run_profile)
    except UsageError as error:
        return usage_exit(error)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    options = {name: vars(arguments)[name] for name in ("device", "profile", "run_profile", "steps", "repeats")}
    options |= {"programs": arguments.programs, "text": str(arguments.text.absolute()) if arguments.text else None}
    words = ["bash", "benchmarks/gpu_check.sh", *(sys.argv[1:] if argv is None else argv)]
    found: dict[str, Any] = {**options, "command": shlex.join(words), "parts": {}}
    for part in [part for part in PARTS if part in arguments.parts]:
        found["parts"][part] = result = _run(part, {**options, "found": found["parts"]}, arguments.part_seconds)
        write_json(arguments.json, found)
        verdict = {True: "ok", False: "FAILED", None: f"not seen: {result['reason']}"}[result["ok"]]
        print(f"{part:<8} {result['seconds']:6.1f} s  {verdict}", flush=True)
        if result["error"]:
            print("  " + result["error"].strip().splitlines()[-1], flush=True)
    print(f"{arguments.json}")
    return 1 if any(result["ok"] is False for result in found["parts"].values()) else 0


def _run(part: str, options: dict[str, Any], limit: float) -> dict[str, Any]:
    """One part in its own process: what it says, and how it ended."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu_parts.py"), part]
    begun = time.perf_counter()
    pipe = subprocess.PIPE
    process = spawn(command, env=_env(options), stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        said, errors = process.communicate(json.dumps(options).encode(), limit)
        ended = f"it ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        kill_group(process)
        said, errors = process.communicate()
        ended = f"it did not end within {limit:g} s"
    finally:
        if process.poll() is None:
            kill_group(process)
    seconds = round(time.perf_counter() - begun, 1)
    lines = said.decode("utf-8", "replace").strip().splitlines()
    answer = json.loads(lines[-1]) if process.returncode in (0, 1) and lines and lines[-1].startswith("{") else None
    result = {"ok": False, "seconds": seconds, "value": None, "error": None, "reason": None, **(answer or {})}
    if answer is None or (process.returncode != 0 and not result["error"]):
        result["error"] = f"{errors.decode('utf-8', 'replace')[-_TAIL:]}\n{ended}".strip()
    return {**result, "ok": None if result["reason"] else process.returncode == 0 and answer is not None}


def _env(options: dict[str, Any]) -> dict[str, str]:
    hidden = {} if options["device"] == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "ASI_TRAINING__DEVICE": options["device"], **hidden}


if __name__ == "__main__":
    sys.exit(main())
