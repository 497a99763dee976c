"""An optimiser of which every rank holds a part, against one that is whole: real processes over gloo."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.protocol import Channel
from training.worker.optimizer import AdamW
from training.worker.ranks import Ranks

SPEC = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
Whole = dict[str, Tensor]


def model() -> nn.Module:
    """451 parameters, 420 of which decay: the last of three ranks has some that do, those that do not, and padding."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 11))


def steps(optimizer: AdamW, ranks: Ranks, first: int, last: int) -> list[float]:
    """Trains with gradients that follow from the step, of which each rank has its share; their norms."""
    norms = []
    for step in range(first, last + 1):
        torch.manual_seed(step)
        whole = torch.randn(optimizer.sizes["weights"]) * step
        optimizer.gradients.zero_()
        optimizer.gradients[: len(whole)] = whole * (ranks.rank + 1) / sum(range(1, ranks.world + 1))
        norms.append(optimizer.step(0.01).item())
    return norms


def alone(last: int) -> tuple[AdamW, list[float]]:
    optimizer = AdamW(model(), SPEC)
    return optimizer, steps(optimizer, Ranks(), 1, last)


def _child(rank: int, world: int, folder: Path, work: Callable[[Ranks], Any]) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(rank, world, folder / "meet" / "at")
    null = os.open(os.devnull, os.O_RDWR)
    ranks.connect("cpu", Channel(null, null))
    torch.save(work(ranks), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def together(world: int, folder: Path, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each of so many ranks."""
    (folder / "meet").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_child, args=(rank, world, folder, work)) for rank in range(world)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * world
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def close(one: Whole, other: Whole) -> None:
    assert one.keys() == other.keys()
    for name, vector in one.items():
        torch.testing.assert_close(vector, other[name], rtol=1e-5, atol=1e-7)


def test_parts_of_several_ranks_are_the_whole_of_one_and_go_on_with_any_number(tmp_path: Path) -> None:
    def start(ranks: Ranks) -> tuple[Whole, Tensor, list[float], int]:
        made = model()
        if ranks.rank:  # as other processes may begin; rank 0's weights count
            nn.init.zeros_(made[0].weight)
        optimizer = AdamW(made, SPEC, ranks)
        optimizer.deal({})
        norms = steps(optimizer, ranks, 1, 3)
        return optimizer.whole(), optimizer.pair.live.clone(), norms, optimizer._first.numel()

    def go_on(ranks: Ranks) -> tuple[Whole, Tensor, list[float]]:
        optimizer, room = AdamW(model(), SPEC, ranks), {}
        if ranks.rank == 0:
            room = optimizer.room()
            for name, vector in room.items():
                vector.copy_(begun[name])
        optimizer.deal(room)
        optimizer.steps = 3
        norms = steps(optimizer, ranks, 4, 6)
        return optimizer.whole(), optimizer.pair.live.clone(), norms

    one, wanted = alone(3)
    two = together(2, tmp_path / "two", start)
    begun = two[0][0]
    close(begun, one.whole())
    assert two[0][2] == pytest.approx(wanted, rel=1e-5) and two[0][2] == two[1][2]
    assert two[1][0] == {} and torch.equal(two[0][1], two[1][1]), "the same weights to the last bit on each"
    assert [part[3] for part in two] == [256, 256], "moments of a part, not of all 451 weights"
    one, wanted = alone(6)
    three = together(3, tmp_path / "three", go_on)
    close(three[0][0], one.whole())
    assert three[0][2] == pytest.approx(wanted[3:], rel=1e-5)
    whole = go_on(Ranks())
    close(whole[0], one.whole())


def test_parts_are_equal_and_cover_all() -> None:
    for world, count in ((1, 7), (2, 64), (3, 65), (8, 3)):
        parts = [Ranks(rank, world).part(count) for rank in range(world)]
        lengths = {place.stop - place.start for place, _ in parts}
        assert len(lengths) == 1 and parts[0][0].start == 0
        assert [place.stop for place, _ in parts[:-1]] == [place.start for place, _ in parts[1:]]
        assert parts[-1][0].stop == count + parts[0][1]
