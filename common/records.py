"""The records that cross process borders: measurements, check outcomes, runs, baselines.

Training writes them, the pipeline carries them, the database stores them. All are pydantic models; every number travels
with its n and standard error, and a missing number is None.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationInfo, field_validator

from common.strict import refuse_boolean, refuse_text

__all__ = [
    "Baseline",
    "BenchmarkScore",
    "CheckOutcome",
    "CheckReport",
    "Efficiency",
    "Forecast",
    "Measurement",
    "Reason",
    "RunRecord",
    "Status",
    "Usage",
]

Status = Literal["finished", "failed", "stopped"]
Reason = Literal[
    "refused",
    "crashed",
    "timeout",
    "memory",
    "forged",
    "diverged",
    "nan",
    "slow",
    "stalled",
    "leak",
    "hopeless",
    "interrupted",
]
_PLAIN = frozenset({int, float, type(None)})
"""Of which nothing is refused or replaced: most values of most records."""


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Programs write into errors and details what they like: what UTF-8 cannot hold is replaced, as no file could
        take it. A boolean is no number, nor is a text."""
        if type(value) in _PLAIN:
            return value
        refuse_boolean(cls, value, info)
        refuse_text(cls, value, info)
        return _storable(value)


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, list) else value


class Measurement(Record):
    """A mean over n items (or tokens) with its standard error; `se` is None when n < 2."""

    value: FiniteFloat
    n: int
    se: FiniteFloat | None = None


class BenchmarkScore(Measurement):
    """Accuracy of one benchmark task in [0, 1]. `chance` is the accuracy of guessing.

    `counted` is whether the task enters the profile's benchmark mean: a task on which no seed architecture
    is more than 2 SE above chance does not.
    """

    chance: FiniteFloat | None = None
    counted: bool = True
    bits_per_byte: Measurement | None = None
    """Of the correct answers of a multiple-choice task: signal where the accuracy is still at chance."""

    @property
    def not_above_chance(self) -> bool:
        """Whether this very score is not more than 2 standard errors above guessing: within them, or below."""
        return self.chance is not None and self.se is not None and self.value <= self.chance + 2 * self.se


class Efficiency(Record):
    """What a trained model costs to run, by clocks and counters of the host."""

    prefill: dict[str, Measurement] = {}
    """Length in tokens (as text) -> tokens a second of reading one sequence, n repeats."""
    decode: Measurement | None = None
    """Tokens a second of one sequence, token by token; None for a program that offers no `step`, or one that the
    verifier did not find equal to forward."""
    state_bytes: int | None = None
    """Of one mixer's decoding state for one sequence, where the verifier found that it decodes as in parallel."""
    peak_memory_mb: FiniteFloat | None = None
    """The most that the worker's processes held in training and prefill, as the host saw it."""


class CheckOutcome(Record):
    """One check of one program. `counterexample` is what a person or the debugger can act on."""

    name: str
    passed: bool
    severity: Literal["refuse", "warn"] = "refuse"
    detail: str = ""
    counterexample: dict[str, Any] | None = None
    seconds: FiniteFloat | None = None


class CheckReport(Record):
    """What the verifier says of one program. `accepted` is None only when the verifier itself failed (`error`)."""

    program: str
    accepted: bool | None
    checks: list[CheckOutcome]
    error: str | None = None
    facts: dict[str, Any] = {}
    """Measured on the way: mixer parameters, work exponents, FLOPs a token."""

    def refusals(self) -> list[CheckOutcome]:
        return [check for check in self.checks if not check.passed and check.severity == "refuse"]

    def why_refused(self) -> str:
        """Every failed check and its detail in one line, or the verifier's own error; "" for an accepted program."""
        return "; ".join(f"{check.name}: {check.detail}" for check in self.refusals()) or self.error or ""


class Forecast(Record):
    """Why a run was found hopeless: what earlier runs say of its end. `spared`: it was let through all the same."""

    step: int
    loss: FiniteFloat
    """Mean training loss of the column that ends at `step`."""
    predicted: FiniteFloat
    low: FiniteFloat
    """The held-out loss is above it with 97.5 % confidence."""
    threshold: FiniteFloat
    peers: int
    spared: bool


class Usage(Record):
    """Calls of a language model in one role: what they took. `index` is the element they led to, if one."""

    role: str
    model: str
    calls: int = Field(ge=0, le=2**53)
    failed: int = Field(0, ge=0, le=2**53)
    input_tokens: int = Field(0, ge=0, le=2**53)
    output_tokens: int = Field(0, ge=0, le=2**53)
    seconds: FiniteFloat = Field(0.0, ge=0, le=1e12)
    cost: FiniteFloat | None = Field(None, ge=0, le=1e12)
    """US dollars; None without prices."""
    index: int | None = Field(None, ge=1, le=2**63 - 1)


class RunRecord(Record):
    """result.json: one program, checked, trained and scored once. Written by training, stored with its element."""

    version: Literal[1] = 1
    run_id: str
    name: str
    profile: str
    seed: int
    status: Status
    reason: Reason | None = None
    detail: str = ""
    """Why, in one sentence, when status is not finished."""
    program_sha256: str
    fingerprint: str | None = None
    """Of the function that the program computes, equal for equal functions (docs/verifier.md); None where unknown."""
    baseline_key: str
    """(profile, corpus, tokenizer, seed programs, trainer, torch version, device type, dtype) as one hash."""
    trainer: Literal["own", "command"] = "own"
    """command: the user's own script trained and scored it (training.command). Its numbers are those it reported; no
    held-out loss was computed here, and nothing was audited."""
    reported: dict[str, FiniteFloat | None] = {}
    """Column of the test row -> value, as the user's script reported it; None for a missing one."""
    heldout_loss: Measurement | None = None
    """Nats a token on held-out text, computed by the scorer."""
    benchmarks: dict[str, BenchmarkScore] = {}
    benchmark_mean: Measurement | None = None
    perplexities: dict[str, Measurement] = {}
    """Task -> perplexity a word of its text (wikitext) or of its answers (lambada); no part of the mean. n counts
    documents or items."""
    train_loss: dict[str, FiniteFloat] = {}
    """Step (as text) -> mean training loss since the previous step listed."""
    validation_loss: dict[str, FiniteFloat] = {}
    """Step (as text) -> loss on a small fixed sample of held-out text, nats a token; no part of what is scored."""
    learning_curve: Measurement | None = None
    """Area under `validation_loss` over its steps, as a mean in nats a token; n is the number of its points."""
    task_curves: dict[str, Measurement] = {}
    """Generated task -> area under its share of right answers over the steps of the validation loss, 0 to 1: what a
    task that is learnt all at once says with less noise than its last value. n is the number of points."""
    parameters: int | None = None
    mixer_parameters: int | None = None
    ffn_width: int | None = None
    parameters_by_part: dict[str, int] = {}
    """embedding, head (0 where tied), mixers, mlps, norms."""
    init: str = ""
    """How weights began: as the program's own code made them, or reset (fla); empty in records of before."""
    training_flops_per_token: FiniteFloat | None = None
    """FLOPs of one training step a token: three times the forward pass of the whole model."""
    flops_per_token: FiniteFloat | None = None
    """Counted forward FLOPs of one mixer a token at the training length."""
    work_exponent: FiniteFloat | None = None
    tokens: int | None = None
    tokens_per_second: FiniteFloat | None = None
    efficiency: Efficiency | None = None
    seconds: dict[str, FiniteFloat] = {}
    """Wall seconds by phase: check, data (the stream of the seed), start, train, score (of which audit), and total of
    all; train_cpu: CPU seconds of training. Where the run went on from a checkpoint, train_earlier: the training until
    there, which train, train_cpu and total count too."""
    checks: list[CheckOutcome] = []
    sandbox: str = ""
    trust: str | None = None
    device: str = ""
    dtype: str = ""
    versions: dict[str, str] = {}
    hardware: dict[str, str | bool | int | float] = {}
    corpus_sha256: str = ""
    git_commit: str | None = None
    command: str = ""
    reference: bool = False
    forecast: Forecast | None = None
    """Set where the monitor found the run hopeless."""
    design: dict[str, Any] | None = None
    """How the program came about: operator, genome, mechanisms, what changed. Filled by the pipeline."""

    @property
    def loss(self) -> Measurement | None:
        """What a design is judged by: the held-out loss; of the user's own script the last training loss that it
        reported, as the published system has it (n = 1, no standard error)."""
        if self.trainer == "own" or not self.train_loss:
            return self.heldout_loss
        return Measurement(value=self.train_loss[max(self.train_loss, key=int)], n=1)

    @property
    def loss_name(self) -> str:
        """What `loss` is, for a person."""
        return "held-out loss" if self.trainer == "own" else "reported training loss"


class Baseline(Record):
    """What a candidate of one profile is compared with: the mean of DeltaNet over calibration seeds, on the same
    items."""

    key: str
    profile: str
    program: str = "delta_net"
    seeds: list[int]
    loss: FiniteFloat
    loss_sd: FiniteFloat | None
    benchmark: FiniteFloat | None
    benchmark_sd: FiniteFloat | None
    tasks: list[str]
    """Tasks that enter the benchmark mean of this profile."""
    sd_dof: int | None = None
    """Degrees of freedom of both SDs, which are pooled over the seed architectures; None where not of seeds."""
    loss_clip: FiniteFloat = 0.1
    benchmark_clip: FiniteFloat = 0.1
    parameters: int | None = None
    mixer_parameters: int | None = None
    """Of one mixer."""
    flops_per_token: FiniteFloat | None = None
