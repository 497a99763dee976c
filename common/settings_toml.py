"""The resolved settings as TOML, without secrets."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr

from common.settings import Settings

__all__ = ["dump_toml"]


def dump_toml(settings: Settings) -> str:
    """The resolved settings as TOML that `--config` reads back: what was set, and every default as a comment.

    Defaults are comments so that reading the file back sets no more than was set; secrets, and addresses with a name
    or password in them, are left out.
    """
    lines = ["# The settings of this run, as resolved. Commented keys were not set: their defaults are shown."]
    for section in type(settings).model_fields:
        values = getattr(settings, section)
        lines.append(f"\n[{section}]")
        for key in type(values).model_fields:
            value = getattr(values, key)
            if isinstance(value, SecretStr) or _holds_password(value):
                lines.append(f"# {key} is secret")
            elif value is None:
                lines.append(f"# {key} is unset")
            else:
                lines.append(f"{'' if key in values.model_fields_set else '# '}{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _holds_password(value: Any) -> bool:
    """Whether a URL says who asks: scheme://user:password@host."""
    return isinstance(value, str) and "://" in value and "@" in value.split("://", 1)[1].split("/", 1)[0]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
