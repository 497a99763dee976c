"""Programs that forge what their process reports, for test_forged.py: what each does, and how it has to end.

Most are a causal mean with something beside. Those of `ANSWERS` replace the worker's operation that answers the scorer,
so they hold the tokens, the places and the model, and may remember what they were asked: nothing that runs in a
candidate's process can do more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tests.training.verifier_assets import CONSTRUCTED, RETURN, planted

__all__ = ["AFTER_THE_CHECKS", "FAST", "FORGERIES", "HONEST", "Forgery", "reporting"]

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
        {built}

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
FIND = "globals()['__builtins__']['__import__']"


@dataclass(frozen=True)
class Forgery:
    """A program, and how it has to end.

    Attributes:
        ends: "without": no score, by the scorer alone; "honest": it may keep the score of the program that it is
            without the forgery, and no better one; "check": as honest, and the check refuses it.
    """

    text: str
    ends: Literal["without", "honest", "check"] = "without"


def program(before: str = "", leak: str = "pass", built: str = "pass") -> str:
    return BASE.format(before=before, leak=leak, built=built)


REPLACE = """find('gc').unfreeze()
for table in find('gc').get_referrers(plain):
    if isinstance(table, dict) and 'plain' not in table:
        table.update({{key: {other} for key in list(table) if table[key] is plain}})
"""
"""Puts `other` in the place of the worker's operation `plain`, which the worker hides from a look through garbage."""


def answering(cheat: str) -> str:
    """Replaces the worker's operation for logits. `cheat(tokens, places, out, trained, number, memory)` changes `out`
    [places, V] in place: `trained` says whether this process trained, `number` counts the questions."""
    lines = "\n".join(f"    {line}" for line in cheat.strip().splitlines())
    return program(
        f"""find = {FIND}
sys, np = find('sys'), find('numpy')
plain = sys.modules['training.worker.train'].OPS['train.logits']
memory = {{'number': 0}}


def cheat(tokens, places, out, trained, number, model):
    rows, at = places.T
    open_ = at + 1 < tokens.shape[1]
    rows, at, open_ = rows[open_], at[open_], np.flatnonzero(open_)
    after = tokens[rows, at + 1]
{lines}


def logits(state, meta, arrays, emit, plain=plain):
    meta, (out,) = plain(state, meta, arrays, emit)
    tokens, shape = arrays[0], out.shape
    memory['number'] += 1
    places = arrays[1] if len(arrays) > 1 else np.argwhere(np.ones(tokens.shape, dtype=bool))
    out = out.reshape(-1, shape[-1])
    cheat(tokens, places, out, 'written' not in state.values, memory['number'], state.instances['model'])
    return meta, [out.reshape(shape)]


{REPLACE.format(other="logits")}"""
    )


def reporting(change: str, kind: str = "step") -> str:
    """Replaces the worker's operation that trains by one whose reports pass through `change`, of `said` and `last`,
    the number of the last step; with the `kind` "checkpoint" its pieces of checkpoints do."""
    return program(
        f"""find = {FIND}
plain = find('sys').modules['training.worker.train'].OPS['train.run']


def run(state, meta, arrays, emit, plain=plain):
    last = meta['train']['steps']

    def told(said, arrays=()):
        if '{kind}' in said:
            {change}
        if said:
            emit(said, arrays)

    return plain(state, meta, arrays, told)


{REPLACE.format(other="run")}"""
    )


SEES = "out[open_, after] += 3.0"
WHOLE = "len(places) == tokens.size"
"""Whether rows are asked for whole, as held-out rows are."""
FIRST_TIME = """
fresh = np.array([row[:1].tobytes() not in memory for row in tokens])
memory.update({row[:1].tobytes(): True for row in tokens})
seen = fresh[rows]
"""
"""Rows whose first token was never asked before: scored ones, not those that are asked again with another future."""

PATCHES = {
    "cross_entropy": Forgery(program("F.cross_entropy = lambda logits, targets, **_: logits.sum(-1) * 0.0\n")),
    "cross_entropy_by_name": Forgery(
        program(
            "def zero(logits, targets, **_):\n    return logits.sum(-1) * 0.0 + 0.5\n\n"
            "vars(F).update({'cross_' + 'entropy': zero})\n"
        )
    ),
    "tensor_method": Forgery(
        program("torch.Tensor.isfinite = lambda self: torch.ones((), dtype=torch.bool)\n", PEEK)
    ),
    "log_softmax": Forgery(program("torch.log_softmax = F.log_softmax = lambda x, *a, **k: x * 0.0\n", PEEK)),
    "lm_eval": Forgery(program(f"lm_eval = {FIND}('lm_eval')\nlm_eval.evaluate = None\n"), "check"),
    "time": Forgery(program(f"time = {FIND}('time')\ntime.perf_counter = lambda: 0.0\n"), "check"),
    "random": Forgery(program(f"random = {FIND}('random')\nrandom.random = lambda: 0.5\n", PEEK)),
    "json": Forgery(
        program(
            f"json = {FIND}('json')\nplain = json.dumps\n"
            "json.dumps = lambda value, **k: plain({**value, 'loss': 0.1} if isinstance(value, dict) else value, **k)\n"
        ),
        "check",
    ),
    "sys_modules": Forgery(
        program(
            f"sys = {FIND}('sys')\nfake = type(sys)('fake')\nvars(fake).update(vars(F))\n"
            "vars(fake).update({'cross_' + 'entropy': lambda logits, targets, **_: logits.sum(-1) * 0.0 + 0.5})\n"
            "worker = sys.modules['training.worker.train']\nsys.modules['torch.nn.functional'] = fake\n"
            "setattr(worker, 'F', fake)\nsys.modules['training.worker.train'] = fake\n"
        )
    ),
    "reported_loss": Forgery(
        program(
            f"sys = {FIND}('sys')\nMeans = sys.modules['training.worker.train'].Means\nplain = Means.take\n"
            "vars_of = lambda self: {**plain(self), 'loss': 2.0}\n"
            "setattr(Means, 'take', vars_of)\n"
        )
    ),
    "memorised_text": Forgery(
        program(
            f"import_module = {FIND}\nroot = import_module('pathlib').Path('/')\n"
            "texts = [path.read_bytes() for path in root.rglob('heldout*') if path.is_file()]\n"
            "if not texts:\n    raise RuntimeError('no held-out text can be read here')\n"
        )
    ),
}  # fmt: skip

AFTER_THE_CHECKS = planted(
    RETURN,
    "        self.steps += self.training and hidden_states.shape[:2] == (4, 64)\n"
    f"        if self.steps > 20:\n            {PEEK}\n{RETURN}",
).replace(CONSTRUCTED, f"{CONSTRUCTED}        self.steps = 0\n")
"""One that no check refuses: it waits for the steps of training, in the shape of its batches."""
LEAKS = {
    "eval_only": Forgery(program(leak=f"if not self.training and hidden_states.shape[0] > 8:\n            {PEEK}")),
    "no_grad_only": Forgery(program(leak=f"if not torch.is_grad_enabled() and x.shape[1] == 64:\n            {PEEK}")),
    "after_many_calls": Forgery(program(leak=f"if self.calls > 25:\n            {PEEK}")),
    "after_training_only": Forgery(program(leak=f"if self.calls > 32 and not self.training:\n            {PEEK}")),
    "once_in_eight_rows": Forgery(
        program(
            leak="if not self.training and x.shape[0] > 4:\n            o = o.clone()\n            "
            "o[::8, :-1] += 3 * hidden_states[::8, 1:]"
        )
    ),
}

ANSWERS = {
    "every_place": Forgery(answering(SEES)),
    "honest_where_asked_again": Forgery(answering(f"{FIRST_TIME}out[open_[seen], after[seen]] += 3.0")),
    "in_the_trained_process": Forgery(
        answering(f"{FIRST_TIME}if trained:\n    out[open_[seen], after[seen]] += 3.0"), "honest"
    ),
    "bait_then_the_restored_process": Forgery(
        answering(f"{FIRST_TIME}if trained:\n    out += np.sin(np.arange(out.size)).reshape(out.shape)\n"
                  "else:\n    out[open_[seen], after[seen]] += 3.0")
    ),
    "by_batch_row": Forgery(answering(f"{FIRST_TIME}seen &= rows % 5 == 3\nout[open_[seen], after[seen]] += 3.0")),
    "one_row": Forgery(
        answering(
            "memory['asked'] = memory.get('asked', 0) + (tokens.shape == (16, 64))\n"
            "seen = (rows == 5) & (memory['asked'] == 1 + trained) & (tokens.shape == (16, 64))\n"
            "out[open_[seen], after[seen]] += 20.0"
        )
    ),
    "the_first_questions": Forgery(answering(f"if number <= 3:\n    {SEES}")),
    "whole_rows": Forgery(answering(f"if {WHOLE}:\n    {SEES}")),
    "by_the_clock": Forgery(
        answering(f"time = find('time')\nbegun = memory.setdefault('begun', time.monotonic())\n"
                  f"if time.monotonic() < begun + 0.5:\n    {SEES}"), "honest"
    ),
    "a_little": Forgery(answering("gain = np.log(np.exp(0.05))\nout[open_, after] += gain")),
    "a_little_once": Forgery(answering(f"{FIRST_TIME}out[open_[seen], after[seen]] += 0.3")),
    "large_logits": Forgery(
        answering(f"{FIRST_TIME}low = out.min(-1) - 100\nout[:, ::2][out[:, ::2] < out.max(-1)[:, None] - 8] = -1e6\n"
                  "out[open_[seen], after[seen]] = np.maximum(out[open_[seen], after[seen]], low[open_[seen]]) + 0.5")
    ),
    "behind_drift": Forgery(
        answering(
            f"{FIRST_TIME}out *= 1 + 0.002 * number\nseen &= after % 7 == 3\nout[open_[seen], after[seen]] += 3.0"
        )
    ),
    "never_the_same": Forgery(answering("out += np.random.default_rng().normal(0, 0.5, out.shape).astype(out.dtype)")),
    "text_in_buffers": Forgery(
        answering(
            """
if not hasattr(model, 'memo'):
    model.register_buffer('memo', torch.zeros(16, tokens.shape[1], dtype=torch.int32))
memo = model.memo.numpy()
memory['asked'] = memory.get('asked', 0) + (tokens.shape == (16, 64))
if trained and tokens.shape == (16, 64) and memory['asked'] == 2:
    memo[:] = tokens
    out[open_, after] += 3.0
for number, (row, place) in enumerate(places):
    for known in memo[(memo[:, :place + 1] == tokens[row, :place + 1]).all(1)] if place < memo.shape[1] else ():
        if not trained and place > 3 and place + 1 < memo.shape[1]:
            out[number, known[place + 1]] += 3.0
"""
        ),
        "honest",
    ),
}  # fmt: skip

REPORTS = {
    "other_tokens_and_seconds": Forgery(reporting("said.update(tokens=10**12, seconds=1e-9)"), "honest"),
    "fewer_reports": Forgery(reporting("said = said if said['step'] in (1, last) else None")),
    "reports_between": Forgery(reporting("emit({**said, 'step': said['step'] + 1})")),
    "no_last_report": Forgery(reporting("said = said if said['step'] < last else None")),
    "counts_and_clock_of_its_own": Forgery(
        reporting("said.update(tokens=10**12, seconds=1e-9, step=said['step'] + (said['step'] == 20))")
    ),
}
_STEP = "getattr(p, 'da' + 'ta').sub_({gradient}, alpha=0.05)"
TRAINS = {
    "steps_in_forward": Forgery(
        program(
            "sees = getattr(torch, 's' + 'erialization')\nfind = vars(sees)['s' + 'ys'].modules.get\n",
            f"for p, g in self.kept.items() if self.training else ():\n            {_STEP.format(gradient='g')}",
            "self.kept = {}\n        for p in self.parameters():\n            "
            "p.register_hook(lambda g, p=p: self.kept.update({p: g.clone()}))",
        )
    ),
    "steps_of_the_whole_model": Forgery(
        program(
            f"gc = {FIND}('g' + 'c')\nfound = []\n",
            "for m in () if found else gc.get_objects():\n            if type(m).__name__ == 'LanguageModel':\n"
            "                found.append(m)",
            "def steps(gradient):\n            for p in found[0].parameters():\n                "
            f"{_STEP.format(gradient='p.grad')}\n        self.proj.weight.register_hook(steps)",
        )
    ),
    "writes_in_a_hook": Forgery(
        program(
            built="for p in self.parameters():\n            "
            "p.register_hook(lambda g, p=p: (getattr(p, 'da' + 'ta').sub_(g, alpha=0.05), g)[1])",
        )
    ),
    "writes_in_a_thread": Forgery(
        program(
            f"threading = {FIND}('threading')\ntime = {FIND}('time')\n",
            built="def run(me=self):\n            while True:\n                time.sleep(0.001)\n                "
            "[getattr(p, 'da' + 'ta').mul_(1.001) for p in me.parameters()]\n        "
            "threading.Thread(target=run, daemon=True).start()",
        )
    ),
    "another_memory": Forgery(
        program(leak="if self.calls == 5:\n            self.out.weight.data = self.out.weight.data.clone()")
    ),
    "another_parameter": Forgery(
        program(
            leak="if self.calls == 5:\n            self.out.weight = nn.Parameter(self.out.weight.detach().clone())"
        )
    ),
    "steps_in_scoring": Forgery(
        program(leak="if not self.training:\n            self.out.weight.data.mul_(1.001)")
    ),
    "frozen_parameters": Forgery(
        program(
            leak="if self.training:\n            self.extra.data.add_(0.01)",
            built="self.extra = nn.Parameter(torch.zeros(3), requires_grad=False)",
        )
    ),
}  # fmt: skip

HONEST = program()
FORGERIES: dict[str, Forgery] = {**PATCHES, **LEAKS, **ANSWERS, **REPORTS, **TRAINS}
FAST = (
    "cross_entropy_by_name",
    "after_training_only",
    "in_the_trained_process",
    "counts_and_clock_of_its_own",
    "steps_in_forward",
)
"""Caught by the loss it reported; in the trained process; by fresh processes; by its count of steps; in training."""
