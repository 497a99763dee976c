"""Metrics in the forms of other tools: TensorBoard files, and runs of Weights & Biases.

Neither package is imported unless its setting asks for it. Weights & Biases is not among the requirements; its offline
mode writes files into the run's folder and sends nothing (`wandb sync DIR/wandb/offline-run-*` does, when its user
wants to), and its reports of its own faults are switched off.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from common.errors import StoreError, UsageError, first_line

__all__ = ["TensorBoard", "WandB", "WandBMode", "Writer", "require_writers"]

WandBMode = Literal["off", "offline", "online"]
PROJECT = "asi-arch"
"""Of Weights & Biases, where WANDB_PROJECT names none."""
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


class Writer(Protocol):
    """Takes the objects of metrics.jsonl; `close` it. Both raise OSError or StoreError where it cannot write."""

    def add(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def require_writers(tensorboard: bool, wandb: WandBMode) -> None:
    """Raises:
    UsageError: a writer is asked for and the package that writes it is not installed.
    """
    for asked, setting, package in ((tensorboard, "tensorboard", "tensorboardX"), (wandb != "off", "wandb", "wandb")):
        if asked and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"training.{setting} needs the package {package}, which is not installed",
                f"pip install {package}, or leave the setting off",
            )


class TensorBoard:
    """Event files in `folder`/tensorboard, in place of those of an earlier run."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        for old in (folder / "tensorboard").glob("events.*"):
            old.unlink()
        self._events = SummaryWriter(str(folder / "tensorboard"))

    def add(self, line: Mapping[str, Any]) -> None:
        for tag, value in _tagged(line).items():
            self._events.add_scalar(tag, value, line["step"])

    def close(self) -> None:
        self._events.close()


class WandB:
    """A run of Weights & Biases, its files in `folder`/wandb; those of an earlier offline run are removed.

    Args:
        name: what the run is called.
        config: facts about it.

    Raises:
        UsageError: the run cannot be begun: online, mostly because nobody is logged in.
    """

    def __init__(self, folder: Path, mode: WandBMode, name: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        for old in (folder / "wandb").glob("offline-run-*"):
            shutil.rmtree(old)
        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
        )
        try:
            # Several runs may go on in one process.
            self._run = wandb.init(
                mode=mode,
                dir=str(folder),
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=name,
                config=dict(config),
                reinit="create_new",
                settings=quiet,
            )
        except wandb.errors.Error as error:
            raise UsageError(
                f"Weights & Biases cannot begin a run ({mode}): {first_line(error)}",
                "log in with `wandb login`, or set training.wandb to offline or off",
            ) from error
        self._error: type[Exception] = wandb.errors.Error

    def add(self, line: Mapping[str, Any]) -> None:
        with self._told():
            self._run.log(_tagged(line), step=line["step"])

    def close(self) -> None:
        with self._told():
            self._run.finish()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise StoreError(f"Weights & Biases failed: {first_line(error)}") from error


def _tagged(line: Mapping[str, Any]) -> dict[str, float]:
    tasks = {f"validation/{name}": right for name, right in line.get("val_tasks", {}).items() if right is not None}
    return {tag: line[name] for name, tag in _TAGS.items() if line.get(name) is not None} | tasks
