"""Program text of the memory: the chunkwise parallel kernels, one for each state form and kind of decay.

All kernels share one form. With write keys w (the key times its write strength) and decay a_t,

    additive   S_t = a_t S_{t-1} + w_t v_t^T
    erasing    S_t = (1 - w_t k_t^T) a_t S_{t-1} + w_t v_t^T          o_t = S_t^T q_t

Inside a chunk an erasing memory is one unit lower-triangular system (arXiv 2406.06484); between chunks the state obeys
S' = (keep - W E) S + W U with factors computed for all chunks at once, so the sequential part is one product a chunk.
Decays for channels split exp(G_i - G_j) into exp(G_i) exp(-G_j): the log decay of a token is above -2, so that over the
32 tokens of a chunk no exponent passes 64, which float32 holds. A reference point inside the chunk would allow stronger
decays, but it depends on later tokens, and rounding would carry them into earlier outputs.
"""

from __future__ import annotations

from pipeline.designer.grammar import Genome

__all__ = ["CHUNKS", "decay_kind", "kernel", "state_lines", "update"]

CHUNKS = '''
def chunks(x_BTHD: Tensor, size: int = CHUNK) -> Tensor:
    """[B, T, H, D] -> [N, B * H, C, D]: N chunks of C = size tokens; T is padded with zeros, which write nothing."""
    missing = -x_BTHD.shape[1] % size
    padded = F.pad(x_BTHD, (0, 0, 0, 0, 0, missing)) if missing else x_BTHD
    return rearrange(padded, "b (n c) h d -> n (b h) c d", c=size)
'''

_DECAY_WORD = {"none": "", "scalar": " with one decay a head", "channel": " with one decay a key channel"}


def decay_kind(genome: Genome) -> str:
    """What the kernel has to handle: 'none', 'scalar' (one number a head) or 'channel'."""
    if genome.decay in ("channel", "bounded"):
        return "channel"
    return "scalar" if genome.decay != "none" or genome.state == "two_timescale" else "none"


def _products(kind: str, erasing: bool, rows: int) -> list[str]:
    """Lines that compute `within`, `overlap`, the decayed q, k and w, and `keep`."""
    lines = ["turn = w_NACK.transpose(-1, -2)"] if kind == "none" else []
    if kind != "none":
        lines += ["total = chunks(log_decay_BTHX).cumsum(dim=2)", "last = total[:, :, -1:]"]
        if rows == 2:
            lines += ["total_rows = total.repeat_interleave(2, dim=2)  # both steps of a token share its decay"]
    source = "total_rows" if rows == 2 and kind != "none" else "total"
    if rows == 2:
        lines += [
            "row = torch.arange(2 * CHUNK, device=q_NACK.device)",
            "later = (row[None, :] // 2) > torch.arange(CHUNK, device=q_NACK.device)[:, None]",
        ]
    elif kind == "scalar":
        lines += ["later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q_NACK.device).triu(1)"]
    if kind == "none":
        mask = ".tril()" if rows == 1 else ".masked_fill(later, 0.0)"
        lines += [f"within = (q_NACK @ turn){mask}"]
        lines += ["overlap = k_NACK @ turn"] if erasing else []
        return lines
    if kind == "scalar":
        lines += [
            "# Masked before exp: the decay from a later to an earlier token could overflow. Exponents are <= 0.",
            f"since = (total - {source}.transpose(-1, -2)).masked_fill(later, -torch.inf).exp()",
            "turn = w_NACK.transpose(-1, -2)",
            "within = (q_NACK @ turn) * since",
        ]
        if erasing and rows == 1:
            lines += ["overlap = (k_NACK @ turn) * since"]
        elif erasing:
            lines += [
                "order = row[:, None] // 2 < row[None, :] // 2",
                "since_rows = (total_rows - total_rows.transpose(-1, -2)).masked_fill(order, -torch.inf).exp()",
                "overlap = (k_NACK @ turn) * since_rows",
            ]
    lines += ["q_NACK = q_NACK * total.exp()"]
    lines += [f"k_NACK = k_NACK * {source}.exp()"] if erasing else []
    if kind == "channel":
        mask = ".tril()" if rows == 1 else ".masked_fill(later, 0.0)"
        lines += [
            "# exp(G_i - G_j) as exp(G_i) exp(-G_j): a chunk forgets by less than exp(-64), so neither overflows.",
            f"turn = (w_NACK * (-{source}).exp()).transpose(-1, -2)",
            f"within = (q_NACK @ turn){mask}",
            *(["overlap = k_NACK @ turn"] if erasing else []),
        ]
    lines += [f"w_NACK = w_NACK * (last - {source}).exp()", "keep = last.exp()"]
    return lines


def _carry(kind: str, erasing: bool) -> list[str]:
    """Lines that compute the state before each chunk and the output."""
    turn = [] if kind == "none" else ["turn = w_NACK.transpose(-1, -2)"]
    if erasing:
        keep = {
            "none": "torch.eye(key_dim, dtype=q_NACK.dtype, device=q_NACK.device)",
            "scalar": "keep * torch.eye(key_dim, dtype=q_NACK.dtype, device=q_NACK.device)",
            "channel": "torch.diag_embed(keep[:, :, 0])",
        }[kind]
        return [
            "# A row must subtract what earlier rows of its chunk wrote along its key: a unit triangular system,",
            "# of which only the part below the diagonal is read.",
            "right = torch.cat([v_NACV, k_NACK], dim=-1)",
            "solved = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)",
            "news, erase = solved.split([value_dim, key_dim], dim=-1)",
            *turn,
            "write, undo = (turn @ solved).split([value_dim, key_dim], dim=-1)",
            f"carry = {keep} - undo",
            "states = [torch.zeros_like(write[0])]",
            "for step in range(write.shape[0] - 1):  # over chunks",
            "    states.append(torch.baddbmm(write[step], carry[step], states[-1]))",
            "state = torch.stack(states)",
            "o_NACV = q_NACK @ state + within @ (news - erase @ state)",
        ]
    if kind == "none":
        carry = ["state = F.pad(write[:-1].cumsum(dim=0), (0, 0, 0, 0, 0, 0, 1, 0))"]
    else:
        carry = [
            "keep = keep.transpose(-1, -2)",
            "states = [torch.zeros_like(write[0])]",
            "for step in range(write.shape[0] - 1):  # over chunks",
            "    states.append(torch.addcmul(write[step], keep[step], states[-1]))",
            "state = torch.stack(states)",
        ]
    return [*turn, "write = turn @ v_NACV", *carry, "o_NACV = q_NACK @ state + within @ v_NACV"]


def kernel(genome: Genome) -> str:
    """Text of the function `memory` for this genome."""
    kind, erasing = decay_kind(genome), genome.state != "linear"
    rows = 2 if genome.state == "product" else 1
    arguments = ["q_BTHK", *(["k_BTHK"] if erasing else []), "w_BTHK", "v_BTHV"]
    signature = ", ".join(f"{a}: Tensor" for a in [*arguments, *(["log_decay_BTHX"] if kind != "none" else [])])
    size = ", 2 * CHUNK" if rows == 2 else ""
    lines = [
        "length, heads = q_BTHK.shape[1:3]",
        *(["key_dim, value_dim = q_BTHK.shape[3], v_BTHV.shape[3]"] if erasing else []),
    ]
    for name in arguments:
        chunked = name.replace("BTH", "NAC")
        lines.append(f"{chunked} = chunks({name}{size if name != 'q_BTHK' else ''})")
    lines += [*_products(kind, erasing, rows), *_carry(kind, erasing)]
    lines.append('return rearrange(o_NACV, "n (b h) c d -> b (n c) h d", h=heads)[:, :length]')
    what = "erasing memory" if erasing else "additive memory"
    detail = " k, w, v: two rows a token." if rows == 2 else ""
    doc = f'"""Read-out o_BTHV of an {what}{_DECAY_WORD[kind]}, by chunks.{detail}"""'
    body = "\n".join(f"    {line}" for line in [doc, *lines])
    return f"\ndef memory({signature}) -> Tensor:\n{body}\n"


def update(genome: Genome) -> str:
    """Text of the function `update` for this genome: the memory one token on, as the recurrence is written."""
    kind, erasing = decay_kind(genome), genome.state != "linear"
    arguments = ["q_BTHK", *(["k_BTHK"] if erasing else []), "w_BTHK", "v_BTHV"]
    arguments += ["log_decay_BTHX"] if kind != "none" else []
    signature = "".join(f"    {a}: Tensor,\n" for a in arguments)
    rows = 2 if genome.state == "product" else 1
    held = 'torch.einsum("bhk,bhkv->bhv", k_BTHK[:, row], state_BHKV)'
    news = f"v_BTHV[:, row] - {held}" if erasing else "v_BTHV[:, row]"
    lines = [
        '"""The memory after the last token, and its read-out o_BTHV with T = 1; earlier tokens are in it already."""',
        "if state_BHKV is None:",
        "    batch, _, heads, key_dim = q_BTHK.shape",
        "    state_BHKV = v_BTHV.new_zeros(batch, heads, key_dim, v_BTHV.shape[-1])",
        *(["state_BHKV = log_decay_BTHX[:, -1, :, :, None].exp() * state_BHKV"] if kind != "none" else []),
        f"for row in range(-{rows}, 0):  # over the writes of the token",
        f"    news_BHV = {news}",
        '    state_BHKV = state_BHKV + torch.einsum("bhk,bhv->bhkv", w_BTHK[:, row], news_BHV)',
        'return state_BHKV, torch.einsum("bhk,bhkv->bhv", q_BTHK[:, -1], state_BHKV)[:, None]',
    ]
    body = "\n".join(f"    {line}" for line in lines)
    return f"\ndef update(\n    state_BHKV: Tensor | None,\n{signature}) -> tuple[Tensor, Tensor]:\n{body}\n"


def state_lines(genome: Genome, by_fla: bool) -> str:
    """Lines of `mix` that turn q, k, w, v (and log_decay) into o.

    Args:
        by_fla: with a branch that calls fla's kernel where it runs.
    """
    decay = ", log_decay" if decay_kind(genome) != "none" else ""
    fixed = genome.beta == "constant"  # one strength for all tokens, which a kernel wants for each
    if genome.state == "linear":
        return "\n".join(_read("q", "q, w, v", "q, w, v", decay, by_fla))
    if genome.state == "delta":
        strength = "strength.expand(*k.shape[:3], 1)" if fixed else "strength"
        return "\n".join(_read("q", "q, k, w, v", f"q, k, {strength}, v", decay, by_fla))
    if genome.state == "two_timescale":
        slow = "torch.zeros_like(quick)" if genome.decay == "none" else "log_decay"
        fast = "quick" if genome.decay == "none" else "log_decay + quick"
        return "\n".join(
            (
                "# The first half of the value channels keeps the decay of the head, the second half forgets faster.",
                "quick = -F.softplus(self.quick).to(v.dtype).expand(*v.shape[:3], 1)",
                f"log_decay = torch.cat([{slow}, {fast}], dim=2)",
                "q_two, k_two, w_two = (torch.cat([t, t], dim=2) for t in (q, k, w))",
                "v_two = torch.cat(v.chunk(2, dim=-1), dim=2)",
                *_two_timescale_read(fixed, by_fla),
            )
        )
    widened = "strength, strength_extra = (t.expand(*k.shape[:3], 1) for t in (strength, strength_extra))"
    stacked = "strength_rows = torch.stack([strength_extra, strength], dim=2).flatten(1, 2)"
    before = [widened, stacked] if fixed else [stacked]
    return "\n".join(
        (
            "# Two rows a token: first the second key's correction, then the token's own write.",
            "k_rows = torch.stack([k_extra, k], dim=2).flatten(1, 2)",
            "w_rows = torch.stack([w_extra, w], dim=2).flatten(1, 2)",
            "v_rows = torch.stack([v * self.extra_value.to(v.dtype), v], dim=2).flatten(1, 2)",
            *_read("q", "q, k_rows, w_rows, v_rows", "q, k_rows, strength_rows, v_rows", decay, by_fla, *before),
        )
    )


def _two_timescale_read(fixed: bool, by_fla: bool) -> list[str]:
    own = "q_two, k_two, w_two, v_two"
    if not by_fla:
        return [f"o = torch.cat(remember({own}, log_decay).chunk(2, dim=2), dim=-1)"]
    strength = "strength.expand(*k.shape[:3], 1)" if fixed else "strength"
    doubled = f"strength_two = {strength}.repeat(1, 1, 2, 1)"
    return [
        *_read("q_two", own, "q_two, k_two, strength_two, v_two", ", log_decay", True, doubled),
        "o = torch.cat(o.chunk(2, dim=2), dim=-1)",
    ]


def _read(q: str, own: str, theirs: str, decay: str, by_fla: bool, *before: str) -> list[str]:
    """Lines that assign the read-out to `o`.

    Args:
        q: name of the queries.
        own, theirs: what `remember` and `fla_memory` take, the values last; then `decay` for both.
        before: lines that only the kernel needs.
    """
    if not by_fla:
        return [f"o = remember({own}{decay})"]
    return [
        f"if remember is memory and runs_fla({q}, {own.rpartition(', ')[2]}, given):",
        *(f"    {line}" for line in (*before, f"o = fla_memory({theirs}{decay}, given)")),
        "else:",
        f"    o = remember({own}{decay})",
    ]
