"""What `torchrun --nproc-per-node N training/train.py ...` asks for, read from the variables that it sets.

torchrun starts N copies of the command. The first one runs the job with N worker processes in one sandbox, where they
meet without a network of the host; the other copies have nothing to do and end at once. So `torchrun` and
`--training.processes N` are one thing.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import UsageError

__all__ = ["asked_for", "launched"]


def launched(environment: Mapping[str, str]) -> bool:
    """Whether torchrun is the parent of this process.

    It gives its children sessions of their own and does not end them where it is killed itself.
    """
    return "TORCHELASTIC_RUN_ID" in environment


def asked_for(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(Rank of this copy, number of copies) under torchrun; None without it.

    Raises:
        UsageError: it spans several machines, or its variables are damaged.
    """
    if not launched(environment):
        return None
    try:
        names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
        rank, local, world = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"expected torchrun to set {', '.join(names)} to numbers, got {error}", "start it by torchrun again"
        ) from error
    if local != world:
        raise UsageError(
            f"torchrun asks for {world} processes on {world // max(local, 1)} machines; one run takes one machine",
            "give it --nnodes 1, and let other machines run other programs",
        )
    return rank, local
