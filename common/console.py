"""A console of rich whose command ends as others do when whoever reads it is gone."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console

from common.process import end_on_closed_pipe

__all__ = ["PipedConsole"]


class PipedConsole(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Rich's ends with status 1, which says something else of our commands."""
        self.quiet = True
        raise SystemExit(end_on_closed_pipe())
