"""Verifies programs by running them in the sandbox: `python training/check.py FILE... [--json]`.

Small version: `python training/check.py training/architectures/delta_net.py` (about 6 s).
Exit status: 0 all accepted, 1 one or more refused, 2 a fault of ours or a file that cannot be read (accepted is null).
A folder, a pipe, a device, a very long file and one that is no text can be no programs: they are refused.
With --json one object a line, one for each FILE in order; otherwise a table for each, with a counterexample for what
failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from common.process import end_on_interrupt

    end_on_interrupt()

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import AsiError, UsageError
from common.process import end_on_closed_pipe, exit_with_parent, raise_on_interrupt
from common.records import CheckOutcome, CheckReport
from common.settings import Settings, parse, usage_exit
from common.text import printable
from training.checking import run_checks
from training.profiles import Profile, load_profile
from training.programs import NotAProgramError, Program, load
from training.reports import counterexample_lines

__all__ = ["check_files", "main"]

OnReport = Callable[[CheckReport], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    exit_with_parent()
    parser = argparse.ArgumentParser(prog="check.py", description="Verify programs by running them in the sandbox.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="program files, each with a class DeltaNet")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of tables")
    parser.add_argument(
        "--trust", action="store_true", help="you have read them: run them without a real sandbox if there is none"
    )
    parser.add_argument(
        "--profile", help="at whose sizes they are also tried: a name, or a TOML file (default: run.profile)"
    )
    parser.add_argument("--reference", action="store_true", help="programs outside the search: cost is a warning")
    try:
        settings, arguments = parse(parser, argv, sections=("sandbox", "check"))
        profile = load_profile(arguments.profile or settings.run.profile)
    except UsageError as error:
        return usage_exit(error)
    show = _print_json if arguments.json else _Tables().show
    raise_on_interrupt()
    try:
        how = {"trust": arguments.trust, "reference": arguments.reference}
        reports = check_files(arguments.files, settings, profile, show, **how)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return end_on_closed_pipe()
    if any(report.accepted is None for report in reports):
        return 2
    return 0 if all(report.accepted for report in reports) else 1


def check_files(
    files: Sequence[str],
    settings: Settings,
    profile: Profile,
    on_report: OnReport | None = None,
    *,
    trust: bool = False,
    reference: bool = False,
) -> list[CheckReport]:
    """Verifies `files`, two at a time.

    Args:
        profile: whose sizes they are also tried at.
        on_report: called with each report in the order of `files`, as soon as those before it are there.

    Returns:
        One report a file. A file that cannot be read, or a fault of ours, gives accepted None and an error.
    """
    reports: list[CheckReport | None] = [None] * len(files)
    programs: list[tuple[int, Program]] = []
    for index, name in enumerate(files):
        try:
            programs.append((index, load(name, trust=trust, reference=reference)))
        except NotAProgramError as error:
            static = CheckOutcome(name="static", passed=False, detail=str(error))
            reports[index] = CheckReport(program=name, accepted=False, checks=[static])
        except UsageError as error:
            reports[index] = CheckReport(program=name, accepted=None, checks=[], error=str(error))
    told = 0

    def tell() -> None:
        nonlocal told
        while told < len(files) and (report := reports[told]) is not None:
            told += 1
            if on_report is not None:
                on_report(report)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "report":
            index, program = programs[event["index"]]
            reports[index] = CheckReport(**{**event["report"], "program": program.name})
            tell()
        elif event["event"] == "sandbox" and event["note"]:
            print(f"note: {event['note']}", file=sys.stderr)

    tell()
    failure = ""
    if programs:
        try:
            device = "cuda" if settings.training.device == "cuda" else "cpu"
            run_checks([program for _, program in programs], settings, profile, device, on_event)
        except AsiError as fault:
            failure = str(fault)
    for index, name in enumerate(files):
        if reports[index] is None:
            missing = failure or "the scorer did not report it"
            reports[index] = CheckReport(program=name, accepted=None, checks=[], error=missing)
    tell()
    return [report for report in reports if report is not None]


def _print_json(report: CheckReport) -> None:
    value: dict[str, Any] = {"program": report.program, "accepted": report.accepted}
    value["checks"] = [check.model_dump() for check in report.checks]
    value["facts"] = report.facts
    if report.error is not None:
        value["error"] = report.error
    print(json.dumps(value), flush=True)


class _Tables:
    """Prints a report as a table, and what failed with its counterexample."""

    def __init__(self) -> None:
        from common.console import PipedConsole

        self.console = PipedConsole(soft_wrap=False, width=None if sys.stdout.isatty() else 120)

    def show(self, report: CheckReport) -> None:
        from rich.markup import escape
        from rich.table import Table

        verdict = {True: "[green]accepted[/]", False: "[red]refused[/]", None: "[yellow]no verdict[/]"}[report.accepted]
        self.console.print(f"\n[bold]{escape(report.program)}[/]: {verdict}")
        if report.error:
            self.console.print(f"error: {escape(printable(report.error))}")
        if not report.checks:
            return
        table = Table("check", "verdict", "s", "detail", box=None, pad_edge=False)
        for check in report.checks:
            seconds = "" if check.seconds is None else f"{check.seconds:.1f}"
            table.add_row(check.name, _verdict(check), seconds, escape(printable(check.detail)))
        self.console.print(table)
        for check in report.checks:
            if not check.passed and check.counterexample:
                self.console.print(f"counterexample of {check.name}:")
                for line in counterexample_lines(check):
                    self.console.print(f"  {escape(printable(line))}", highlight=False)
        if report.facts:
            known = {key: value for key, value in report.facts.items() if value is not None and value != []}
            facts = ", ".join(f"{key} {value}" for key, value in known.items())
            self.console.print(f"measured: {escape(facts)}", highlight=False)


def _verdict(check: CheckOutcome) -> str:
    if check.passed:
        return "[green]pass[/]"
    return "[red]refuse[/]" if check.severity == "refuse" else "[yellow]warn[/]"


if __name__ == "__main__":
    sys.exit(main())
