"""Pure-PyTorch stand-ins for what programs import from `fla` (flash-linear-attention), for where it cannot run.

Without a CUDA device `import fla.modules` takes over ten seconds and every kernel then fails at its first call. So a
job on such a device calls `install()` before the program is executed: the names below then resolve to this package,
and the real one is never imported. On a CUDA device nothing is installed and programs get the real kernels.

    fla.modules                  RMSNorm, FusedRMSNormGated, ShortConvolution
    fla.modules.layernorm        RMSNorm
    fla.modules.fused_norm_gate  FusedRMSNormGated
    fla.modules.convolution      ShortConvolution
    fla.modules.l2norm           l2norm, l2_norm
    fla.layers.utils             get_unpad_data, index_first_axis, pad_input
    fla.ops                      all of the next five
    fla.ops.delta_rule           chunk_delta_rule, fused_recurrent_delta_rule
    fla.ops.gated_delta_rule     chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    fla.ops.linear_attn          chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn
    fla.ops.gla                  chunk_gla, fused_recurrent_gla
    fla.ops.simple_gla           chunk_simple_gla, fused_chunk_simple_gla, fused_recurrent_simple_gla

Other names of fla fail to import, with a message that says so. Signatures and results are those of fla 0.2.2 (for
which the published programs were written) to 0.6.0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from common.errors import JobError

__all__ = ["NAMES", "install"]

NAMES = (
    "fla",
    "fla.modules",
    "fla.modules.layernorm",
    "fla.modules.fused_norm_gate",
    "fla.modules.convolution",
    "fla.modules.l2norm",
    "fla.layers",
    "fla.layers.utils",
    "fla.ops",
    "fla.ops.delta_rule",
    "fla.ops.gated_delta_rule",
    "fla.ops.linear_attn",
    "fla.ops.gla",
    "fla.ops.simple_gla",
)
"""Each module name that `install` defines; the module behind it has the same place under training.fla_compat."""


def install() -> bool:
    """Define the stand-ins as `fla.*` in this process; True if they are in place, False on a CUDA device.

    Calling it again changes nothing.

    Raises:
        JobError: the real fla was imported before; a process must hold one of the two only.
    """
    if torch.cuda.is_available():
        return False
    present = sys.modules.get("fla")
    if present is not None and present is not sys.modules[__name__]:
        raise JobError(
            "expected fla not to be imported yet, got the real package already loaded",
            fix="call training.fla_compat.install() before anything imports fla",
        )
    for name in NAMES:
        sys.modules[name] = import_module(__name__ + name.removeprefix("fla"))
    if not any(isinstance(finder, _NoOthers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoOthers())
    return True


class _NoOthers(MetaPathFinder):
    """Says for every other module of fla why it is not there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("fla."):
            return None
        there = ", ".join(NAMES[1:])
        raise ModuleNotFoundError(f"{fullname} needs a CUDA device; without one there are {there}", name=fullname)
