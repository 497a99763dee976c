"""What a person sees while it happens: one line a stage with its time, and a live line for each training run.

On a terminal the training lines redraw in place; anything else gets plain lines, one every few seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from common.console import PipedConsole
from common.text import printable
from training.launcher import Event

__all__ = ["Console", "make_console"]

WIDE = 150
"""Columns of a line that no terminal bounds."""
PLAIN_SECONDS = 5.0
"""Between two progress lines of one job where lines cannot redraw."""


def make_console() -> RichConsole:
    """A console on stdout; where no terminal says how wide it is, wide enough for the tables."""
    width = None if sys.stdout.isatty() else WIDE
    return PipedConsole(file=sys.stdout, highlight=False, soft_wrap=True, width=width)


class Console:
    """Thread-safe: several experiments write at the same time."""

    def __init__(self) -> None:
        self._rich = make_console()
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()
        if self._rich.is_terminal:
            columns = (TextColumn("  {task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"))
            self._live = Progress(*columns, console=self._rich, transient=True)
            self._live.start()

    def line(self, who: str, stage: str, text: str, seconds: float | None = None) -> None:
        """One finished stage: who it concerns, what came out, how long it took."""
        took = f" [dim]{seconds:.1f} s[/dim]" if seconds is not None else ""
        with self._lock:
            self._rich.print(
                f"[bold]{escape(printable(who)):<14}[/bold] {escape(stage):<9} {escape(printable(text))}{took}"
            )

    def note(self, text: str) -> None:
        with self._lock:
            self._rich.print(escape(printable(text)))

    def progress(self, who: str, event: Event) -> None:
        """Shows a training or corpus event: step, loss, tokens/s, time left."""
        if event.kind == "note":
            self.line(who, "note", event.text)
            return
        if event.kind != "progress":
            return
        note = _describe(event)
        with self._lock:
            if self._live is not None:
                if who not in self._tasks:
                    self._tasks[who] = self._live.add_task(
                        escape(f"{who} {event.name}"), total=event.steps or None, note=""
                    )
                self._live.update(self._tasks[who], completed=event.step or 0, total=event.steps or None, note=note)
                return
            clock = time.monotonic()
            if clock - self._last.get(who, 0.0) >= PLAIN_SECONDS:
                self._last[who] = clock
                self._rich.print(f"{who:<14} {escape(event.name):<9} {escape(printable(note))}")

    def done(self, who: str) -> None:
        """Takes the live line of `who` away."""
        with self._lock:
            task = self._tasks.pop(who, None)
            self._last.pop(who, None)
            if self._live is not None and task is not None:
                self._live.remove_task(task)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show_cursor(self) -> None:
        """Gives a terminal its cursor back without any lock, for an end that waits for nobody."""
        if self._rich.is_terminal:
            os.write(sys.stdout.fileno(), b"\x1b[?25h")

    @property
    def rich(self) -> RichConsole:
        return self._rich


def _describe(event: Event) -> str:
    parts = []
    if event.step is not None:
        parts.append(f"step {event.step}/{event.steps}" if event.steps else f"step {event.step}")
    if event.loss is not None:
        parts.append(f"loss {event.loss:.3f}")
    if event.tokens_per_second is not None:
        parts.append(f"{event.tokens_per_second / 1000:.1f}k tokens/s")
    if event.seconds_left is not None:
        parts.append(f"{event.seconds_left:.0f} s left")
    if event.text:
        parts.append(event.text)
    return ", ".join(parts)
