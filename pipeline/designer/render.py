"""Renders a genome as one readable, self-contained program in the published contract, and reads it back.

The program's docstring ends with the line `Genome: {...}`. `genome_of` believes that line only when the genome renders
back to exactly the same text, so a program that was edited in any way counts as written by hand. Texts from before
designs called fla's kernels are told by rendering too (`kernels=False`): a data-dir keeps the programs that it has.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

from common.errors import UsageError
from common.files import sha256_text
from pipeline.designer.grammar import DELTA_NET, GATED_DELTA_NET, SLOT_TITLES, Genome, mechanism_at
from pipeline.designer.piece import Piece
from pipeline.designer.template_fla import fla_helpers, fla_kernel
from pipeline.designer.template_kernel import CHUNKS, decay_kind, kernel, state_lines, update
from pipeline.designer.template_pieces import pieces

__all__ = ["NAME_PATTERN", "genome_of", "render"]

NAME_PATTERN = re.compile(r"[a-z0-9_]{1,60}")
_ARCHITECTURES = Path(__file__).resolve().parents[2] / "training" / "architectures"
_SEEDS = {"delta_net.py": DELTA_NET, "gated_delta_net.py": GATED_DELTA_NET}

_CONSTRUCTOR = """\
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
    self.key_dim, self.value_dim = int(hidden_size * expand_k), int(hidden_size * expand_v)
    widths = (hidden_size, self.key_dim, self.value_dim)
    if num_heads < 1 or min(widths) < 1 or any(width % num_heads for width in widths):
        raise ValueError(
            f"num_heads must divide hidden_size and the key and value widths {widths}, got {num_heads}"
        )
"""

_FORWARD_HEAD = '''\
def forward(
    self,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None, Any]:
    """Mix the tokens of hidden_states [B, T, hidden_size]; returns (o of the same shape, None, past_key_values).

    attention_mask: optional [B, T], 0 for padding, which is blanked at the input; exact for padding on the right.
    There is no cache here (see `step`, where there is one) and there are no attention weights: the last two
    arguments have no effect.
    """
    x = hidden_states
    if attention_mask is not None:
        x = x * attention_mask[..., None].to(x.dtype)
'''


def _doc(genome: Genome, name: str) -> str:
    lines = [f"{name}: a linear-attention token mixer, written by the designer of this project.", ""]
    erase = "(1 - w_t k_t^T) " if genome.state != "linear" else ""
    decay = {"none": "", "scalar": "a_t ", "channel": "Diag(a_t) "}[decay_kind(genome)]
    lines += [f"    S_t = {erase}{decay}S_{{t-1}} + w_t v_t^T        o_t = S_t^T q_t", ""]
    if genome.state == "product":
        lines += ["with two such rank-one corrections for every token; the decay acts before the first.", ""]
    lines += ["Mechanisms:"]
    for slot, option in genome.slots().items():
        mechanism = mechanism_at(slot, option)
        if mechanism is not None:
            text = f"{SLOT_TITLES[slot]}: {mechanism.title} (arXiv {mechanism.paper}): {mechanism.why}."
            lines += textwrap.wrap(text, 116, initial_indent="- ", subsequent_indent="  ")
    lines += [
        "",
        "The mechanisms are fixed: arguments that choose others are accepted for the contract and without effect.",
    ]
    lines += ["", f"Genome: {genome.to_json()}"]
    return '"""' + "\n".join(lines) + '\n"""\n'


def _constructor(genome: Genome, parts: dict[str, Piece], streams: list[tuple[str, str]]) -> str:
    lines = [
        "self.num_heads, self.norm_eps = num_heads, norm_eps",
        "self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, self.value_dim // num_heads",
    ]
    body = "\n".join(parts[slot].init for slot in ("feature", "norm", *_REST) if parts[slot].init)
    if "feature_dim" in body and "self.feature_dim =" not in body:
        lines.append("self.feature_dim = self.head_k_dim")
    widths = ", ".join(width for _, width in streams)
    if re.search(r"\brank\b", body + widths):
        lines.append("rank = self.head_k_dim  # of the low-rank maps")
    lines.append(f"qkv_dim = {_kinds(genome)} * self.key_dim + self.value_dim")
    lines += [
        "# Widths of what the one fused projection yields for each token.",
        f"self.streams = [{widths}]",
        "self.in_proj = nn.Linear(hidden_size, sum(self.streams), bias=False)",
    ]
    lines += [body, "self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)"]
    return _CONSTRUCTOR + textwrap.indent("\n".join(lines), "    ") + "\n"


def _kinds(genome: Genome) -> int:
    """How many projections of the width of the keys there are: q, k and, with two steps a token, a second k."""
    return 3 if genome.state == "product" else 2


_REST = ("shift", "conv", "beta", "decay", "state", "detail", "path", "out_norm", "gate")


_STEP = '''\
def step(self, x_t: Tensor, state: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Any]:
    """One token x_t [B, 1, hidden_size] after those that made `state` (None: it is the first), as forward mixes it.

    Returns (o_t of the same shape, state): the last inputs, which shifts and filters still see, and the memory.
    Before the first token these inputs are zeros, as forward pads.
    """
    seen = {seen}
    memories = [None if state is None else state[1]]
    tail = x_t.new_zeros(x_t.shape[0], seen, x_t.shape[2]) if state is None else state[0]
    x = torch.cat([tail, x_t], dim=1)

    def remember(*tokens: Tensor) -> Tensor:
        memories[0], o_BTHV = update(memories[0], *tokens)
        return o_BTHV  # of the last token; what follows is right in its row

    return self.tokens(x, remember)[:, -1:], (x[:, x.shape[1] - seen :], memories[0])
'''


def _forward() -> str:
    return _FORWARD_HEAD + "    return self.tokens(x, memory), None, past_key_values\n"


def _tokens(parts: dict[str, Piece], names: list[str], by_fla: bool) -> str:
    lines = [parts["shift"].shift] if parts["shift"].shift else []
    left = ", ".join(names) + ("," if len(names) == 1 else "")
    lines.append(f"{left} = self.in_proj(x).split(self.streams, dim=-1)" if len(names) > 1 else "qkv = self.in_proj(x)")
    lines += [part.lift for part in parts.values() if part.lift]
    passed = ["remember", *(["qkv.dtype"] if by_fla else []), *(f"{name}.to(dtype)" for name in names)]
    lines += [
        "# The recurrence sums over the whole sequence: 16-bit inputs are widened and autocast stays outside.",
        "dtype = torch.float64 if x.dtype == torch.float64 else torch.float32",
        "with torch.autocast(device_type=x.device.type, enabled=False):",
        textwrap.indent(_fitted("o_BTV = self.mix", ", ".join(passed), "", 12), "    "),
        "return self.o_proj(o_BTV.to(x.dtype))",
    ]
    doc = '"""Inputs [B, T, hidden_size] to outputs of the same shape; `remember` is the memory with its read-out."""'
    body = textwrap.indent("\n".join([doc, *lines]), "    ")
    return f"def tokens(self, x: Tensor, remember: Any) -> Tensor:\n{body}\n"


def _step(parts: dict[str, Piece]) -> str | None:
    """Decoding, for a design that sees a bounded number of tokens beside its memory; else None."""
    sizes = [part.sees for part in parts.values()]
    if None in sizes:
        return None
    return _STEP.format(seen=" + ".join(size for size in sizes if size not in (None, "0")) or "0")


def _fitted(head: str, arguments: str, tail: str, indent: int) -> str:
    """`head(arguments)tail`, which will be indented by `indent`, with the arguments on a line of their own where it is
    longer than 120 characters."""
    line = f"{head}({arguments}){tail}"
    return line if indent + len(line.rstrip()) <= 120 else f"{head}(\n    {arguments}\n){tail}"


def _mix(genome: Genome, parts: dict[str, Piece], names: list[str], by_fla: bool) -> str:
    kinds = _kinds(genome)
    lines = [
        parts["conv"].mix,
        f"qk, v = qkv.split([{kinds} * self.key_dim, self.value_dim], dim=-1)",
        'v = rearrange(F.silu(v), "b t (h d) -> b t h d", h=self.num_heads)',
        f'qk = rearrange(qk, "b t (s h d) -> b t s h d", s={kinds}, h=self.num_heads)',
        parts["feature"].mix,
        parts["norm"].mix,
        "q, k, k_extra = qk.unbind(dim=2)" if kinds == 3 else "q, k = qk.unbind(dim=2)",
        parts["beta"].mix,
        parts["decay"].mix,
        "" if genome.detail == "skip" else parts["detail"].mix,
        state_lines(genome, by_fla),
        parts["detail"].mix if genome.detail == "skip" else "",
        parts["path"].mix,
        parts["out_norm"].mix,
        parts["gate"].mix,
        'return rearrange(o, "b t h d -> b t (h d)")',
    ]
    arguments = ["remember: Any", *(["given: torch.dtype"] if by_fla else []), *(f"{name}: Tensor" for name in names)]
    more = "\n\n    given: the dtype of the streams before they were widened.\n    " if by_fla else ""
    doc = f'    """From the projected streams [B, T, width] to the read-out o_BTV, all in one dtype.{more}"""\n'
    return (
        _fitted("def mix", ", ".join(["self", *arguments]), " -> Tensor:\n", 4)
        + doc
        + textwrap.indent("\n".join(x for x in lines if x), "    ")
        + "\n"
    )


def render(genome: Genome, name: str, kernels: bool = True) -> str:
    """The program of `genome` as text: one file, class DeltaNet, imports of torch, einops, math, typing and fla.ops.

    Args:
        kernels: False leaves out the branch that calls fla's kernel, as all designs were once. For a genome that has
            no kernel it makes no difference.

    Raises:
        UsageError: the name is not 1 to 60 characters of a-z, 0-9 and _.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(f"expected a name of 1 to 60 characters a-z, 0-9 and _, got {name!r}")
    parts = pieces(genome)
    streams = [("qkv", "qkv_dim")] + [stream for part in parts.values() for stream in part.streams]
    names = [stream for stream, _ in streams]
    step, by_fla = _step(parts), kernels and fla_kernel(genome) is not None
    members = [_constructor(genome, parts, streams), _forward()]
    members += [_tokens(parts, names, by_fla), _mix(genome, parts, names, by_fla)]
    members += [step] if step is not None else []
    helpers = [CHUNKS, kernel(genome), *(fla_helpers(genome) if by_fla else [])]
    helpers += [update(genome)] if step is not None else []
    for part in parts.values():
        helpers += [helper for helper in part.helpers if helper not in helpers]
    code = (
        "\n".join(helpers) + '\n\nclass DeltaNet(nn.Module):\n    """The token mixer; see the top of this file."""\n\n'
    )
    code += "\n".join(textwrap.indent(member, "    ") for member in members)
    uses_math = "import math\n" if "math." in code else ""
    imports = (
        f"\nfrom __future__ import annotations\n\n{uses_math}from typing import Any\n\n"
        "import torch\nfrom einops import rearrange\n"
        "from torch import Tensor, nn\nfrom torch.nn import functional as F\n\nCHUNK = 32\n\n"
    )
    return _doc(genome, name) + imports + code


def _seed_genome(program: str) -> Genome | None:
    """The genome of a shipped seed; its file is read now, so that an edit of the seed never leaves a stale answer."""
    wanted = sha256_text(program)
    for file, genome in _SEEDS.items():
        path = _ARCHITECTURES / file
        if path.is_file() and sha256_text(path.read_text(encoding="utf-8")) == wanted:
            return genome
    return None


def genome_of(program: str) -> Genome | None:
    """The genome of a program that the designer wrote, or of a seed; None for any other text.

    The text must be byte for byte what `render` makes of the genome and name that its docstring states, with or
    without the kernels of fla.
    """
    seed = _seed_genome(program)
    if seed is not None:
        return seed
    try:
        doc = ast.get_docstring(ast.parse(program), clean=False) or ""
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    name, _, _ = doc.partition(":")
    _, mark, line = doc.rstrip().rpartition("\nGenome: ")
    if not mark or not NAME_PATTERN.fullmatch(name):
        return None
    try:
        genome = Genome.from_json(line)
        return genome if any(render(genome, name, kernels) == program for kernels in (True, False)) else None
    except UsageError:
        return None
