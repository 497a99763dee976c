"""Figure of the training curves: the loss of training by step, and the validation loss where a profile measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.records import Baseline
from pipeline.figure_parts import (
    BLACK,
    HIGHLIGHTED,
    LIGHT,
    PALETTE,
    ReportRow,
    best_rows,
    new_figure,
    put_legend,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_curves"]


def draw_curves(rows: Sequence[ReportRow], baseline: Baseline) -> Figure | None:
    """Left the training loss of the whole run. Right, from half of the steps on and at a finer scale, the validation
    loss; where none was measured, the training loss."""
    curves = {row.index: _points(row.run.train_loss) for row in rows if row.run and len(row.run.train_loss) > 1}
    validated = {row.index: _points(row.run.validation_loss) for row in rows if row.run and row.run.validation_loss}
    if not curves:
        return None
    figure, panels = new_figure(11, 5.2, f"Training, profile {baseline.profile}", ncols=2)
    for panel, shown in zip(panels, (curves, validated or curves), strict=True):
        for row, style in _styles(rows):
            if row.index in shown:
                panel.plot(*shown[row.index], **style)
        panel.set_xlabel("step")
    _zoom(panels[1], validated or curves)
    panels[0].set_title("training loss, whole run", fontsize=10, loc="left")
    named = "validation loss" if validated else "training loss"
    panels[1].set_title(f"{named}, second half", fontsize=10, loc="left")
    panels[0].set_ylabel("mean loss since the previous point (nats)")
    put_legend(figure, panels[0], 3)
    return figure


def _styles(rows: Sequence[ReportRow]) -> list[tuple[ReportRow, dict[str, Any]]]:
    """The rows in the order they are drawn, the best and the roots last, and how each line looks."""
    best = [row.index for row in best_rows(rows, HIGHLIGHTED)]
    roots = [row.index for row in rows if row.parent is None]
    styles: list[tuple[ReportRow, dict[str, Any]]] = []
    for row in sorted(rows, key=lambda row: (row.index in best, row.parent is None)):
        style: dict[str, Any] = {"color": LIGHT, "linewidth": 0.8}
        if row.parent is None:
            line = ("-", "--", ":", "-.")[roots.index(row.index) % 4]
            style = {"color": BLACK, "linewidth": 1.8, "linestyle": line, "label": f"{row.name} (seed {_seed(row)})"}
        elif row.index in best:
            colour = PALETTE[best.index(row.index) % len(PALETTE)]
            style = {"color": colour, "linewidth": 1.5, "label": f"{row.index} {short_name(row.name)}"}
        styles.append((row, style))
    return styles


def _zoom(panel: Axes, curves: Mapping[int, tuple[list[int], list[float]]]) -> None:
    pairs = [pair for steps, losses in curves.values() for pair in zip(steps, losses, strict=True)]
    last = max(step for step, _ in pairs)
    late = [loss for step, loss in pairs if 2 * step >= last]
    margin = 0.08 * (max(late) - min(late)) or 0.05
    panel.set_xlim(last / 2, last)
    panel.set_ylim(min(late) - margin, max(late) + margin)


def _seed(row: ReportRow) -> str:
    return str(row.run.seed) if row.run else "?"


def _points(curve: Mapping[str, float]) -> tuple[list[int], list[float]]:
    pairs = sorted((int(step), loss) for step, loss in curve.items())
    return [step for step, _ in pairs], [loss for _, loss in pairs]
