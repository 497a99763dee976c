"""The sections of a profile: each key with its bounds. What two sections must agree on stands in training/profiles.py.

A value that no training could use is refused here, with the key, so that no program is blamed for it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from common.strict import StrictModel
from training.bubblewrap import HELD_OUT_PACKAGES

__all__ = [
    "FIRST_TASKS",
    "LONGER_TASKS",
    "LONGEST_CONTEXT",
    "MOST_IDS",
    "MOST_OWN_ITEMS",
    "OWN_TASKS",
    "STREAM_TASKS",
    "CheckpointSpec",
    "DataSpec",
    "EvalSpec",
    "LimitSpec",
    "ModelSpec",
    "SearchSpec",
    "Spec",
    "TaskSpec",
    "TrainSpec",
    "task_lengths",
]

FIRST_TASKS = ("recall", "copying", "induction")
STREAM_TASKS = (
    *FIRST_TASKS,
    "context_recall",
    "fuzzy_recall",
    "noisy_recall",
    "compression",
    "memorisation",
    "parity",
    "permutation_s3",
    "permutation_s5",
    "needle",
)
"""Generated tasks that a training stream may hold."""
LONGER_TASKS = ("needle_2x", "needle_4x")
"""Scored at multiples of the training length; learnt as `needle`."""
OWN_TASKS = (*STREAM_TASKS, *LONGER_TASKS, "cloze")
"""Benchmarks of this project; all others are names of lm-eval's own task library."""
MOST_OWN_ITEMS = 10_000
"""Items of one of the project's own tasks at most: the standard error of an accuracy is then 0.5 points or less, and a
profile that takes whole benchmarks of the hub asks for more than any text gives."""
MOST_IDS = 1 << 16
"""Token ids that a file of tokens (uint16) tells apart."""
LONGEST_CONTEXT = 2048
"""Tokens of a context that scoring keeps."""
LEAST_EPS = 1e-30
"""What is added to a divisor must not vanish in float32."""


class Spec(StrictModel):
    """One section of a profile. No number in it is infinite or NaN."""

    model_config = ConfigDict(allow_inf_nan=False)


class ModelSpec(Spec):
    """The language model around the mixer; widths in features."""

    hidden_size: int = Field(ge=8)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    ffn: int = Field(ge=1, description="SwiGLU width of the baseline (DeltaNet); a candidate's is fitted to equal size")
    vocab: int = Field(ge=300, le=MOST_IDS, description="token ids; files of tokens hold 16 bits of each")
    tied: bool = True
    mode: str = "chunk1"
    expand_k: float = Field(1.0, gt=0)
    expand_v: float = Field(1.0, gt=0)
    use_beta: bool = True
    use_gate: bool = False
    use_output_norm: bool = True
    use_short_conv: bool = True
    conv_size: int = Field(4, ge=1)
    qk_norm: str = "l2"
    qk_activation: str = "silu"
    norm_eps: float = Field(1e-5, ge=LEAST_EPS, lt=1)
    tolerance: float = Field(
        0.005, gt=0, lt=0.2, description="largest relative difference of total parameters to the baseline"
    )

    @model_validator(mode="after")
    def _whole_heads(self) -> ModelSpec:
        if self.hidden_size % self.heads:
            raise ValueError(f"model.heads must divide model.hidden_size, got {self.heads} and {self.hidden_size}")
        return self

    def mixer_arguments(self, layer: int) -> dict[str, Any]:
        """Keywords that the block passes to the mixer of layer `layer`, in the published contract."""
        return {
            "mode": self.mode,
            "hidden_size": self.hidden_size,
            "expand_k": self.expand_k,
            "expand_v": self.expand_v,
            "num_heads": self.heads,
            "use_gate": self.use_gate,
            "use_beta": self.use_beta,
            "use_short_conv": self.use_short_conv,
            "use_output_norm": self.use_output_norm,
            "conv_size": self.conv_size,
            "qk_norm": self.qk_norm,
            "qk_activation": self.qk_activation,
            "norm_eps": self.norm_eps,
            "layer_idx": layer,
        }


class DataSpec(Spec):
    """Where text comes from, and how it is cut."""

    source: Literal["docstrings", "fineweb", "shards"] = Field(
        "docstrings", description="packages' docstrings, a dataset of the hub, or shards made by training/prepare.py"
    )
    train: list[str] = Field([], description="packages whose docstrings are trained on")
    heldout: list[str] = Field([], description="packages whose docstrings are held out")
    dataset: str = Field("", description="Hugging Face dataset and configuration, as NAME:CONFIG")
    shards: str = Field("", description="folder of the shards")
    tokenizer: str = Field("bpe", description="bpe: trained on the training text; else a name on the Hugging Face hub")
    train_chars: int = Field(ge=10_000, description="characters of training text kept, the same share of every package")
    heldout_chars: int = Field(ge=5_000, description="characters of held-out text kept")
    order: Literal["random", "epochs"] = Field(
        "random", description="windows at random places, or each window once an epoch, shuffled anew every epoch"
    )

    @model_validator(mode="after")
    def _packages(self) -> DataSpec:
        if self.source == "docstrings":
            wrong = [name for name in self.heldout if name not in HELD_OUT_PACKAGES]
            if wrong or not self.heldout:
                raise ValueError(
                    f"data.heldout must name packages out of {', '.join(HELD_OUT_PACKAGES)}, got {self.heldout}"
                )
            if not self.train or set(self.train) & set(self.heldout):
                raise ValueError(f"data.train must name packages that are not held out, got {self.train}")
        elif self.source == "shards" and not self.shards:
            raise ValueError("data.source = 'shards' needs data.shards, the folder that training/prepare.py wrote")
        elif self.source == "fineweb" and ":" not in self.dataset:
            raise ValueError(f"data.dataset must read NAME:CONFIG, got {self.dataset!r}")
        return self


class TaskSpec(Spec):
    """Generated task sequences that are mixed into the training text."""

    share: float = Field(0.0, ge=0, lt=1, description="share of the training rows that hold task sequences")
    names: list[str] = Field(
        list(FIRST_TASKS), min_length=1, description=f"tasks in these rows, out of {', '.join(STREAM_TASKS)}"
    )
    symbols: int = Field(64, ge=16, description="special symbols in the vocabulary")
    recall_pairs: int = Field(8, ge=2)
    copy_items: int = Field(6, ge=2)
    copy_length: int = Field(24, ge=4)
    induction_length: int = Field(20, ge=4)
    cloze_context: int = Field(40, ge=4, description="words before the gap")
    cloze_span: int = Field(2, ge=1, description="words in the gap")
    choices: int = Field(4, ge=2)
    mad_pairs: int = Field(4, ge=2, description="pairs of the recall tasks of MAD, items to compress, facts asked for")
    mad_length: int = Field(24, ge=8, description="tokens of MAD's in-context and noisy recall")
    state_length: int = Field(8, ge=1, description="longest word of parity, permutation_s3 and permutation_s5")
    needle_length: int = Field(64, ge=20, description="longest sequence of the needle task in training")

    @property
    def wider(self) -> bool:
        """Whether the vocabulary holds the markers of the wider set of tasks."""
        return any(name not in FIRST_TASKS for name in self.names)

    @model_validator(mode="after")
    def _fits(self) -> TaskSpec:
        unknown = [name for name in self.names if name not in STREAM_TASKS]
        if unknown or len(set(self.names)) < len(self.names):
            raise ValueError(f"tasks.names must be different ones of {', '.join(STREAM_TASKS)}, got {self.names}")
        least = 3 * max(self.mad_pairs, self.choices + 2)
        if self.wider and self.symbols < least:
            raise ValueError(f"tasks.symbols must be at least {least} for the tasks named, got {self.symbols}")
        if self.mad_length < 4 * self.mad_pairs:
            raise ValueError(
                f"tasks.mad_length must be at least 4 x tasks.mad_pairs = {4 * self.mad_pairs}, got {self.mad_length}"
            )
        need = max(2 * self.recall_pairs, 2 * self.choices, self.copy_items, self.induction_length)
        if self.symbols < need:
            raise ValueError(f"tasks.symbols must be at least {need} for these task sizes, got {self.symbols}")
        if self.copy_length < self.copy_items:
            raise ValueError(
                f"tasks.copy_length must be at least tasks.copy_items = {self.copy_items}, got {self.copy_length}"
            )
        return self


_Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSpec(Spec):
    """Optimisation. Rates are for AdamW; lengths in optimiser steps."""

    steps: int = Field(ge=2)
    batch: int = Field(ge=1, description="sequences a step")
    seq_len: int = Field(ge=16)
    lr: float = Field(gt=0, le=1)
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: int = Field(0, ge=0)
    decay: int = Field(0, ge=0, description="steps of linear decay at the end of wsd")
    final_lr: float = Field(0.1, ge=0, le=1, description="share of the peak rate at the last step")
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, ge=LEAST_EPS, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)
    report_every: int = Field(10, ge=1)
    micro_batch: int | None = Field(None, ge=1, description="sequences a forward pass; unset: the whole batch")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-normaliser of the logits; 0: none")
    aux_loss: float = Field(
        0.0, ge=0, description="weight of the auxiliary value that a mixer returns second; 0: dropped, as published"
    )
    recompute: bool = Field(False, description="activation checkpointing: compute blocks again in the backward pass")

    @model_validator(mode="after")
    def _decays(self) -> TrainSpec:
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                "train.lr x train.weight_decay must be below 1, or a step turns the sign of every weight, "
                f"got {self.lr:g} x {self.weight_decay:g}"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq_len


class CheckpointSpec(Spec):
    """When a run's state is kept. Without either interval there are no checkpoints."""

    steps: int | None = Field(None, ge=1, description="a checkpoint every so many steps")
    seconds: float | None = Field(None, gt=0, description="a checkpoint every so many seconds")
    last: int = Field(2, ge=1, description="checkpoints that stay while the run goes on")
    stable: list[float] = Field(
        [], description="shares of wsd's stable phase at whose end a checkpoint is kept, to extend or decay from"
    )

    @model_validator(mode="after")
    def _shares(self) -> CheckpointSpec:
        if any(not 0 < share <= 1 for share in self.stable):
            raise ValueError(f"checkpoint.stable must hold shares in (0, 1], got {self.stable}")
        return self

    @property
    def on(self) -> bool:
        return self.steps is not None or self.seconds is not None


class EvalSpec(Spec):
    """What the scorer measures."""

    heldout_sequences: int = Field(ge=4)
    validation_every: int | None = Field(
        None, ge=1, description="steps between two validation losses while a run trains; unset: none"
    )
    validation_sequences: int = Field(8, ge=1, description="held-out sequences of the validation loss, never scored")
    benchmarks: list[str]
    items: int = Field(
        ge=8, le=1_000_000, description=f"items a benchmark; of the project's own tasks at most {MOST_OWN_ITEMS:,}"
    )
    audit_gain: float = Field(
        0.02, gt=0, description="forged gain, in nats a token, that the audit finds with 99 % probability"
    )

    @model_validator(mode="after")
    def _once(self) -> EvalSpec:
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise ValueError(f"eval.benchmarks must be different, got {self.benchmarks}")
        return self

    @property
    def own_items(self) -> int:
        """Items of each of the project's own tasks."""
        return min(self.items, MOST_OWN_ITEMS)


class SearchSpec(Spec):
    """Constants of the search at this scale."""

    cold_start: int = Field(ge=0)
    update_batch: int = Field(ge=1)
    calibration_seeds: int = Field(ge=1)
    measured_clip: bool = Field(True, description="clip widths from measured seed noise; else 0.1")


class LimitSpec(Spec):
    """Limits of one training job."""

    seconds: float = Field(gt=0, description="wall seconds of training and scoring")
    cpu_seconds: float = Field(gt=0)
    memory_mb: int = Field(ge=256)


def task_lengths(tasks: TaskSpec) -> dict[str, int]:
    """Most tokens of one sequence of each generated task, marker and end included."""
    recalled = dict.fromkeys(("context_recall", "noisy_recall"), tasks.mad_length + 1)
    tracked = dict.fromkeys(("parity", "permutation_s3", "permutation_s5"), tasks.state_length + 5)
    return {
        "recall": 6 * tasks.recall_pairs + 3,
        "copying": tasks.copy_length + tasks.copy_items + 3,
        "induction": 2 * tasks.induction_length + 2,
        **recalled,
        "fuzzy_recall": 8 * tasks.mad_pairs + 3,
        "compression": 3 * tasks.mad_pairs + 3,
        "memorisation": 2 * tasks.mad_pairs + 2,
        **tracked,
        "needle": tasks.needle_length + 1,
    }
