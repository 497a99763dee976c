"""A check report as text: for the debugger's prompt, a log, a person at a terminal. Torch-free."""

from __future__ import annotations

from typing import Any

from common.records import CheckOutcome, CheckReport

__all__ = ["counterexample_lines", "failure_text"]


def failure_text(report: CheckReport) -> str:
    """What failed, refusals first, each with its counterexample; empty when nothing failed."""
    if report.error:
        return f"no verdict on {report.program}: {report.error}"
    found = [check for check in report.checks if not check.passed]
    found.sort(key=lambda check: check.severity != "refuse")
    return "\n".join(_block(check) for check in found)


def _block(check: CheckOutcome) -> str:
    lines = [f"{check.name} {'refuses' if check.severity == 'refuse' else 'warns'}: {check.detail}"]
    return "\n".join([*lines, *(f"  {line}" for line in counterexample_lines(check))])


def counterexample_lines(check: CheckOutcome) -> list[str]:
    """The counterexample, one `key: value` a line; tables and long texts are indented below their key."""
    lines = []
    for key, value in (check.counterexample or {}).items():
        lines += _lines(key, value)
    return lines


def _lines(key: str, value: Any) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [f"{key}:", *("  " + "  ".join(f"{name} {item}" for name, item in row.items()) for row in value)]
    text = str(value).rstrip()
    return [f"{key}: {text}"] if "\n" not in text else [f"{key}:", *("  " + line for line in text.splitlines()[-12:])]
