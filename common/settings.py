"""One settings object over the knobs of `common.knobs`, and where their values come from.

Precedence: flags, then environment (ASI_SECTION__KEY), then the TOML file (--config), then the default. A wrong
value stops the start with what was expected, what came, and the fix. `parse` builds the command line from the knobs,
so `--help` shows every one that the command reads.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from common.errors import SettingsError, UsageError
from common.files import read_regular
from common.knobs import (
    Analyse,
    Check,
    Cognition,
    Database,
    Embedding,
    Evolve,
    Llm,
    Monitor,
    Run,
    Sample,
    Sandbox,
    Section,
    Services,
    Training,
)
from common.text import encodes, printable

__all__ = ["Settings", "flags_of", "load", "parse", "path_argument", "usage_exit"]


class Settings(BaseSettings):
    """All settings, resolved."""

    model_config = SettingsConfigDict(extra="forbid", env_prefix="ASI_", env_nested_delimiter="__", frozen=True)

    run: Run = Run()
    services: Services = Services()
    database: Database = Database()
    cognition: Cognition = Cognition()
    embedding: Embedding = Embedding()
    sandbox: Sandbox = Sandbox()
    check: Check = Check()
    training: Training = Training()
    monitor: Monitor = Monitor()
    sample: Sample = Sample()
    evolve: Evolve = Evolve()
    analyse: Analyse = Analyse()
    llm: Llm = Llm()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, EnvSettingsSource(settings_cls))


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    sections: Sequence[str],
    short: Sequence[str] = (),
) -> tuple[Settings, argparse.Namespace]:
    """Adds a flag for every knob of `sections` to `parser`, parses `argv`, and resolves the settings.

    Args:
        parser: carries the command's own arguments (files, --out ...).
        sections: those that this command reads ("run"), or single knobs of one ("run.seed"); each knob becomes
            `--section.key`.
        short: knobs ("run.seed") that also get the short flag `--seed`.

    Raises:
        SettingsError: a flag, an environment variable or the TOML file is wrong.
    """
    parser.add_argument(
        "--config", type=path_argument, metavar="FILE", help="TOML file of settings, [section] and key as below"
    )
    groups: dict[str, Any] = {}
    for name in sections:
        section, _, only = name.partition(".")
        model = Settings.model_fields[section].annotation
        assert isinstance(model, type) and issubclass(model, Section)
        group = groups[section] = groups.get(section) or parser.add_argument_group(section)
        for key, field in model.model_fields.items():
            if only and key != only:
                continue
            names = [f"--{section}.{key}"]
            if f"{section}.{key}" in short:
                names.insert(0, f"--{key.replace('_', '-')}")
            many = get_origin(field.annotation) is list
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
            group.add_argument(
                *names,
                dest=f"{section}.{key}",
                default=argparse.SUPPRESS,
                nargs="+" if many else None,
                metavar="|".join(choices) if choices else key.upper(),
                help=f"{field.description} (default: {'unset' if field.default is None else field.default})".replace(
                    "%", "%%"
                ),
            )
    arguments = parser.parse_args(argv)
    flags: dict[str, dict[str, Any]] = {}
    for name, value in vars(arguments).items():
        if "." in name:
            section, key = name.split(".")
            flags.setdefault(section, {})[key] = value
    return load(arguments.config, flags), arguments


def path_argument(text: str) -> Path:
    """A path as argparse's `type`. "" is refused: it would mean the current folder, and mostly is an unset shell
    variable. So are bytes that are no UTF-8: no record could name the path."""
    if not text or not encodes(text):
        raise argparse.ArgumentTypeError(f"expected a path{' in UTF-8' if text else ''}, got {printable(text)!r}")
    return Path(text)


def flags_of(section: Section, name: str, leave_out: Collection[str] = ()) -> list[str]:
    """The explicitly set knobs of `section` as the flags that set them again in a child process. Secrets are left out:
    every user of the machine may read a command line."""
    flags: list[str] = []
    for key in sorted(section.model_fields_set - set(leave_out)):
        value = getattr(section, key)
        if value is not None and not isinstance(value, SecretStr):
            flags += [f"--{name}.{key}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def load(config: Path | None = None, flags: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
    """Resolves the settings from a TOML file, the environment and `flags` ({section: {key: value}}).

    Raises:
        SettingsError: with every wrong value named.
    """
    _refuse_unknown_environment()
    file = _read_toml(config) if config is not None else {}
    environment = EnvSettingsSource(Settings)()
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, label in ((file, f"in {config}"), (environment, "in the environment"), (flags or {}, "as a flag")):
        for section, keys in source.items():
            if not isinstance(keys, Mapping):
                raise SettingsError(
                    f"expected a table [{section}] {label}, got {keys!r}", f"write [{section}] and its keys below it"
                )
            for key, value in keys.items():
                merged.setdefault(section, {})[key] = value
                origin[f"{section}.{key}"] = label
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(item, origin) for item in error.errors()), _fix(config)) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_regular(path).decode())
    except OSError as error:
        raise SettingsError(
            f"cannot read the settings file {path}: {error.strerror}", "name an existing file in --config"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}", "correct the line that is named") from error


def _refuse_unknown_environment() -> None:
    for name in os.environ:
        section, separator, _ = name.removeprefix("ASI_").lower().partition("__")
        if name.startswith("ASI_") and separator and section not in Settings.model_fields and section != "test":
            raise SettingsError(
                f"environment variable {name}: there is no section {section!r}{_near(section, Settings.model_fields)}",
                "unset it, or correct its name; --help lists every setting",
            )
        meant = _missing_underscore(name)
        if meant:
            raise SettingsError(
                f"environment variable {name} would set nothing; did you mean {meant}?",
                f"rename it to {meant} (two underscores after the section), or unset it",
            )


def _missing_underscore(name: str) -> str | None:
    """ASI_SECTION__KEY for a variable ASI_SECTION_KEY, None for any other name."""
    words = name.removeprefix("ASI_").lower()
    for section, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        key = words.removeprefix(f"{section}_")
        if name.startswith("ASI_") and key != words and key in field.annotation.model_fields:
            return f"ASI_{section}__{key}".upper()
    return None


def _explain(item: Any, origin: Mapping[str, str]) -> str:
    where = ".".join(str(part) for part in item["loc"][:2])
    known = [label for name, label in origin.items() if name == where or name.startswith(f"{where}.")]
    label = f" {known[0]}" if known else ""
    if item["type"] == "extra_forbidden":
        section = Settings.model_fields.get(str(item["loc"][0]))
        if len(item["loc"]) == 1 or section is None or section.annotation is None:
            return f"{where}{label}: no such section{_near(str(item['loc'][0]), Settings.model_fields)}"
        return f"{where}{label}: no such setting{_near(str(item['loc'][1]), section.annotation.model_fields)}"
    expected = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}{label}: expected {expected}, got {item['input']!r}"


def _near(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"


def _fix(config: Path | None) -> str:
    return f"correct {config or 'the flag or variable'}; --help lists every setting with its default"


def usage_exit(error: UsageError) -> int:
    """Prints `error` as a command does and returns its exit status."""
    print(f"error: {printable(str(error))}", file=sys.stderr)
    return error.exit_code
