"""Program text that hands the memory to fla's kernels: which genomes have one, when it is called, and the call.

A program calls it where the shipped architectures do: for 16-bit values on a CUDA device and heads of 16 to 256
channels. Elsewhere, and in `step`, it takes the form of `template_kernel`. An additive memory is fla's with the write
key w in the place of k, whatever made w. An erasing one is fla's where w is the key times one number a head; a write
strength for each channel makes another matrix of it (1 - w k^T is no longer symmetric), and with two steps a token and
a decay for each channel fla has no kernel either.
"""

from __future__ import annotations

from pipeline.designer.grammar import Genome
from pipeline.designer.template_kernel import decay_kind

__all__ = ["fla_helpers", "fla_kernel"]

_KERNELS: dict[tuple[str, str], tuple[str, str]] = {
    ("linear", "none"): ("linear_attn", "chunk_linear_attn"),
    ("linear", "scalar"): ("simple_gla", "chunk_simple_gla"),
    ("linear", "channel"): ("gla", "chunk_gla"),
    ("delta", "none"): ("delta_rule", "chunk_delta_rule"),
    ("delta", "scalar"): ("gated_delta_rule", "chunk_gated_delta_rule"),
    ("delta", "channel"): ("kda", "chunk_kda"),
    ("two_timescale", "scalar"): ("gated_delta_rule", "chunk_gated_delta_rule"),
    ("product", "none"): ("gated_delta_product", "chunk_gated_delta_product"),
    ("product", "scalar"): ("gated_delta_product", "chunk_gated_delta_product"),
}
"""Module under fla.ops and function of each state form and kind of decay."""

_RUNS_FLA = '''
FLA_DEVICE = "cuda"
"""Where fla's Triton kernels run."""


def runs_fla(q_BTHK: Tensor, v_BTHV: Tensor, given: torch.dtype) -> bool:
    """Whether fla's kernel takes these: given in 16 bits, on a CUDA device, heads of 16 to 256 channels."""
    widths = (q_BTHK.shape[-1], v_BTHV.shape[-1])
    half = given in (torch.bfloat16, torch.float16)
    return v_BTHV.device.type == FLA_DEVICE and half and min(widths) >= 16 and max(widths) <= 256
'''


def fla_kernel(genome: Genome) -> tuple[str, str] | None:
    """Module under fla.ops and function that computes the memory of this genome; None where there is none."""
    if genome.state != "linear" and genome.beta == "channel":
        return None
    return _KERNELS.get((genome.state, decay_kind(genome)))


def fla_helpers(genome: Genome) -> list[str]:
    """Text of the functions `runs_fla` and `fla_memory`; nothing for a genome without a kernel."""
    found = fla_kernel(genome)
    if found is None:
        return []
    package, function = found
    kind, erasing = decay_kind(genome), genome.state != "linear"
    keys = ["k_BTHK", "strength_BTH1"] if erasing else ["w_BTHK"]
    arguments = ["q_BTHK", *keys, "v_BTHV", *(["log_decay_BTHX"] if kind != "none" else [])]
    signature = "".join(f"    {argument}: Tensor,\n" for argument in arguments)
    options = {"none": [], "scalar": ["g=log_decay_BTHX[..., 0]"], "channel": ["g=log_decay_BTHX"]}[kind]
    if genome.state == "product":
        options = [*(options or ["g=None"]), "num_householder=2"]
    options += ["beta=strength_BTH1[..., 0]"] if erasing else []
    options += ["scale=1.0", *(["normalize=False"] if function == "chunk_linear_attn" else [])]
    call = [f"o_BTHV = {function}(q, k, v, {', '.join(options)})[0]"]
    if len(call[0]) > 116:
        call = [f"o_BTHV = {function}(", f"    q, k, v, {', '.join(options)}", ")[0]"]
    lines = [
        '"""What `memory` computes, by fla\'s Triton kernel: q, k, v and o in the 16 bits given, sums in float32."""',
        "# Without a GPU this import is slow and its kernels fail.",
        f"from fla.ops.{package} import {function}",
        "",
        f"q, k, v = (t.to(given) for t in (q_BTHK, {keys[0]}, v_BTHV))",
        *call,
        "return o_BTHV.to(v_BTHV.dtype)",
    ]
    body = "\n".join(f"    {line}" if line else "" for line in lines)
    return [_RUNS_FLA, f"\ndef fla_memory(\n{signature}    given: torch.dtype,\n) -> Tensor:\n{body}\n"]
