"""Every knob, declared once: its section, name, type, default and help.

`common.settings` puts the sections together and reads them from flags, environment and file.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from common.command_words import from_here
from common.strict import StrictModel, types_in
from common.text import encodes

__all__ = [
    "Analyse",
    "Check",
    "Cognition",
    "Database",
    "Embedding",
    "Evolve",
    "Llm",
    "Monitor",
    "Run",
    "Sample",
    "Sandbox",
    "Section",
    "Services",
    "Training",
]


class Section(StrictModel):
    """Paths are meant from where the command was typed."""

    @field_validator("*", mode="before")
    @classmethod
    def _usable_text(cls, value: Any, info: ValidationInfo) -> Any:
        """An empty path would silently mean the current folder: mostly it is an unset shell variable. Bytes that are no
        UTF-8 could not be written into any record."""
        given = value if isinstance(value, list) else [value]
        if Path in types_in(cls.model_fields[info.field_name or ""].annotation) and "" in given:
            raise ValueError("a path")
        if any(isinstance(item, str | Path) and not encodes(str(item)) for item in given):
            raise ValueError("text in UTF-8")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _from_here(cls, value: Any) -> Any:
        """Child processes run elsewhere."""
        if isinstance(value, Path):
            return value.expanduser().absolute()
        if isinstance(value, list):
            return [item.expanduser().absolute() if isinstance(item, Path) else item for item in value]
        return value


class Run(Section):
    data_dir: Path = Field(Path("runs/default"), description="folder that holds everything of a run")
    profile: str = Field(
        "cpu", description="name of a profile in training/profiles, or a path to a TOML file like them"
    )
    experiments: int | None = Field(None, ge=1, description="stop when so many experiments are stored; unset: for ever")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of sampling, design and training")
    parallel: int = Field(2, ge=1, le=64, description="experiments and baselines that run at the same time")
    seed_program: list[Path] = Field([], description="more programs to check, train and use as roots of the search")

    @field_validator("profile")
    @classmethod
    def _profile_from_here(cls, value: str) -> str:
        """A profile given by path stays the same file however it is written and wherever the run is resumed."""
        return str(Path(value).expanduser().resolve()) if value.endswith(".toml") or os.sep in value else value


class Services(Section):
    database_url: str | None = Field(None, description="architecture database to use; unset: start an embedded one")
    database_key: SecretStr | None = Field(
        None, description="key of that database; better set by ASI_SERVICES__DATABASE_KEY"
    )
    cognition_url: str | None = Field(None, description="cognition base to use; unset: start an embedded one")
    embedding_url: str | None = Field(None, description="embedding server to use; unset: start one when first needed")
    timeout: float = Field(30.0, gt=0, description="seconds to wait for an answer of a service")

    @field_validator("database_url", "cognition_url", "embedding_url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        """What is no URL would only be found out when the service is first asked. Compose files pass variables on that
        nobody set."""
        if not value:
            return None
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("a URL such as http://127.0.0.1:8001")
        return value


class Database(Section):
    host: str = Field("127.0.0.1", description="address the architecture database listens on")
    port: int = Field(8001, ge=0, le=65535, description="its port; 0 takes a free one")
    store: str = Field("sqlite:///database.sqlite", description="sqlite:///FILE or mongodb://HOST:PORT/DATABASE")
    candidate_capacity: int = Field(50, ge=1, description="size of the candidate set")
    cold_start: int = Field(200, ge=0, description="experiments that use the initial candidate set")
    update_batch: int = Field(50, ge=1, description="new elements that are merged into the candidate set at once")
    lock_timeout: float = Field(10.0, ge=0, description="seconds to wait for another process that holds the database")
    candidate_file: Path | None = Field(
        None, description="candidate file of the published service, taken over by a store without a candidate set"
    )
    exact_windows: int = Field(
        100_000, ge=0, description="windows of motivations up to which similar ones are found exactly; faster beyond"
    )
    api_key: SecretStr | None = Field(
        None,
        description="key that clients send to read and write; needed on any address but loopback; better set by "
        "ASI_DATABASE__API_KEY",
    )
    read_key: SecretStr | None = Field(
        None, description="another key, which only reads; better set by ASI_DATABASE__READ_KEY"
    )
    cors_origins: list[str] = Field([], description="origins of web pages that may ask, such as https://example.org")
    max_body_mb: int = Field(64, ge=1, description="largest body of a request; a line of an import may be as long")
    rate_limit: int = Field(6000, ge=0, description="requests a minute of one key, where keys are set; 0 for no limit")
    log_format: Literal["text", "json"] = Field("text", description="form of the log's lines")
    judge: Literal["rubric", "llm"] = Field(
        "rubric", description="who judges a design: a rubric over measured facts, or the model of the llm settings"
    )
    retry_seconds: float = Field(
        2.0,
        gt=0,
        description="seconds until an embedding server or a judge's endpoint that failed is asked again; a judge's that"
        " fails on, less and less often",
    )
    events_kept: int = Field(1_000_000, ge=1000, description="newest events kept for those who follow the database")

    @field_validator("api_key", "read_key")
    @classmethod
    def _empty_is_unset(cls, value: SecretStr | None) -> SecretStr | None:
        """Compose files pass variables on that nobody set."""
        return value if value is not None and value.get_secret_value() else None

    @field_validator("store")
    @classmethod
    def _store_from_here(cls, value: str) -> str:
        """The file is meant from where the command was typed, like every path."""
        scheme, separator, file = value.partition(":///")
        if scheme != "sqlite" or not file or file.startswith(":"):
            return value
        if "?" in file:
            # In such URLs elsewhere options begin there: taken for a name, it would open another file than was meant.
            raise ValueError("sqlite:///FILE without options or a question mark")
        return f"{scheme}{separator}{Path(file).expanduser().absolute()}"


class Cognition(Section):
    host: str = Field("127.0.0.1", description="address the cognition base listens on")
    port: int = Field(13142, ge=0, le=65535, description="its port; 0 takes a free one")
    retriever: Literal["embedded", "opensearch"] = Field("embedded", description="where passages are indexed and found")
    opensearch_url: str = Field("http://127.0.0.1:9200", description="OpenSearch node, for --retriever opensearch")
    corpus: Path | None = Field(None, description="folder of paper files; unset: the shipped cognition_base/cognition")
    index_dir: Path | None = Field(
        None, description="folder for the embedded index cache; unset: the user's cache folder"
    )


class Embedding(Section):
    threads: int = Field(1, ge=1, description="CPU threads of the embedding server")
    cache_size: int = Field(
        4096, ge=1, description="windows of text whose vectors the embedding server keeps in memory"
    )
    model: str | None = Field(
        None, description="sentence-transformers model, a folder or a name; unset: the packaged all-MiniLM-L6-v2"
    )
    timeout: float = Field(60.0, gt=0, description="seconds to wait for one answer of the embedding server")
    start_timeout: float = Field(120.0, gt=0, description="seconds the embedding server may take to start")

    @field_validator("model")
    @classmethod
    def _model_from_here(cls, value: str | None) -> str | None:
        """A folder is meant from where the command was typed; what is no folder is a name at the hub."""
        folder = Path(value).expanduser() if value else None
        return str(folder.absolute()) if folder is not None and folder.is_dir() else value


class Sandbox(Section):
    backend: Literal["auto", "bubblewrap", "docker", "process"] = Field(
        "auto",
        description="auto takes the first of bubblewrap, docker and process whose probe job succeeds",
    )
    image: str = Field(
        "asi-arch-worker",
        min_length=1,
        description="docker image of jobs: docker build --target worker -t IMAGE .",
    )
    memory_mb: int = Field(4096, ge=256, description="memory limit of one job on CPU")
    disk_mb: int = Field(1024, ge=1, description="limit of all that a job writes")


class Check(Section):
    operations: float = Field(
        64.0, gt=0, description="refuse a program that launches more operations per added token than this"
    )
    seconds: float = Field(
        180.0, gt=0, description="CPU seconds of all checks of one program; four times that by the clock"
    )
    call_seconds: float = Field(
        20.0, gt=0, description="CPU seconds of one of a program's hundred calls; four times that by the clock"
    )


class Training(Section):
    text: list[Path] = Field([], description="text files to train on instead of the docstring corpus")
    cache_dir: Path | None = Field(None, description="folder for the extracted corpus; unset: the user's cache folder")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU where there is one")
    processes: int = Field(
        1, ge=1, le=64, description="worker processes that share each batch, one a GPU; torchrun sets it for train.py"
    )
    deterministic: bool = Field(
        False, description="end a run at an operation that has no deterministic form on its device"
    )
    compile: bool = Field(
        False, description="on a GPU, train with torch.compile around the mixers: norms and feed-forward layers"
    )
    init: Literal["program", "fla"] = Field(
        "program", description="keep the program's own initialisation, or reset it to N(0, 0.02)"
    )
    keep_checkpoint: bool = Field(False, description="train.py leaves the last checkpoint in --out after scoring")
    keep_best: int = Field(5, ge=0, description="stored experiments, by score, whose last checkpoint stays")
    tensorboard: bool = Field(False, description="also write TensorBoard files into each run's folder")
    benchmarks: Literal["profile", "own"] = Field(
        "profile",
        description="score the benchmarks that the profile names, or the project's own tasks alone, which need no data "
        "of the Hugging Face hub",
    )
    wandb: Literal["off", "offline", "online"] = Field(
        "off",
        description="also write each run for Weights & Biases (pip install wandb): offline into the run's folder, "
        "online to its servers",
    )
    command: str | None = Field(
        None,
        description="your own training script in place of ours, such as 'bash train.sh {program} {seed} {out}' "
        "(docs/training.md). DANGER: it runs every candidate's code WITHOUT a sandbox, with your rights, and its "
        "numbers are taken as it reports them, unaudited",
    )
    command_seconds: float | None = Field(
        None, gt=0, description="wall seconds that training.command may take; unset: those of the profile's limits"
    )

    @field_validator("command", mode="before")
    @classmethod
    def _as_words(cls, value: Any) -> Any:
        """A list of words, as a TOML file may give it, is the same as one text."""
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            value = shlex.join(value)
        return from_here(value) if isinstance(value, str) else value


class Monitor(Section):
    slow_factor: float = Field(
        3.0, gt=1, description="end a run slower than the peers' median CPU time a step by this factor"
    )
    diverge_nats: float = Field(2.0, gt=0, description="end a run whose loss rises so far above its best")
    leak_margin: float = Field(
        0.25, gt=0, lt=1, description="end a run whose loss is below the best peer's by this share"
    )
    hopeless_after: float = Field(
        0.4, gt=0, le=1, description="share of the steps before which no run is ended as hopeless"
    )
    hopeless_spared: float = Field(
        0.1, ge=0, le=1, description="share of hopeless runs that go on, so that wrong endings are counted; 1: all"
    )
    stall_seconds: float = Field(120.0, gt=0, description="end a run that reports nothing for so long")


class Sample(Section):
    policy: Literal["ranks", "uniform"] = Field("ranks", description="how the parent and the references are chosen")
    parent_ranks: int = Field(10, ge=1, description="the parent comes from ranks 1 to this")
    reference_ranks: int = Field(50, ge=1, description="references come from the ranks after the parent's, to this")
    references: int = Field(4, ge=0, description="references shown to the planner")


class Evolve(Section):
    novelty_attempts: int = Field(10, ge=1, description="designs tried until one is new")
    check_attempts: int = Field(10, ge=1, description="rounds of checking and repair before training")
    debug_attempts: int = Field(3, ge=1, description="training attempts, each after the debugger repaired the last")
    neighbours: int = Field(5, ge=1, le=20, description="similar earlier motivations shown to the novelty checker")
    failure_wait: float = Field(
        0.0, ge=0, description="seconds to wait after a failed experiment; 60 in the published system"
    )


class Analyse(Section):
    cognition_k: int = Field(3, ge=1, le=50, description="papers asked of the cognition base for each analysis")
    cognition_threshold: float = Field(0.5, ge=0, le=1, description="lowest score of a paper that is used")


class Llm(Section):
    backend: Literal["offline", "openai"] = Field(
        "offline", description="offline designer, or any OpenAI-compatible endpoint"
    )
    base_url: str | None = Field(None, description="endpoint, such as http://localhost:8000/v1; unset: OpenAI's")
    model: str = Field("gpt-4.1", description="model name at the endpoint")
    api_key: SecretStr | None = Field(None, description="key of the endpoint; better set by ASI_LLM__API_KEY")
    output_mode: Literal["auto", "tool", "native", "prompted"] = Field(
        "auto", description="how structured answers are asked for"
    )
    timeout: float = Field(300.0, gt=0, description="seconds to wait for one answer")
    max_tokens: int = Field(16384, ge=256, description="longest answer")
    temperature: float | None = Field(None, ge=0, le=2, description="unset: the endpoint's default")
    retries: int = Field(3, ge=0, description="tries again after an unusable answer or a lost connection")
    backoff: float = Field(1.0, ge=0, description="seconds before the first retry; doubles each time, at most 60")
    api_version: str | None = Field(None, description="set for Azure: base_url is then the resource's endpoint")
    context_chars: int = Field(
        120_000, ge=4_000, description="longest prompt; programs of references are left out to keep it"
    )
    input_price: float | None = Field(
        None, ge=0, description="US dollars a million input tokens, for the cost in the record"
    )
    output_price: float | None = Field(None, ge=0, description="US dollars a million output tokens")
