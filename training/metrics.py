"""The one stream of a run's metrics: metrics.jsonl, one object a line, written as the run goes on.

The monitor, plots and the optional TensorBoard files are fed from the same objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from common.errors import StoreError, UsageError

__all__ = ["FILE", "Metrics", "require_tensorboard"]

FILE = "metrics.jsonl"
_TAGS = {
    "loss": "train/loss",
    "task_loss": "train/task_loss",
    "val_loss": "validation/loss",
    "heldout_loss": "heldout/loss",
    "lr": "optimiser/lr",
    "grad_norm": "optimiser/grad_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "memory_mb": "memory/mb",
}


class Metrics:
    """Writes into `folder`; a context manager. An object's None values are kept: a missing number is no number.

    Raises:
        StoreError: from every method, when the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self._path, self._board, self._folder = folder / FILE, tensorboard, folder
        self._file: IO[str] | None = None
        self._events: Any = None

    def begin(self) -> None:
        """Starts over with an empty stream."""
        self.close()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8", buffering=1)
            if self._board:
                for old in (self._folder / "tensorboard").glob("events.*"):
                    old.unlink()
                self._events = _writer()(str(self._folder / "tensorboard"))
        except OSError as error:
            raise self._failed(error) from error

    def add(self, line: Mapping[str, Any]) -> None:
        try:
            if self._file is not None:
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
            if self._events is not None:
                for name, tag in _TAGS.items():
                    if line.get(name) is not None:
                        self._events.add_scalar(tag, line[name], line["step"])
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
            if self._events is not None:
                self._events.close()
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self._file = self._events = None

    def _failed(self, error: OSError) -> StoreError:
        return StoreError(
            f"cannot write {self._path}: {error.strerror or error}", "free disk space, or name another --out"
        )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_tensorboard() -> None:
    """Raises:
    UsageError: TensorBoard files are asked for and the package that writes them is not installed.
    """
    _writer()


def _writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "training.tensorboard needs the package tensorboardX, which is not installed",
            "pip install tensorboardX, or leave the setting off",
        ) from error
    return SummaryWriter
