"""A small honest program, and mutants of it: each is one planted fault."""

from __future__ import annotations

BASE = '''"""Chunkwise linear attention with a gate."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F


def attend(q, k, v, chunk=32):
    length = q.shape[2]
    pad = -length % chunk
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    q, k, v = (rearrange(x, "b h (n c) d -> b h n c d", c=chunk) for x in (q, k, v))
    states = (k.transpose(-1, -2) @ v).cumsum(2)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    mask = torch.ones(chunk, chunk, dtype=q.dtype, device=q.device).tril()
    o = q @ states + ((q @ k.transpose(-1, -2)) * mask) @ v
    return rearrange(o, "b h n c d -> b h (n c) d")[:, :, :length]


class DeltaNet(nn.Module):
    def __init__(self, mode="chunk", d_model=None, hidden_size=1024, num_heads=4, layer_idx=None, **kwargs):
        super().__init__()
        hidden_size = d_model or hidden_size
        self.heads = num_heads
        self.q, self.k, self.v, self.g = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4))
        self.conv = nn.Conv1d(hidden_size, hidden_size, 4, groups=hidden_size)
        self.o = nn.Linear(hidden_size, hidden_size, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False,
                output_attentions=False, **kwargs):
        x = self.conv(F.pad(hidden_states.transpose(1, 2), (3, 0))).transpose(1, 2)
        q, k, v = (rearrange(f(x), "b l (h d) -> b h l d", h=self.heads) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.normalize(F.elu(k) + 1, dim=-1)
        o = rearrange(attend(q, k, v), "b h l d -> b l (h d)")
        o = self.o(o * torch.sigmoid(self.g(hidden_states)))
        return o, None, past_key_values
'''


def planted(old: str, new: str) -> str:
    """BASE with one fault."""
    assert BASE.count(old) == 1, old
    return BASE.replace(old, new)


RETURN = "        return o, None, past_key_values\n"
CONSTRUCTED = "        self.scale = nn.Parameter(torch.zeros(1))\n"

CAUSALITY = {
    "mask_includes_next": planted(".tril()", ".tril(1)"),
    "no_mask": planted(" * mask) @ v", ") @ v"),
    "state_of_own_chunk": planted("states[:, :, :-1]], 2)", "states[:, :, :-1]], 2).roll(-1, 2)"),
    "mean_over_time": planted(RETURN, "        o = o + 0.1 * hidden_states.mean(1, keepdim=True)\n" + RETURN),
    "centred_convolution": planted("(3, 0)", "(2, 1)"),
    "softmax_over_time": planted("F.elu(q) + 1, ", "torch.softmax(q, 2), "),
    "flip_over_time": planted(RETURN, "        o = o + 1e-3 * o.flip(1)\n" + RETURN),
    "zero_gated_leak": planted(RETURN, "        o = o + self.scale * hidden_states.mean(1, keepdim=True)\n" + RETURN),
    "leak_1e-4": planted(RETURN, "        o = o + 1e-4 * o.roll(-1, 1)\n" + RETURN),
    "leak_1e-6": planted(RETURN, "        o = o + 1e-6 * o.roll(-1, 1)\n" + RETURN),
    "detached_statistic": planted(
        RETURN, "        o = o + 1e-4 * hidden_states.detach().amax(1, keepdim=True)\n" + RETURN
    ),
    "odd_lengths_only": planted(RETURN, "        o = o + (o.shape[1] % 2) * 0.01 * o.roll(-1, 1)\n" + RETURN),
    "beyond_chunk_one": planted(
        RETURN, "        o[:, 64:] = o[:, 64:] + 0.01 * o[:, 64:].mean(1, keepdim=True)\n" + RETURN
    ),
    "length_dependent": planted(RETURN, "        o = o * (1 + 1e-3 * o.shape[1])\n" + RETURN),
    "training_mode_only": planted(RETURN, "        o = o + (0.01 * o.roll(-1, 1) if self.training else 0)\n" + RETURN),
    "hidden_behind_bfloat16": planted(
        RETURN,
        "        hidden_states.bfloat16()\n        o = o + 1e-4 * hidden_states.detach().mean(1, keepdim=True)\n"
        + RETURN,
    ),
}
BATCH = {
    "mean_over_batch": planted(RETURN, "        o = o - 0.01 * o.mean(0, keepdim=True)\n" + RETURN),
    "batch_norm": planted(RETURN, "        o = (o - o.mean((0, 1))) / 1.0\n" + RETURN).replace(
        "o.mean((0, 1))", "1e-3 * o[:, :1].mean(0)"
    ),
    "batch_size": planted(RETURN, "        o = o * (1 + 0.01 * o.shape[0])\n" + RETURN),
    "first_row_leaks": planted(RETURN, "        o = o + 1e-4 * o[:1]\n" + RETURN),
}
STATE = {
    "remembers_content": planted(
        RETURN,
        "        held = getattr(self, 'held', None)\n        self.held = o.detach()\n"
        "        o = o if held is None or held.shape != o.shape else o + 0.1 * held\n" + RETURN,
    ),
}
SHAPES = {
    "nan": planted(RETURN, "        o = o / (o - o)\n" + RETURN),
    "too_short": planted(RETURN, "        o = o[:, 1:] if o.shape[1] > 100 else o\n" + RETURN),
    "needs_whole_chunks": planted("    pad = -length % chunk\n", "    assert length % chunk == 0\n    pad = 0\n"),
    "one_value": planted(RETURN, "        return o\n"),
    "fixed_batch": planted(RETURN, "        o = o.reshape(2, -1, o.shape[-1])\n" + RETURN),
}
GRADIENTS = {
    "unused_parameters": planted(
        CONSTRUCTED, CONSTRUCTED + "        self.extra = nn.Linear(hidden_size, 2 * hidden_size)\n"
    ),
    "ignores_input": planted(RETURN, "        o = torch.zeros_like(o) + self.scale * self.o.weight.sum()\n" + RETURN),
    "infinite_gradient": planted(RETURN, "        o = o + 0 * torch.sqrt(o * 0)\n" + RETURN),
}
COST = {
    "quadratic_attention": planted(
        RETURN,
        "        o = o + 1e-3 * F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)\n"
        + RETURN,
    ),
    "quadratic_mask": planted(
        RETURN,
        "        n = o.shape[1]\n        o = o + 1e-3 * torch.ones(n, n, dtype=o.dtype).tril() @ o / n\n" + RETURN,
    ).replace(" / n\n", "\n"),
    "token_loop": planted(
        RETURN,
        "        s = torch.zeros_like(o[:, 0])\n        rows = []\n        for t in range(o.shape[1]):\n"
        "            for _ in range(40):\n                s = 0.9 * s + 0.1 * torch.tanh(o[:, t])\n"
        "            rows.append(s)\n"
        "        o = o + torch.stack(rows, 1)\n" + RETURN,
    ),
}
CONSTRUCT = {
    "raises": planted(CONSTRUCTED, CONSTRUCTED + "        raise ValueError('no such form')\n"),
    "four_heads_only": planted(CONSTRUCTED, CONSTRUCTED + "        assert num_heads == 4\n"),
    "not_deterministic": planted(
        CONSTRUCTED, CONSTRUCTED + "        import time\n        nn.init.constant_(self.scale, time.time() % 1)\n"
    )
    .replace("import time\n", "from torch.utils.benchmark import timer as t\n")
    .replace("time.time()", "t.timeit.default_timer()"),
    "unregistered": planted(CONSTRUCTED, CONSTRUCTED + "        self.listed = [nn.Linear(hidden_size, hidden_size)]\n"),
    "no_stand_in": planted(
        "from torch import nn\n", "from torch import nn\nfrom fla.ops.delta_rule import chunk_delta_rule\n"
    ),
}
STATIC = {
    "syntax": BASE.replace("class DeltaNet(nn.Module):", "class DeltaNet(nn.Module:"),
    "renamed": BASE.replace("class DeltaNet", "class Delta"),
    "no_kwargs": planted("layer_idx=None, **kwargs", "layer_idx=None"),
    "imports_os": planted("import torch\n", "import os\nimport torch\n"),
    "imports_numpy": planted("import torch\n", "import numpy as np\nimport torch\n"),
    "forward_requires": planted(
        "attention_mask=None, past_key_values=None, use_cache=False,",
        "attention_mask, past_key_values=None, use_cache=False,",
    ),
}
HONEST = {
    "base": BASE,
    "bfloat16_inside": planted("attend(q, k, v)", "attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(x.dtype)"),
    "step_counter": planted(
        CONSTRUCTED, CONSTRUCTED + "        self.register_buffer('step', torch.zeros(1))\n"
    ).replace(RETURN, "        self.step += 1\n        o = o * (1 + 0.01 * self.step.item())\n" + RETURN),
    "fft_convolution": planted(
        RETURN,
        "        n = o.shape[1]\n        decay = torch.exp(-0.1 * torch.arange(n, dtype=o.dtype))\n"
        "        f = torch.fft.rfft(decay.float(), n=2 * n)[None, :, None]\n"
        "        f = f * torch.fft.rfft(o.float(), n=2 * n, dim=1)\n"
        "        o = o + torch.fft.irfft(f, n=2 * n, dim=1)[:, :n].to(o)\n" + RETURN,
    ),
    "dropout": planted(RETURN, "        o = F.dropout(o, 0.1, self.training)\n" + RETURN),
    "float32_inside": planted("attend(q, k, v)", "attend(q.float(), k.float(), v.float()).to(x.dtype)"),
    "auxiliary_scalar": planted(RETURN, "        return o, o.square().mean(), past_key_values\n"),
}
HARD_BFLOAT16 = planted(
    "        o = self.o(o * ",
    "        o = o.bfloat16()\n        o = F.linear(o, self.o.weight.bfloat16()) @ self.o.weight\n"
    "        o = self.o(o * ",
).replace("o * torch.sigmoid", "o.to(x.dtype) * torch.sigmoid")
"""Runs under bfloat16 autocast only: a bfloat16 by float32 product fails elsewhere."""


def hostile(statement: str, place: str = "forward") -> str:
    """BASE that also runs `statement` when it is imported, constructed or run. No import that `static` refuses is
    needed."""
    reach = "__import__ = __builtins__['__import__'] if isinstance(__builtins__, dict) else __builtins__.__import__\n"
    helper = f"\n\ndef attack():\n    {reach}" + "".join(f"    {line}\n" for line in statement.strip().splitlines())
    text = BASE.replace("\n\nclass DeltaNet", f"{helper}\n\nclass DeltaNet")
    if place == "import":
        return text + "\n\nattack()\n"
    return text.replace(RETURN, "        attack()\n" + RETURN)


HOSTILE = {
    "endless_loop": ("while True: pass", "timeout"),
    "memory_bomb": ("torch.ones(1 << 33)", "memory"),
    "memory_bomb_in_python": ("x = [bytearray(1 << 28) for _ in range(64)]", "memory"),
    "fork_bomb": ("os = __import__('os')\nwhile True: os.fork()", None),
    "thread_bomb": (
        "t = __import__('threading')\ne = t.Event()\nwhile True: t.Thread(target=e.wait, daemon=True).start()",
        None,
    ),
    "exit": ("__import__('os')._exit(0)", "crashed"),
    "kill_itself": ("os = __import__('os')\nos.kill(os.getpid(), 9)", "crashed"),
    "kill_everything": ("os = __import__('os')\nos.kill(-1, 9)", None),
    "segmentation_fault": ("__import__('ctypes').string_at(1)", "crashed"),
    "endless_output": ("while True: print('x' * 100000, flush=True)", "output"),
    "deep_recursion": ("f = lambda n: f(n + 1) + 1\nf(0)", None),
    "closes_the_pipes": ("os = __import__('os')\nos.closerange(3, 64)", "crashed"),
    "garbage_on_the_pipe": (
        "os = __import__('os')\nfor fd in range(3, 20):\n    try:\n        os.write(fd, b'\\xff' * 4096)\n"
        "    except OSError:\n        pass",
        "crashed",
    ),
    "fills_the_disk": ("f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(1 << 20))", None),
    "runs_a_program": ("__import__('subprocess').run(['/bin/sh', '-c', 'true'], check=True)", None),
    "writes_packages": ("open(torch.__file__, 'a').write('x')", None),
    "ignores_sigterm": ("s = __import__('signal')\ns.signal(s.SIGTERM, s.SIG_IGN)\nwhile True: pass", "timeout"),
    "raises_its_limits": ("r = __import__('resource')\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", None),
    "traces": ("c = __import__('ctypes').CDLL(None, use_errno=True)\nassert c.ptrace(16, 1, 0, 0) == 0", None),
}
"""name: (what it does in forward, how the job must end, or None where an exception is enough)."""
