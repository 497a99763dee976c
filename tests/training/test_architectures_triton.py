"""Each architecture by fla's real Triton kernel, in Triton's interpreter, against its own form: no GPU needed.

The child imports fla (over ten seconds) and interprets kernels operation by operation: one of the slow tests.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import triton_interpreter
from torch import Tensor, nn

from training.architectures import ARCHITECTURES

LENGTH, HIDDEN = 70, 16  # more than one chunk of 64 in the kernels, of 32 in ours; one head of the least width


def results(net: nn.Module, mask: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(1, LENGTH, HIDDEN, generator=generator) for _ in range(2))
    weights = weights * mask[..., None]
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        out = net(x, attention_mask=mask)[0].float()
    return [out * mask[..., None], *torch.autograd.grad((out * weights).sum(), [x, *net.parameters()])]


def compare(name: str) -> None:
    """Raises AssertionError where output or a gradient differ by more than float16 rounds."""
    module = importlib.import_module(f"training.architectures.{name}")
    torch.manual_seed(0)
    net = module.DeltaNet(hidden_size=HIDDEN, num_heads=1, use_gate=True, allow_neg_eigval=True)
    mask = (torch.arange(LENGTH) >= 5)[None].long()
    own = results(net, mask)
    module.FLA_DEVICE = "cpu"
    called = results(net, mask)
    triton_interpreter.assert_close(name, net, called, own, 0.03)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is a Linux package")
def test_architectures_by_the_kernels_of_fla_agree_with_their_own_form() -> None:
    assert triton_interpreter.output_of(__file__).count("apart") == len(ARCHITECTURES)


if __name__ == "__main__":
    import fla.ops  # noqa: F401 - every kernel is there before it is prepared

    triton_interpreter.prepare()
    for architecture in ARCHITECTURES:
        compare(architecture)
