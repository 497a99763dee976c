"""A training loop as anybody writes it with PyTorch, in a process of its own: what our worker is measured against.

Started by benchmarks/training.py: `python benchmarks/bare_loop.py < job.json`, where the first line of standard input
is the job {program, model, mixers, budget, stream, type, train, core}. Each further line, a number of steps, trains on
so many steps of the stream from its beginning and answers {seconds, cpu_seconds}, from the end of the first step to
the end of the last. With `table` in the job it trains once with the worker's own loop under torch's profiler instead,
and prints the profiler's table.

The same model on the same tokens, with torch's fused AdamW. All tokens lie in memory as tensors before the clock
starts: a bare loop pays for no data, no reports and no checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import os
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.process import exit_with_parent
from training.worker.model import LanguageModel, build_model
from training.worker.optimizer import learning_rate
from training.worker.program import load_class
from training.worker.state import WorkerState
from training.worker.train import OPS

IGNORED = -100


def main() -> int:
    exit_with_parent()
    job = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, {int(job["core"])})
    torch.set_num_threads(1)
    if job.get("table"):
        print(profiled(job))
        return 0
    model = build(job)
    inputs_NBT, targets_NBT = batches(job)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(train(model, inputs_NBT, targets_NBT, job["train"], int(line))), flush=True)
    return 0


def build(job: dict[str, Any]) -> LanguageModel:
    torch.manual_seed(0)
    made = load_class(job["program"])
    model, _ = build_model(made, job["model"], job["mixers"], budget=job["budget"], init="program", device="cpu")
    return model


def batches(job: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(inputs, targets) int64 [steps, batch, T] of the whole stream; a place that is not predicted is IGNORED."""
    batch, length = int(job["train"]["batch"]), int(job["train"]["seq_len"])
    rows = np.fromfile(job["stream"], dtype=job["type"]).reshape(-1, batch, length + 1).astype(np.int64)
    targets = np.where(rows < 0, IGNORED, rows)[..., 1:]
    inputs = np.where(rows < 0, -1 - rows, rows)[..., :-1]
    return torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(np.ascontiguousarray(targets))


def train(
    model: LanguageModel, inputs_NBT: Tensor, targets_NBT: Tensor, spec: dict[str, Any], steps: int
) -> dict[str, float]:
    """{seconds, cpu_seconds} from the end of the first step to the end of step `steps`."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": spec["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=spec["lr"], betas=tuple(spec["betas"]), eps=spec["eps"], fused=True)
    model.train()
    begun, cpu = 0.0, 0.0
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, spec)
        logits_BTV = model(inputs_NBT[step - 1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_NBT[step - 1].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        optimizer.step()
        if step == 1:
            begun, cpu = time.perf_counter(), time.process_time()
    return {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}


def profiled(job: dict[str, Any]) -> str:
    """torch's table of where the time of the worker's own loop goes, by operator."""
    from torch.profiler import ProfilerActivity, profile

    state = WorkerState(cls=load_class(job["program"]))
    OPS["train.prepare"](state, {"seed": 0, "dtype": "float32"}, [], _unheard)
    call = {name: job[name] for name in ("model", "mixers", "budget")}
    OPS["train.build"](state, {**call, "init": "program"}, [], _unheard)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        OPS["train.run"](state, {name: job[name] for name in ("stream", "type", "train")}, [], _unheard)
    table: str = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40)
    return table


def _unheard(meta: dict[str, Any], arrays: object = ()) -> None:
    """Reports of the loop go nowhere."""


if __name__ == "__main__":
    sys.exit(main())
