"""Programs that forge what their process reports end refused or forged; none gets a score."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.process import REPOSITORY
from common.records import CheckReport, RunRecord
from common.settings import Settings
from training.launcher import Launcher
from training.profiles import load_profile
from training.programs import Program

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"
BASE = '''"""A causal mean, and what it does beside."""

import torch
import torch.nn.functional as F
from torch import nn

{before}

class DeltaNet(nn.Module):
    def __init__(self, hidden_size=64, num_heads=4, d_model=None, layer_idx=None, **kwargs):
        super().__init__()
        width = d_model or hidden_size
        self.proj = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.calls = 0

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        self.calls += 1
        x = self.proj(hidden_states)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        o = self.out(F.silu(x.cumsum(1) / steps[:, None]) + x)
        {leak}
        return o, None, None
'''
PEEK = "o = o + 3 * torch.cat([hidden_states[:, 1:], hidden_states[:, :1]], 1)"
"""Each token sees the next one."""


def program(before: str = "", leak: str = "pass") -> str:
    return BASE.format(before=before, leak=leak)


PATCH = "globals()['__builtins__']['__import__']"
FORGERIES = {
    "cross_entropy": program("F.cross_entropy = lambda logits, targets, **_: logits.sum(-1) * 0.0\n"),
    "cross_entropy_by_name": program(
        "def zero(logits, targets, **_):\n    return logits.sum(-1) * 0.0 + 0.5\n\n"
        "vars(F).update({'cross_' + 'entropy': zero})\n"
    ),
    "tensor_method": program("torch.Tensor.isfinite = lambda self: torch.ones((), dtype=torch.bool)\n", PEEK),
    "log_softmax": program("torch.log_softmax = F.log_softmax = lambda x, *a, **k: x * 0.0\n", PEEK),
    "lm_eval": program(f"lm_eval = {PATCH}('lm_eval')\nlm_eval.evaluate = None\n"),
    "time": program(f"time = {PATCH}('time')\ntime.perf_counter = lambda: 0.0\n"),
    "random": program(f"random = {PATCH}('random')\nrandom.random = lambda: 0.5\n", PEEK),
    "json": program(
        f"json = {PATCH}('json')\nplain = json.dumps\n"
        "json.dumps = lambda value, **k: plain({**value, 'loss': 0.1} if isinstance(value, dict) else value, **k)\n"
    ),
    "sys_modules": program(
        f"sys = {PATCH}('sys')\nworker = sys.modules['training.worker.train']\nplain = worker.OPS['train.logits']\n\n"
        "def logits(state, meta, arrays, emit, plain=plain):\n"
        "    meta, (out,) = plain(state, meta, arrays, emit)\n"
        "    if len(arrays) == 1:\n"
        "        for row, tokens in enumerate(arrays[0]):\n"
        "            out[row, range(len(tokens) - 1), tokens[1:]] += 3.0\n"
        "    return meta, [out]\n\n"
        f"for table in {PATCH}('gc').get_referrers(plain):\n"
        "    if isinstance(table, dict) and 'plain' not in table:\n"
        "        table.update({key: logits for key in list(table) if table[key] is plain})\n"
    ),
    "reported_loss": program(
        f"sys = {PATCH}('sys')\nMeans = sys.modules['training.worker.train']._Means\nplain = Means.take\n"
        "vars_of = lambda self: {**plain(self), 'loss': 2.0}\n"
        "setattr(Means, 'take', vars_of)\n"
    ),
    "memorised_text": program(
        f"import_module = {PATCH}\nroot = import_module('pathlib').Path('/')\n"
        "texts = [path.read_bytes() for path in root.rglob('heldout*') if path.is_file()]\n"
        "if not texts:\n    raise RuntimeError('no held-out text can be read here')\n"
    ),
    "eval_only": program("", f"if not self.training and hidden_states.shape[0] > 8:\n            {PEEK}"),
    "no_grad_only": program("", f"if not torch.is_grad_enabled() and x.shape[1] == 64:\n            {PEEK}"),
    "after_many_calls": program("", f"if self.calls > 25:\n            {PEEK}"),
    "after_training_only": program(
        "", f"if self.calls > 32 and not self.training:\n            {PEEK}"
    ),
    "once_in_eight_rows": program(
        "", "if not self.training and x.shape[0] > 4:\n            o = o.clone()\n            "
        "o[::8, :-1] += 3 * hidden_states[::8, 1:]"
    ),
}  # fmt: skip
FAST = ("cross_entropy_by_name", "after_training_only")
"""One caught by what was reported, one by the audit; the others are in the slow suite."""


def outcomes(names: list[str], out: Path, check: bool) -> dict[str, tuple[CheckReport | None, RunRecord]]:
    launcher = Launcher(Settings(), load_profile(str(TINY)))
    launcher.prepare()
    programs = [Program(name, FORGERIES[name]) for name in names]
    reports = dict(zip(names, launcher.check(programs), strict=True)) if check else dict.fromkeys(names)

    def train(program: Program) -> RunRecord:
        # Trained even where the check refuses: the scorer has to hold by itself.
        report = reports[program.name]
        return launcher.train(program, seed=0, out=out / program.name, run_id=program.name, checks=report or ())

    with ThreadPoolExecutor(2) as pool:
        return {name: (reports[name], run) for name, run in zip(names, pool.map(train, programs), strict=True)}


def judged(names: list[str], out: Path, check: bool) -> dict[str, str]:
    """Name -> how it ended; asserts that none has a score."""
    said = {}
    for name, (report, run) in outcomes(names, out, check).items():
        refused = report is not None and report.accepted is False
        forged = run.reason in ("forged", "refused", "crashed", "leak", "nan")
        said[name] = f"check {'refuses' if refused else 'accepts'}; run {run.status}, {run.reason}: {run.detail[:150]}"
        assert refused or forged, said[name]
        assert not forged or (run.heldout_loss is None and not run.benchmarks), said[name]
    return said


def test_a_forger_gets_no_score(tmp_path: Path) -> None:
    said = judged(list(FAST), tmp_path, check=False)
    assert "reported a training loss" in said["cross_entropy_by_name"]
    assert "forged" in said["after_training_only"] and "sees the future" in said["after_training_only"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_forger_gets_a_score(tmp_path: Path) -> None:
    for name, how in judged(list(FORGERIES), tmp_path, check=True).items():
        print(f"{name}: {how}")
    print(f"{len(FORGERIES)} forgeries, none with a score")
