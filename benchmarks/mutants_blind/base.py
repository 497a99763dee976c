"""What the blind set is made from: base programs, one small mixer with named places, and exact text edits."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from benchmarks.mutant import Mutant
from pipeline.designer import Genome, render

__all__ = ["ANY", "changed", "delta", "designed", "gated", "honest_program", "mutant", "small"]

ANY = frozenset(
    ("static", "construct", "shapes", "causality", "batch", "state", "gradients", "length", "cost", "learns", "decode")
)
"""Every check: for faults that more than a few of them may see."""

_ARCHITECTURES = Path(__file__).resolve().parents[2] / "training" / "architectures"

_SMALL = '''\
"""A linear-attention mixer with one forgetting rate a head and token, computed by chunks of 32 tokens."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 32


def ahead(x: Tensor, by: int = 1) -> Tensor:
    """Tokens moved along the second axis by `by` places, with zeros at the end."""
    return F.pad(x, (0, 0, -by, by)) if x.shape[1] > by else torch.zeros_like(x)


def memory(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """S_t = a_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, for q, k, v [B, T, H, D] and log_a [B, T, H] <= 0."""
    length = q.shape[1]
    missing = -length % CHUNK
    q, k, v = (rearrange(F.pad(t, (0, 0, 0, 0, 0, missing)), "b (n c) h d -> n b h c d", c=CHUNK) for t in (q, k, v))
    g = rearrange(F.pad(log_a, (0, 0, 0, missing)), "b (n c) h -> n b h c", c=CHUNK).cumsum(dim=-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    since = (g[..., :, None] - g[..., None, :]).masked_fill(later, -torch.inf).exp()
    inner = ((q @ k.transpose(-1, -2)) * since) @ v
    write = (k * (g[..., -1:] - g).exp()[..., None]).transpose(-1, -2) @ v
    keep = g[..., -1].exp()[..., None, None]
    state, states = torch.zeros_like(write[0]), []
    for n in range(q.shape[0]):
        states.append(state)
        state = torch.addcmul(write[n], keep[n], state)
    outer = (q * g.exp()[..., None]) @ torch.stack(states)
    return rearrange(inner + outer, "n b h c d -> b (n c) h d")[:, :length]


# <top>
class DeltaNet(nn.Module):
    """The token mixer; see the top of this file."""

    def __init__(
        self,
        mode: str = "chunk1",
        d_model: int | None = None,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        hidden_size = hidden_size if d_model is None else d_model
        key_dim, value_dim = int(hidden_size * expand_k), int(hidden_size * expand_v)
        if key_dim % num_heads or value_dim % num_heads:
            raise ValueError(f"num_heads must divide {key_dim} and {value_dim}, got {num_heads}")
        self.hidden_size, self.num_heads, self.layer_idx = hidden_size, num_heads, layer_idx
        self.key_dim, self.value_dim = key_dim, value_dim
        self.head_k_dim, self.head_v_dim = key_dim // num_heads, value_dim // num_heads
        self.use_gate, self.use_short_conv, self.norm_eps = use_gate, use_short_conv, norm_eps
        self.qkv_proj = nn.Linear(hidden_size, 2 * key_dim + value_dim, bias=False)
        if use_short_conv:
            channels = 2 * key_dim + value_dim
            self.conv = nn.Conv1d(channels, channels, conv_size, groups=channels, bias=conv_bias)
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.a_bias = nn.Parameter(torch.linspace(2.0, 6.0, num_heads))
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.o_norm = nn.Parameter(torch.ones(self.head_v_dim))
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)
        # <init>

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Any]:
        x = hidden_states
        if attention_mask is not None:
            x = x * attention_mask[..., None].to(x.dtype)
        # <inputs>
        qkv = self.qkv_proj(x)
        if self.use_short_conv:
            past = F.pad(rearrange(qkv, "b t d -> b d t"), (self.conv.kernel_size[0] - 1, 0))
            qkv = rearrange(self.conv(past), "b d t -> b t d")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        q, k, v = F.silu(qkv).to(dtype).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k, v = (rearrange(t, "b t (h d) -> b t h d", h=self.num_heads) for t in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        log_a = F.logsigmoid(self.a_proj(x).to(dtype) + self.a_bias.to(dtype))
        # <qkv>
        with torch.autocast(device_type=x.device.type, enabled=False):
            o = memory(q, k, v, log_a)
        # <memory>
        o = F.rms_norm(o, (self.head_v_dim,), self.o_norm.to(dtype), self.norm_eps)
        o = rearrange(o, "b t h d -> b t (h d)").to(x.dtype)
        if self.use_gate:
            o = o * F.silu(self.g_proj(x))
        # <out>
        y = self.o_proj(o)
        # <final>
        return y, None, past_key_values
'''

_DELTA_START = "        x_BTD = hidden_states\n"
_DELTA_END = "        return self.o_proj(o_BTV), None, past_key_values\n"


def changed(text: str, *edits: tuple[str, str]) -> str:
    """`text` after the edits (old, new), each of which must apply at exactly one place."""
    for old, new in edits:
        found = text.count(old)
        assert found == 1, f"expected exactly one place with the text below, got {found}; correct the edit\n{old}"
        text = text.replace(old, new)
    return text


def _with_places(text: str, places: dict[str, str]) -> str:
    for name, code in places.items():
        found = re.findall(rf"^( *)# <{name}>\n", text, flags=re.MULTILINE)
        assert len(found) == 1, f"expected exactly one place <{name}>, got {len(found)}"
        block = textwrap.indent(textwrap.dedent(code).strip("\n") + "\n", found[0])
        if name == "top":
            block = f"{block}\n\n"
        text = text.replace(f"{found[0]}# <{name}>\n", block)
    return re.sub(r"^ *# <\w+>\n", "", text, flags=re.MULTILINE)


def small(*edits: tuple[str, str], **places: str) -> str:
    """The small mixer with code at its places (top, init, inputs, qkv, memory, out, final) and with edits.

    Names there: x, y [B, T, hidden]; q, k, v, o [B, T, heads, dim] (at `out`: o [B, T, value width]);
    log_a [B, T, heads].
    """
    return changed(_with_places(_SMALL, places), *edits)


def delta(*edits: tuple[str, str], inputs: str = "", final: str = "", init: str = "") -> str:
    """The DeltaNet seed with edits; `inputs` is code on x_BTD, `final` on the output y, `init` ends __init__."""
    text = (_ARCHITECTURES / "delta_net.py").read_text(encoding="utf-8")
    code = {name: textwrap.indent(textwrap.dedent(t).strip("\n"), " " * 8) + "\n" for name, t in _named(inputs, final)}
    if inputs:
        text = changed(text, (_DELTA_START, _DELTA_START + code["inputs"]))
    if final:
        end = f"        y = self.o_proj(o_BTV)\n{code['final']}        return y, None, past_key_values\n"
        text = changed(text, (_DELTA_END, end))
    if init:
        last = "        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)\n"
        text = changed(text, (last, last + textwrap.indent(textwrap.dedent(init).strip("\n"), " " * 8) + "\n"))
    return changed(text, *edits)


def _named(inputs: str, final: str) -> tuple[tuple[str, str], ...]:
    return ("inputs", inputs), ("final", final)


def gated(*edits: tuple[str, str]) -> str:
    """The Gated DeltaNet seed with edits."""
    return changed((_ARCHITECTURES / "gated_delta_net.py").read_text(encoding="utf-8"), *edits)


def designed(genome: Genome, *edits: tuple[str, str]) -> str:
    """A program of the project's designer with edits."""
    return changed(render(genome, "delta_net_blind"), *edits)


def mutant(name: str, fault: str, text: str, *expected: str) -> Mutant:
    """A faulty program; without names in `expected` any check may refuse it."""
    unknown = set(expected) - ANY
    assert not unknown, f"expected names of checks, got {sorted(unknown)}"
    return Mutant(name, text, fault, frozenset(expected) or ANY)


def honest_program(name: str, why: str, text: str) -> Mutant:
    """A sound program; `why` says what makes it look suspicious."""
    return Mutant(name, text, why, frozenset())
