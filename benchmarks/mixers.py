"""Speed of every architecture against a loop over tokens and against softmax attention, in one run.

    python benchmarks/mixers.py
    python benchmarks/mixers.py --shapes 4x64x64 --repeats 3
    python benchmarks/mixers.py --only delta_net gla

One mixer layer, forward and backward, float32, one thread. Each repeat times all mixers one after another, so that a
busy machine slows all of them; printed are medians in tokens per CPU-second, and ratios within a repeat, which vary
far less.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from common.process import exit_with_parent
from training.architectures import ARCHITECTURES, delta_net
from training.references import softmax_attention

HEADS = 4
DEFAULT_SHAPES = ("8x64x64", "4x128x64", "2x512x64", "4x128x128")


def token_loop(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor) -> Tensor:
    """The delta rule as it is defined, one token after another: what the chunkwise form saves."""
    batch, length, heads, key_dim = k_BTHK.shape
    state_BHKV = v_BTHV.new_zeros(batch, heads, key_dim, v_BTHV.shape[-1])
    rows = []
    for t in range(length):
        q, k, v, beta = q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t], beta_BTH[:, t, :, None]
        held = torch.einsum("bhk,bhkv->bhv", k, state_BHKV)
        state_BHKV = state_BHKV + torch.einsum("bhk,bhv->bhkv", k, beta * (v - held))
        rows.append(torch.einsum("bhk,bhkv->bhv", q, state_BHKV))
    return torch.stack(rows, dim=1)


def mixers(hidden: int, names: Sequence[str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each mixer by name, as a function of hidden states; `token_loop` is DeltaNet with its kernel replaced."""
    torch.manual_seed(0)
    nets = {
        name: importlib.import_module(f"training.architectures.{name}").DeltaNet(hidden_size=hidden, num_heads=HEADS)
        for name in names
    }
    loop = delta_net.DeltaNet(hidden_size=hidden, num_heads=HEADS)
    softmax = softmax_attention.DeltaNet(hidden_size=hidden, num_heads=HEADS)
    chunked = delta_net.chunked_delta_rule

    def looped(x_BTD: Tensor) -> Tensor:
        delta_net.chunked_delta_rule = token_loop
        try:
            return loop(x_BTD)[0]
        finally:
            delta_net.chunked_delta_rule = chunked

    return {
        **{name: lambda x, net=net: net(x)[0] for name, net in nets.items()},
        "token_loop": looped,
        "softmax_attention": lambda x: softmax(x)[0],
    }


def seconds(mixer: Callable[[Tensor], Tensor], x_BTD: Tensor, weights_BTD: Tensor, calls: int) -> float:
    """CPU seconds of one forward and backward pass, over `calls` of them."""
    start = time.process_time()
    for _ in range(calls):
        (mixer(x_BTD) * weights_BTD).sum().backward()
    return (time.process_time() - start) / calls


def measure(batch: int, length: int, hidden: int, repeats: int, names: Sequence[str]) -> None:
    """Times and prints one shape."""
    table = mixers(hidden, names)
    x_BTD, weights_BTD = torch.randn(batch, length, hidden, requires_grad=True), torch.randn(batch, length, hidden)
    for mixer in table.values():
        seconds(mixer, x_BTD, weights_BTD, 2)
    rounds = [
        {name: seconds(mixer, x_BTD, weights_BTD, 1 if name == "token_loop" else 5) for name, mixer in table.items()}
        for _ in range(repeats)
    ]
    print(f"batch {batch}, length {length}, hidden {hidden}, {HEADS} heads, median of {repeats}")
    for name in table:
        speed = batch * length / statistics.median(each[name] for each in rounds)
        ratios = sorted(each["token_loop"] / each[name] for each in rounds)
        attention = statistics.median(each["softmax_attention"] / each[name] for each in rounds)
        print(
            f"  {name:22}{speed:10,.0f} tokens/CPU-s   {statistics.median(ratios):6.1f} x token loop"
            f" ({ratios[0]:.1f}-{ratios[-1]:.1f})   {attention:5.2f} x softmax attention"
        )


def main(argv: Sequence[str] | None = None) -> int:
    exit_with_parent()
    parser = argparse.ArgumentParser(description="Speed of the mixers, forward and backward, one thread.")
    parser.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES, help="BATCHxLENGTHxHIDDEN, default %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="rounds over all mixers, default %(default)s")
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES), metavar="NAME")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for shape in arguments.shapes:
        try:
            batch, length, hidden = (int(part) for part in shape.split("x"))
        except ValueError:
            parser.error(f"--shapes expects BATCHxLENGTHxHIDDEN such as 8x64x64, got {shape!r}")
        measure(batch, length, hidden, arguments.repeats, arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
