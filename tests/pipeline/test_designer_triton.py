"""Designs by fla's real Triton kernels, in Triton's interpreter, against their own form: no GPU needed.

The child imports fla (over ten seconds) and interprets kernels operation by operation: one
of the slow tests.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.designer import Genome, render
from tests.pipeline.designs import KERNEL_DESIGNS
from tests.training import triton_interpreter

LENGTH, HIDDEN = 70, 16  # more than one chunk of 64 in the kernels, of 32 in ours; one head of the least width


def results(net: nn.Module) -> list[Tensor]:
    """The output, and the gradients of four losses: a parameter of one number may have nearly none in one of them."""
    generator = torch.Generator().manual_seed(1)
    x, *weights = (torch.randn(1, LENGTH, HIDDEN, generator=generator) for _ in range(5))
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        out = net(x)[0].float()
    leaves = [x, *net.parameters()]
    gradients = [torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True) for weight in weights]
    return [out, *(torch.stack(of_leaf) for of_leaf in zip(*gradients, strict=True))]


def compare(name: str, genome: Genome) -> None:
    """Raises AssertionError where output or a gradient differ by more than float16 rounds."""
    program: dict[str, Any] = {}
    exec(compile(render(genome, "delta_net_test"), "program", "exec"), program)
    torch.manual_seed(0)
    halves = 2.0 if genome.state == "two_timescale" else 1.0  # the kernel sees half of the value channels
    net = program["DeltaNet"](hidden_size=HIDDEN, num_heads=1, expand_v=halves, layer_idx=1)
    own = results(net)
    program["FLA_DEVICE"] = "cpu"
    called = results(net)
    triton_interpreter.assert_close(name, net, called, own, 0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is a Linux package")
def test_designs_by_the_kernels_of_fla_agree_with_their_own_form() -> None:
    assert triton_interpreter.output_of(__file__).count("apart") == len(KERNEL_DESIGNS)


if __name__ == "__main__":
    import fla.ops  # noqa: F401 - every kernel is there before it is prepared

    triton_interpreter.prepare()
    for design, its_genome in KERNEL_DESIGNS.items():
        compare(design, its_genome)
