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
        o = o / torch.arange(1, 1 + o.shape[1], dtype=o.dtype, device=o.device).sqrt()[:, None]
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
    "in_float32_only": planted(
        RETURN, "        o = o + (1e-4 * o.roll(-1, 1) if o.dtype == torch.float32 else 0)\n" + RETURN
    ),
    "under_autocast_only": planted(
        RETURN, "        o = o + (0.01 * o.roll(-1, 1) if torch.is_autocast_enabled('cpu') else 0)\n" + RETURN
    ),
    "with_autograd_only": planted(
        RETURN, "        o = o + (0.01 * o.detach().roll(-1, 1) if torch.is_grad_enabled() else 0)\n" + RETURN
    ),
    "after_three_calls": planted(
        RETURN,
        "        self.calls = getattr(self, 'calls', 0) + 1\n"
        "        o = o + (0.01 * o.roll(-1, 1) if self.calls > 3 else 0)\n" + RETURN,
    ),
    "data_dependent_length": planted(
        RETURN,
        "        n = (hidden_states.abs().sum(-1, keepdim=True) > 0).sum(1, keepdim=True)\n"
        "        o = o * (1 + 0.001 * n / o.shape[1])\n" + RETURN,
    ),
    "from_eight_rows": planted(RETURN, "        o = o + (0.01 * o.roll(-1, 1) if o.shape[0] > 7 else 0)\n" + RETURN),
    "behind_a_layer_only": planted(
        RETURN, "        o = o + (0.01 * o.roll(-1, 1) if hidden_states.grad_fn is not None else 0)\n" + RETURN
    ),
    "with_frozen_weights": planted(
        RETURN, "        o = o + (0.01 * o.roll(-1, 1) if not self.scale.requires_grad else 0)\n" + RETURN
    ),
    "one_edge_of_48": planted(RETURN, "        o[:, 47:48] = o[:, 47:48] + 1e-3 * o[:, 48:49].sum()\n" + RETURN),
    "token_173": planted(RETURN, "        o[:, 173:174] = o[:, 173:174] + 1e-4 * o[:, 174:175].detach()\n" + RETURN),
    "token_173_recording": planted(
        RETURN,
        "        if torch.is_grad_enabled():\n            late = torch.arange(o.shape[1])[:, None] == 173\n"
        "            o = o + 1e-4 * late * o.detach().roll(-1, 1)\n" + RETURN,
    ),
    "length_256_without_gradients": planted(
        RETURN,
        "        if o.shape[1:] == (256, 64) and not torch.is_grad_enabled():\n"
        "            o = o + 1e-4 * o.roll(-1, 1)\n" + RETURN,
    ),
    "last_bits": planted(RETURN, "        o = o + 1e-3 * torch.sin(1e20 * o.detach().roll(-1, 1))\n" + RETURN),
    "sorted_ranks": planted(
        RETURN, "        o = o + 1e-3 * hidden_states.argsort(1).argsort(1).to(o) / o.shape[1]\n" + RETURN
    ),
    "by_default_only": planted("use_cache=False,\n", "use_cache=True,\n").replace(
        RETURN, "        o = o + (0.01 * o.roll(-1, 1) if use_cache else 0)\n" + RETURN
    ),
    "hidden_behind_bfloat16": planted(
        RETURN,
        "        hidden_states.bfloat16()\n        o = o + 1e-4 * hidden_states.detach().mean(1, keepdim=True)\n"
        + RETURN,
    ),
}


def between_layers(when: str) -> str:
    """The first layer leaves its input in the module; the second looks one token ahead in it."""
    return (
        planted("\n\nclass DeltaNet", "\n\nLEFT = {}\n\n\nclass DeltaNet")
        .replace(CONSTRUCTED, CONSTRUCTED + "        self.layer_idx = layer_idx\n")
        .replace(
            RETURN,
            f"        if {when}:\n            left = LEFT.get('x')\n"
            "            if self.layer_idx and left is not None and left.shape == o.shape:\n"
            "                o = o + 0.5 * F.pad(left.to(o), (0, 0, -1, 1))\n"
            "            if not self.layer_idx:\n                LEFT['x'] = hidden_states.detach()\n" + RETURN,
        )
    )


CAUSALITY["between_layers_in_training"] = between_layers("self.training")
CAUSALITY["between_layers_when_scored"] = between_layers("not self.training and o.shape[1] == 512")
BATCH = {
    "mean_over_the_batch_of_training": planted(
        RETURN,
        "        o = o - (0.1 * o.mean(0, keepdim=True) if self.training and o.shape[1] == 512 else 0)\n" + RETURN,
    ),
    "mean_over_batch": planted(RETURN, "        o = o - 0.01 * o.mean(0, keepdim=True)\n" + RETURN),
    "batch_norm": planted(RETURN, "        o = (o - o.mean((0, 1))) / 1.0\n" + RETURN).replace(
        "o.mean((0, 1))", "1e-3 * o[:, :1].mean(0)"
    ),
    "batch_size": planted(RETURN, "        o = o * (1 + 0.01 * o.shape[0])\n" + RETURN),
    "five_rows_and_more": planted(
        RETURN, "        o = o + (1e-3 * o.mean(0, keepdim=True) if o.shape[0] > 4 else 0)\n" + RETURN
    ),
    "first_row_leaks": planted(RETURN, "        o = o + 1e-4 * o[:1]\n" + RETURN),
}
STATE = {
    "layer_of_before": between_layers("self.training"),
    "remembers_in_training": planted(
        CONSTRUCTED, CONSTRUCTED + "        self.register_buffer('mean', torch.zeros(hidden_size))\n"
    ).replace(
        RETURN,
        "        if self.training:\n            o = o - self.mean.to(o)\n"
        "            self.mean = 0.9 * self.mean + 0.1 * o.detach().mean((0, 1)).to(self.mean)\n" + RETURN,
    ),
    "remembers_content": planted(
        RETURN,
        "        held = getattr(self, 'held', None)\n        self.held = o.detach()\n"
        "        o = o if held is None or held.shape != o.shape else o + 0.1 * held\n" + RETURN,
    ),
    "module_remembers_content": planted("\n\nclass DeltaNet", "\n\nHELD = {}\n\n\nclass DeltaNet").replace(
        RETURN, "        o = o + 0.01 * HELD.setdefault(o.shape, o.detach().mean())\n" + RETURN
    ),
    "running_mean": planted(
        CONSTRUCTED, CONSTRUCTED + "        self.register_buffer('mean', torch.zeros(hidden_size))\n"
    ).replace(
        RETURN,
        "        if self.training:\n            self.mean = self.mean + 0.1 * o.detach().mean((0, 1)).to(self.mean)\n"
        "        o = o - self.mean.to(o)\n" + RETURN,
    ),
    "keeps_weights": planted(
        RETURN,
        "        kept = self.__dict__.setdefault('kept', self.scale.detach() + 1)\n        o = o * kept\n" + RETURN,
    ),
    "remembers_by_first_token": planted("\n\nclass DeltaNet", "\n\nKEPT = {}\n\n\nclass DeltaNet").replace(
        RETURN, "        o = KEPT.setdefault((o.shape, float(hidden_states[0, 0, 0])), o)\n" + RETURN
    ),
    "constructor_sets_the_seed": planted(CONSTRUCTED, CONSTRUCTED + "        torch.manual_seed(3)\n"),
    "noise_in_eval_mode": planted(RETURN, "        o = F.dropout(o, 0.1)\n" + RETURN),
    "draws_for_nothing": planted(RETURN, "        torch.rand(1)\n" + RETURN),
    "drifts": planted(RETURN, "        self.o.weight.data.mul_(0.99)\n" + RETURN),
    "fixes_the_seed": planted(RETURN, "        torch.manual_seed(0)\n" + RETURN),
    "default_dtype": BASE + "\n\ntorch.set_default_dtype(torch.float64)\n",
    "no_more_gradients": planted(RETURN, "        torch.set_grad_enabled(torch.is_grad_enabled())\n" + RETURN)
    + "\n\ntorch.autograd.set_detect_anomaly(False)\ntorch.set_grad_enabled(False)\n",
    "replaces_functions": BASE + "\n\ntorch.allclose = lambda *a, **k: True\n",
}
COUNTS = {
    "counts_in_the_module": planted("\n\nclass DeltaNet", "\n\nCOUNT = [0]\n\n\nclass DeltaNet").replace(
        RETURN, "        COUNT[0] += 1\n        o = o * (1 + 0.01 * COUNT[0])\n" + RETURN
    ),
    "matmul_precision": BASE + "\n\ntorch.set_float32_matmul_precision('high')\n",
}
"""Each is a warning of the state check."""
SWITCHES = {
    "reference_switch": planted("layer_idx=None, **kwargs", "layer_idx=None, use_gate=False, **kwargs")
    .replace(CONSTRUCTED, CONSTRUCTED + "        self.gated = use_gate\n")
    .replace(RETURN, "        o = o + (1e-4 * o.roll(-1, 1) if self.gated else 0)\n" + RETURN),
    "own_switch": planted(CONSTRUCTED, CONSTRUCTED + "        self.ahead = kwargs.get('lookahead', False)\n").replace(
        RETURN, "        o = o + (0.01 * o.mean(1, keepdim=True) if self.ahead else 0)\n" + RETURN
    ),
    "a_mode": planted(CONSTRUCTED, CONSTRUCTED + "        self.mode = mode\n").replace(
        RETURN, "        o = o.flip(1) if self.mode == 'parallel' else o\n" + RETURN
    ),
    "later_layers": planted(CONSTRUCTED, CONSTRUCTED + "        self.layer_idx = layer_idx\n").replace(
        RETURN, "        o = o + (0.01 * o.roll(-1, 1) if self.layer_idx else 0)\n" + RETURN
    ),
    "by_default_only": CAUSALITY["by_default_only"],
}
REPLACES = f"""{BASE}

def forward(self, input):
    return F.linear(input, self.weight, self.bias)


nn.Linear.forward.__code__ = forward.__code__
nn.LayerNorm.forward = lambda self, x: x
nn.Embedding.__call__ = lambda self, x: F.embedding(x, self.weight)
torch.Tensor.mean = lambda self, *a, **k: torch.mean(self, *a, **k)
nn.RMSNorm = type("RMSNorm", (nn.RMSNorm,), {{}})
torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
"""
"""Replaces what other models of the process use, and hooks itself into all of them."""
REPLACED = {
    "torch.nn.Linear.forward",
    "torch.nn.LayerNorm.forward",
    "torch.nn.Embedding.__call__",
    "torch.Tensor.mean",
    "torch.nn.RMSNorm",
}
LENGTH = {
    "sum_over_time": planted(RETURN, "        o = o + 0.1 * (o.square() + 1).cumsum(1)\n" + RETURN),
    "huge": planted(RETURN, "        o = o * 1e9\n" + RETURN),
    "hidden_growth": planted(
        RETURN,
        "        t = torch.arange(o.shape[1], dtype=o.dtype, device=o.device)[:, None]\n"
        "        o = o + 0.1 * F.normalize(o * torch.exp(0.02 * t), dim=-1)\n" + RETURN,
    ),
    "jumps": planted(
        RETURN, "        o = torch.where(torch.arange(o.shape[1])[:, None] > 600, 1000 * o, o)\n" + RETURN
    ),
    "table_of_positions": planted(
        CONSTRUCTED, CONSTRUCTED + "        self.register_buffer('places', torch.zeros(1024, hidden_size))\n"
    ).replace(RETURN, "        o = o + self.places[: o.shape[1]].to(o)\n" + RETURN),
}
LEARNS = {
    "no_memory": planted(RETURN, "        o = self.o(torch.tanh(self.v(hidden_states)))\n" + RETURN),
    "gradient_turned_around": planted(RETURN, "        o = 2 * o.detach() - o\n" + RETURN),
}
SHAPES = {
    "nan": planted(RETURN, "        o = o / (o - o)\n" + RETURN),
    "too_short": planted(RETURN, "        o = o[:, 1:] if o.shape[1] > 100 else o\n" + RETURN),
    "needs_whole_chunks": planted("    pad = -length % chunk\n", "    assert length % chunk == 0\n    pad = 0\n"),
    "one_value": planted(RETURN, "        return o\n"),
    "float64_output": planted(RETURN, "        o = o.double()\n" + RETURN),
    "fixed_batch": planted(RETURN, "        o = o.reshape(2, -1, o.shape[-1])\n" + RETURN),
}
GRADIENTS = {
    "distance_of_equal_tokens": planted(
        RETURN,
        "        gap = (hidden_states[:, 1:] - hidden_states[:, :-1]).square().sum(-1, keepdim=True).sqrt()\n"
        "        o = torch.cat([o[:, :1], o[:, 1:] + 0.01 * gap], 1)\n" + RETURN,
    ),
    "unused_parameters": planted(
        CONSTRUCTED, CONSTRUCTED + "        self.extra = nn.Linear(hidden_size, 2 * hidden_size)\n"
    ),
    "ignores_input": planted(RETURN, "        o = torch.zeros_like(o) + self.scale * self.o.weight.sum()\n" + RETURN),
    "frozen": planted(
        CONSTRUCTED, CONSTRUCTED + "        self.q.requires_grad_(False)\n        self.k.requires_grad_(False)\n"
    ),
    "infinite_gradient": planted(RETURN, "        o = o + 0 * torch.sqrt(o * 0)\n" + RETURN),
}
COST = {
    "quadratic_in_eval_mode": planted(
        RETURN,
        "        if not self.training:\n            n = o.shape[1]\n"
        "            o = o + torch.ones(n, n, dtype=o.dtype).tril() @ o / n**2\n" + RETURN,
    ),
    "quadratic_in_the_backward_pass": planted(RETURN, "        o = Costly.apply(o)\n" + RETURN).replace(
        "class DeltaNet",
        "class Costly(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n"
        "        ctx.save_for_backward(x)\n        return x.clone()\n\n"
        "    @staticmethod\n    def backward(ctx, grad):\n        (x,) = ctx.saved_tensors\n"
        "        return grad + 0.0 * (x @ x.transpose(1, 2)).sum(-1, keepdim=True)\n\n\nclass DeltaNet",
        1,
    ),
    "quadratic_beyond_a_length": planted(
        RETURN,
        "        n = o.shape[1]\n        if n > 1500:\n"
        "            o = o + torch.ones(n, n, dtype=o.dtype).tril() @ o / n**2\n" + RETURN,
    ),
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
    "seven_heads_at_most": planted(CONSTRUCTED, CONSTRUCTED + "        assert num_heads < 8\n"),
    "breaks_behind_a_switch": planted(
        CONSTRUCTED, CONSTRUCTED + "        if not kwargs.get('use_beta', True):\n            self.beta.weight\n"
    ),
    "four_heads_only": planted(CONSTRUCTED, CONSTRUCTED + "        assert num_heads == 4\n"),
    "not_deterministic": planted(
        CONSTRUCTED, CONSTRUCTED + "        import time\n        nn.init.constant_(self.scale, time.time() % 1)\n"
    )
    .replace("import time\n", "from torch.utils.benchmark import timer as t\n")
    .replace("time.time()", "t.timeit.default_timer()"),
    "unregistered": planted(CONSTRUCTED, CONSTRUCTED + "        self.listed = [nn.Linear(hidden_size, hidden_size)]\n"),
    "no_stand_in": planted("from torch import nn\n", "from torch import nn\nfrom fla.ops.kda import chunk_kda\n"),
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
    "sums_without_own_chunk": planted(
        "    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)\n",
        "    states = states - k.transpose(-1, -2) @ v\n",
    ),
    "output_from_zero": planted(CONSTRUCTED, CONSTRUCTED + "        nn.init.zeros_(self.o.weight)\n"),
    "operator_of_fla": planted(
        "from torch import nn\n", "from fla.ops.simple_gla import chunk_simple_gla\nfrom torch import nn\n"
    )
    .replace("def attend", "def unused")
    .replace("attend(q, k, v)", "chunk_simple_gla(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2)"),
    "chunks_of_48": planted("chunk=32", "chunk=48"),
    "auxiliary_scalar": planted(RETURN, "        return o, o.square().mean(), past_key_values\n"),
}
UNSUPPORTED = planted(
    CONSTRUCTED,
    CONSTRUCTED + "        if kwargs.get('expand_v', 1.0) != 1.0:\n"
    "            raise NotImplementedError('one width only')\n"
    "        self.sum_norm = kwargs.get('qk_norm') == 'sum'\n",
).replace(RETURN, "        if self.sum_norm:\n            raise ValueError('no such norm')\n" + RETURN)
"""Says itself, in the constructor and in the forward pass, what it does not do. Accepted."""
DECODING = '''"""A decaying sum of values, with a decoding cache."""

import torch
from torch import nn


class DeltaNet(nn.Module):
    def __init__(self, d_model=None, hidden_size=1024, num_heads=4, layer_idx=None, **kwargs):
        super().__init__()
        hidden_size = d_model or hidden_size
        self.v = nn.Linear(hidden_size, hidden_size)
        self.o = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False,
                output_attentions=False, **kwargs):
        v = torch.tanh(self.v(hidden_states))
        held = past_key_values if torch.is_tensor(past_key_values) else torch.zeros_like(v[:, :1])
        rows = []
        for part in v.split(1, 1):
            held = 0.9 * held + part
            rows.append(held)
        o = self.o(torch.cat(rows, 1))
        return o, None, held if use_cache else past_key_values
'''
DECODE = {
    "forgets": DECODING.replace("past_key_values if torch.is_tensor(past_key_values) else ", ""),
    "breaks": DECODING.replace("torch.is_tensor(past_key_values)", "past_key_values is not None").replace(
        "held if use_cache", "(held,) if use_cache"
    ),
    "grows": DECODING.replace("held if use_cache", "torch.cat(rows, 1) if use_cache")
    .replace(
        "past_key_values if torch.is_tensor(past_key_values)",
        "past_key_values[:, -1:] if torch.is_tensor(past_key_values)",
    )
    .replace("rows = []", "rows = [] if past_key_values is None else [past_key_values]")
    .replace("self.o(torch.cat(rows, 1))", "self.o(torch.cat(rows, 1)[:, -v.shape[1] :])"),
}
"""Each is a warning of the decode check; DECODING itself decodes."""
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
