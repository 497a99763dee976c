"""What the figures share: the rows they are drawn from, colours, an empty canvas, which rows stand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.records import Measurement, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "GREY",
    "HIGHLIGHTED",
    "LABELLED",
    "LIGHT",
    "PALETTE",
    "ReportRow",
    "best_rows",
    "experiments",
    "loss_title",
    "new_figure",
    "put_legend",
    "short_name",
    "whole_numbers",
]

BLACK, GREY, LIGHT = "#222222", "#8a8a8a", "#d0d0d0"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, told apart by people with any colour vision."""
HIGHLIGHTED = 5
"""Experiments drawn in colour, by score; the others are grey."""
LABELLED = 40
"""Up to so many nodes of the tree carry their name; larger ones their index, up to ten times as many."""


@dataclass(frozen=True)
class ReportRow:
    """One stored element. A root of the search has no parent and counts as a baseline in the figures."""

    index: int
    name: str
    parent: int | None
    change: str
    run: RunRecord | None
    score: float | None
    verdict: str
    analysis_excerpt: str

    @property
    def loss(self) -> Measurement | None:
        return self.run.loss if self.run else None


def loss_title(rows: Sequence[ReportRow]) -> str:
    """What the losses of a run are: all of them come from one trainer."""
    return next((row.run.loss_name for row in rows if row.run is not None), "held-out loss")


def new_figure(width: float, height: float, title: str, **grid: Any) -> tuple[Figure, list[Axes]]:
    # A Figure of its own, not pyplot's: no display, no state shared with whoever imports this.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    panels = figure.subplots(squeeze=False, **grid).ravel().tolist()
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#eeeeee", linewidth=0.8)
        panel.set_axisbelow(True)
    return figure, panels


def put_legend(figure: Figure, panel: Axes, columns: int) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def whole_numbers(axis: XAxis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def short_name(name: str, length: int = 34) -> str:
    bare = name.removeprefix("delta_net_") or name
    return bare if len(bare) <= length else bare[: length - 1] + "…"


def experiments(rows: Sequence[ReportRow]) -> list[ReportRow]:
    return [row for row in rows if row.parent is not None]


def best_rows(rows: Sequence[ReportRow], count: int) -> list[ReportRow]:
    """The experiments with the highest scores; by loss where nothing is scored."""
    scored = [row for row in experiments(rows) if row.score is not None]
    if scored:
        return sorted(scored, key=lambda row: -(row.score or 0.0))[:count]
    return sorted((row for row in experiments(rows) if row.loss), key=lambda row: row.loss.value if row.loss else 0)[
        :count
    ]
