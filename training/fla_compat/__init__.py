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

Signatures and results are those of fla 0.2.2 (for which the published programs were written) to 0.6.0.
"""

from __future__ import annotations

import sys
from importlib import import_module

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
    return True
