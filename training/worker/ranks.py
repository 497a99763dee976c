"""Several processes that train one model: rank 0 speaks with the trusted side and passes its calls on to the others.

Data parallel with a sharded optimiser (ZeRO): every rank holds the whole model and takes its share of the rows of each
batch; of gradients, moments and the update, which are flat vectors (training/worker/optimizer.py), each has a part.
Not torch's DDP, whose buckets and hooks buy nothing where the gradient is one tensor already, and not FSDP2, which
would replace the parameters of code that nobody knows (docs/training.md). A checkpoint is gathered on rank 0 and holds
the whole state, so that any number of ranks can go on from it.

All ranks are processes of one sandbox. They meet over a file and its private loopback before the candidate is loaded;
after that none may open another connection (training/worker/syscalls.py). What a rank says is believed as little as
what a single worker says: the scorer reads the logits of rank 0.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.protocol import Channel, Frame, ProtocolError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FollowerError", "Ranks"]

_SHARED = frozenset({"train.prepare", "load", "train.build", "train.run"})
"""Calls that every rank answers; all others are rank 0's alone."""
_COLLECTIVES = ("all_reduce", "all_gather_single", "broadcast", "gather", "reduce_scatter_single", "scatter")
"""Functions of torch.distributed, taken before the candidate is loaded, which may replace them in their module."""
_ALIGNED = 32
"""Parts of a vector begin at multiples of so many elements: NCCL is slow where they do not begin at 16 bytes."""
_PATIENCE = 10.0
"""Seconds to wait for what a follower has to say once rank 0 failed."""
_MEETING = 300.0
"""Seconds that the others may take to import torch."""
_WHOLE_RUN = datetime.timedelta(days=30)
"""How long a rank waits for the others: as long as the trusted side lets all of them live."""


class FollowerError(RuntimeError):
    """Another rank failed. `error` is what it says of it, as `training.worker.__main__.describe` puts it."""

    def __init__(self, rank: int, error: dict[str, Any]) -> None:
        super().__init__(f"rank {rank}: {error.get('type')}: {error.get('message')}")
        self.error = {**error, "message": f"{error.get('message', '')} (rank {rank})"}


class Ranks:
    """This process among those that train together. With a world of one every method does nothing.

    Attributes:
        rank: number of this process, 0 for the one that the trusted side speaks with.
        world: number of processes.
    """

    def __init__(self, rank: int = 0, world: int = 1, meet: Path | None = None) -> None:
        self.rank, self.world, self._meet = rank, world, meet
        self._followers: list[tuple[subprocess.Popen[bytes], Channel]] = []
        self._collectives: dict[str, Callable[..., Any]] = {}
        self._most: Any = None

    @classmethod
    def launch(cls) -> Ranks:
        """Reads ASI_WORLD and ASI_RANK; rank 0 starts the others, which import torch while it does."""
        world, rank = int(os.environ.get("ASI_WORLD", "1")), int(os.environ.get("ASI_RANK", "0"))
        if world == 1:
            return cls()
        if rank > 0:
            return cls(rank, world, Path(os.environ["ASI_MEET"]))
        ranks = cls(0, world, Path(tempfile.mkdtemp(prefix="asi-ranks-")) / "meet")
        for number in range(1, world):
            env = {**os.environ, "ASI_RANK": str(number), "ASI_MEET": str(ranks._meet)}
            env["ASI_PARENT_PID"] = str(os.getpid())
            process = subprocess.Popen(
                [sys.executable, "-m", "training.worker"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert process.stdin is not None and process.stdout is not None
            ranks._followers.append((process, Channel(process.stdout.fileno(), process.stdin.fileno())))
        return ranks

    def connect(self, device: str, channel: Channel) -> None:
        """Meets the other ranks. On CUDA each takes the card of its own number.

        Args:
            channel: of this rank, to whoever started it.

        Raises:
            RuntimeError, FollowerError, TimeoutError: they cannot reach each other, or one is gone or does not start.
        """
        if self.world == 1:
            return
        # From here on everybody waits for everybody, for as long as a run may last: so all have to be there.
        if self.rank:
            channel.send(Frame("reply", 0, "connect"))
        self.collect(_MEETING)
        import torch
        from torch import distributed

        # No name of this machine can be resolved in a sandbox, so the interface is named.
        for backend in ("GLOO", "NCCL"):
            os.environ[f"{backend}_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        if device == "cuda":
            torch.cuda.set_device(self.rank)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            init_method=f"file://{self._meet}",
            rank=self.rank,
            world_size=self.world,
            timeout=_WHOLE_RUN,
        )
        distributed.barrier()
        self._collectives = {name: getattr(distributed, name) for name in _COLLECTIVES}
        self._most = distributed.ReduceOp.MAX
        if self.rank == 0 and self._meet is not None:
            with suppress(OSError):
                self._meet.unlink(missing_ok=True)
                self._meet.parent.rmdir()

    def share(self, rows: int) -> slice:
        """The rows of a batch of `rows` that are this rank's."""
        return slice(rows * self.rank // self.world, rows * (self.rank + 1) // self.world)

    def part(self, count: int) -> tuple[slice, int]:
        """(The part of a vector of `count` elements that is this rank's, what has to be added to make parts equal)."""
        if self.world == 1:
            return slice(0, count), 0
        size = -(-count // (self.world * _ALIGNED)) * _ALIGNED
        return slice(size * self.rank, size * (self.rank + 1)), size * self.world - count

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all ranks, the same to the last bit on each."""
        if self.world > 1:
            for tensor in tensors:
                self._collectives["all_reduce"](tensor)

    def reduce(self, part: Tensor, whole: Tensor) -> None:
        """Gives `part`, this rank's place in `whole`, the sum over all ranks. The rest of `whole` is lost."""
        if self.world > 1:
            self._collectives["reduce_scatter_single"](part, whole)

    def spread(self, whole: Tensor, part: Tensor) -> None:
        """Gives `whole` every rank's `part` of it; `part` is this rank's place in it."""
        if self.world > 1:
            self._collectives["all_gather_single"](whole, part)

    def norm(self, part: Tensor) -> Tensor:
        """The Euclidean norm of all ranks' parts together, the same to the last bit on each."""
        norm = part.norm()
        if self.world == 1:
            return norm
        squared = norm.square()
        self.add([squared])
        return squared.sqrt_()

    def gather(self, part: Tensor) -> Tensor | None:
        """All parts as one vector, on rank 0; None on the others. Of one rank `part` itself."""
        if self.world == 1:
            return part
        whole = part.new_empty(self.world * len(part)) if self.rank == 0 else None
        self._collectives["gather"](part, None if whole is None else list(whole.split(len(part))), dst=0)
        return whole

    def scatter(self, part: Tensor, whole: Tensor | None) -> None:
        """Gives each rank's `part` its place in what rank 0 holds, which may lack the padding; None: zeros. Of one rank
        `part` is `whole` already."""
        if self.world == 1:
            return
        parts = None
        if self.rank == 0:
            padded = part.new_zeros(self.world * len(part))
            if whole is not None:
                padded[: len(whole)] = whole
            parts = list(padded.split(len(part)))
        self._collectives["scatter"](part, parts, src=0)

    def most(self, numbers: Sequence[int]) -> list[int]:
        """Of each number the largest that a rank says, by way of the CPU: no card is waited for."""
        if self.world == 1:
            return list(numbers)
        import torch

        said = torch.tensor(numbers, dtype=torch.int64)
        self._collectives["all_reduce"](said, self._most)
        return said.tolist()

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by that of rank 0, whatever its dtype."""
        if self.world == 1:
            return
        import torch

        for tensor in tensors:
            # As bytes: the backends do not know every dtype.
            flat = tensor.detach().reshape(-1).contiguous()
            self._collectives["broadcast"](flat.view(torch.uint8), 0)
            if self.rank > 0:
                with torch.no_grad():
                    tensor.copy_(flat.view(tensor.shape))

    def forward(self, frame: Frame) -> bool:
        """Passes a call on to the other ranks. Whether it is one that they answer, so that `collect` has to follow."""
        if not self._followers or frame.op not in _SHARED:
            return False
        for _, channel in self._followers:
            # A follower that is gone is told by `collect`.
            with suppress(OSError):
                channel.send(frame)
        return True

    def collect(self, waiting: float | None = None) -> None:
        """Waits for the other ranks' answers to the last call.

        Args:
            waiting: seconds at most; None: as long as it takes.

        Raises:
            FollowerError: one of them failed or is gone. TimeoutError: they have not answered in time.
        """
        deadline = None if waiting is None else time.monotonic() + waiting
        for number, (process, channel) in enumerate(self._followers, start=1):
            try:
                while (frame := channel.receive(deadline)).kind == "event":
                    pass
            except (EOFError, ProtocolError) as error:
                status = process.wait()
                said = {"type": "ProcessEnded", "message": f"its process ended with status {status}"}
                raise FollowerError(number, said) from error
            if frame.kind == "error":
                raise FollowerError(number, frame.meta)

    def blame(self) -> FollowerError | None:
        """After rank 0 failed in a call that all answer: the failure of another rank that may have caused it."""
        try:
            self.collect(_PATIENCE if self._followers else 0.0)
        except FollowerError as error:
            return error
        except TimeoutError:
            pass
        return None

    def release(self) -> None:
        """Ends the other ranks, which are not needed once the model is trained."""
        for process, _ in self._followers:
            assert process.stdin is not None
            process.stdin.close()
        self._followers = []
