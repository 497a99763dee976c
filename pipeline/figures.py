"""Figures of a run: training curves, progress, exploration tree, benchmarks, mechanism usage.

Each is drawn from plain rows, so a report needs neither a service nor a database. A figure whose data is missing is
left out. Error bars are one standard error, as the runs report them.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import write_atomic
from common.records import Baseline
from pipeline.figure_curves import draw_curves
from pipeline.figure_parts import (
    BLACK,
    GREY,
    HIGHLIGHTED,
    LABELLED,
    LIGHT,
    PALETTE,
    ReportRow,
    best_rows,
    experiments,
    loss_title,
    new_figure,
    put_legend,
    short_name,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ReportRow", "draw_all"]

DPI = 110


def draw_all(rows: Sequence[ReportRow], baseline: Baseline, out: Path) -> list[Path]:
    """Draws every figure that has data into `out` as PNG and returns the files, in reading order.

    Raises:
        StoreError: `out` cannot be written.
    """
    drawers: dict[str, Callable[[Sequence[ReportRow], Baseline], Figure | None]] = {
        "progress": _progress,
        "training_curves": draw_curves,
        "benchmarks": _benchmarks,
        "tree": _tree,
        "mechanisms": _mechanisms,
    }
    ordered = sorted(rows, key=lambda row: row.index)
    paths = []
    for name, draw in drawers.items():
        figure = draw(ordered, baseline)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI)
            path = out / f"{name}.png"
            write_atomic(path, buffer.getvalue())
            paths.append(path)
    return paths


def _progress(rows: Sequence[ReportRow], baseline: Baseline) -> Figure | None:
    """Held-out loss and score against experiment number, with the best so far."""
    found = [(number, row) for number, row in enumerate(experiments(rows), 1) if row.loss or row.score is not None]
    if not found:
        return None
    figure, (top, bottom) = new_figure(8.5, 6.5, f"Search progress, profile {baseline.profile}", nrows=2, sharex=True)
    losses = [(number, row.loss) for number, row in found if row.loss is not None]
    numbers = [number for number, _ in losses]
    values = [loss.value for _, loss in losses]
    top.errorbar(
        numbers,
        values,
        yerr=[loss.se or 0.0 for _, loss in losses],
        fmt="o",
        color=PALETTE[0],
        markersize=5,
        elinewidth=1,
        label="experiment ± SE",
    )
    top.step(numbers, _running(values, min), where="post", color=PALETTE[1], label="best so far")
    top.axhline(baseline.loss, color=BLACK, linewidth=1, label=f"{baseline.program}, {len(baseline.seeds)} seed(s)")
    if baseline.loss_sd is not None:
        top.axhspan(
            baseline.loss - baseline.loss_sd,
            baseline.loss + baseline.loss_sd,
            color=LIGHT,
            alpha=0.5,
            linewidth=0,
            label="± SD over seeds",
        )
    top.set_ylabel(f"{loss_title(rows)} (nats a token)")
    scores = [(number, row.score) for number, row in found if row.score is not None]
    if scores:
        at, points = [number for number, _ in scores], [score for _, score in scores]
        bottom.plot(at, points, "o", color=PALETTE[0], markersize=5)
        bottom.step(at, _running(points, max), where="post", color=PALETTE[1])
    else:
        bottom.text(0.5, 0.5, "nothing is scored yet", transform=bottom.transAxes, ha="center", color=GREY)
    bottom.set_ylabel("score")
    bottom.set_xlabel("experiment")
    whole_numbers(bottom.xaxis)
    put_legend(figure, top, 4)
    return figure


def _running(values: Sequence[float], choose: Callable[[float, float], float]) -> list[float]:
    result: list[float] = []
    for value in values:
        result.append(choose(result[-1], value) if result else value)
    return result


def _benchmarks(rows: Sequence[ReportRow], baseline: Baseline) -> Figure | None:
    """Accuracy by task of the roots and the best experiments, with standard errors and chance."""
    shown = [row for row in rows if row.parent is None and row.run and row.run.benchmarks][:3]
    roots = len(shown)
    shown += [row for row in best_rows(rows, HIGHLIGHTED) if row.run and row.run.benchmarks]
    tasks = list(dict.fromkeys(task for row in shown if row.run for task in row.run.benchmarks))
    if not tasks:
        return None
    figure, (panel,) = new_figure(max(7.0, 1.6 + 1.1 * len(tasks)), 4.8, f"Benchmarks, profile {baseline.profile}")
    width = 0.82 / len(shown)
    for number, row in enumerate(shown):
        assert row.run is not None
        scores = [(place, row.run.benchmarks[task]) for place, task in enumerate(tasks) if task in row.run.benchmarks]
        root = number < roots
        panel.bar(
            [place + (number - (len(shown) - 1) / 2) * width for place, _ in scores],
            [score.value for _, score in scores],
            width * 0.94,
            yerr=[score.se or 0.0 for _, score in scores],
            color=(BLACK, GREY, LIGHT)[number] if root else PALETTE[(number - roots) % len(PALETTE)],
            error_kw={"elinewidth": 1, "ecolor": GREY if root and number == 0 else BLACK},
            label=row.name if root else f"{row.index} {short_name(row.name)}",
        )
    chances = {task: row.run.benchmarks[task].chance for row in shown if row.run for task in row.run.benchmarks}
    guessed = [(place, chance) for place, task in enumerate(tasks) if (chance := chances.get(task)) is not None]
    for number, (place, chance) in enumerate(guessed):
        label = "" if number else "chance"
        panel.hlines(chance, place - 0.45, place + 0.45, PALETTE[1], "--", linewidth=1.2, label=label)
    names = [task if task in baseline.tasks else f"{task}\n(not in the mean)" for task in tasks]
    panel.set_xticks(range(len(tasks)), names, fontsize=9)
    panel.set_ylabel("accuracy ± SE")
    panel.set_ylim(0, None)
    put_legend(figure, panel, 3)
    return figure


def _tree(rows: Sequence[ReportRow], baseline: Baseline) -> Figure | None:
    """Who was evolved from whom, coloured by score: roots on the left, one column a generation."""
    if not experiments(rows):
        return None
    places = _layout(rows)
    generations = 1 + max(depth for depth, _ in places.values())
    leaves = 1 + max(height for _, height in places.values())
    named = len(rows) <= LABELLED
    height = min(40.0, max(3.6, 1.4 + (0.42 if named else 0.16) * leaves))
    width = max(7.0, min(24.0, (3.0 if named else 1.6) * generations + 1.6))
    figure, (panel,) = new_figure(width, height, f"Exploration tree, profile {baseline.profile}")
    for row in rows:
        depth, place = places[row.index]
        parent = places.get(row.parent) if row.parent is not None else None
        if parent is not None and parent[0] < depth:
            panel.plot([parent[0], depth], [parent[1], place], color=LIGHT, linewidth=1, zorder=1)
    size = 70 if named else 26
    scored = [row for row in rows if row.score is not None]
    bare = [row for row in rows if row.score is None]
    panel.scatter(*_at(bare, places), s=size, c="white", edgecolors=GREY, zorder=2)
    if scored:
        shades = [row.score or 0.0 for row in scored]
        dots = panel.scatter(
            *_at(scored, places), s=size, c=shades, cmap="viridis", edgecolors=BLACK, linewidths=0.5, zorder=3
        )
        figure.colorbar(dots, ax=panel, label="score (white: none)", shrink=0.8, pad=0.01)
    if len(rows) <= 10 * LABELLED:
        for row in rows:
            depth, place = places[row.index]
            label = f"{row.index} {short_name(row.name, 26)}" if named else str(row.index)
            letters = 8 if named else 5
            panel.annotate(label, (depth, place), (6, 0), textcoords="offset points", va="center", fontsize=letters)
    panel.set_xticks(range(generations))
    panel.set_xlim(-0.3, generations - 1 + (0.95 if named else 0.4))
    panel.set_ylim(leaves - 0.4, -0.6)
    panel.set_yticks([])
    panel.grid(visible=False)
    panel.spines["left"].set_visible(False)
    panel.set_xlabel("generation")
    return figure


def _at(rows: Sequence[ReportRow], places: dict[int, tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [places[row.index][0] for row in rows], [places[row.index][1] for row in rows]


def _layout(rows: Sequence[ReportRow]) -> dict[int, tuple[int, float]]:
    """Index -> (generation, height): leaves one below the other, a parent midway between its children.

    An element whose parent is not among the rows, or not older than itself, is laid out as a root.
    """
    known = {row.index for row in rows}
    children: dict[int | None, list[int]] = {}
    for row in rows:
        parent = row.parent if row.parent in known and row.parent is not None and row.parent < row.index else None
        children.setdefault(parent, []).append(row.index)
    depths: dict[int, int] = {}
    order: list[int] = []
    stack = [(index, 0) for index in reversed(children.get(None, []))]
    while stack:
        index, depth = stack.pop()
        depths[index] = depth
        order.append(index)
        stack += [(child, depth + 1) for child in reversed(children.get(index, []))]
    heights: dict[int, float] = {}
    leaves = [index for index in order if index not in children]
    heights.update({index: float(number) for number, index in enumerate(leaves)})
    for index in reversed(order):
        if index in children:
            heights[index] = statistics.fmean((heights[children[index][0]], heights[children[index][-1]]))
    return {index: (depths[index], heights[index]) for index in order}


def _mechanisms(rows: Sequence[ReportRow], baseline: Baseline) -> Figure | None:
    """How often each mechanism was used, and the losses of the experiments that used it."""
    used: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for row in experiments(rows):
        for mechanism in dict.fromkeys((row.run.design or {}).get("mechanisms", ()) if row.run else ()):
            counts[mechanism] = counts.get(mechanism, 0) + 1
            if row.loss:
                used.setdefault(mechanism, []).append(row.loss.value - baseline.loss)
    if not counts:
        return None
    names = sorted(counts, key=lambda name: (counts[name], name))
    figure, (left, right) = new_figure(
        9.5, max(2.8, 1.6 + 0.32 * len(names)), f"Mechanisms, profile {baseline.profile}", ncols=2, sharey=True
    )
    places = range(len(names))
    left.barh(places, [counts[name] for name in names], color=PALETTE[0], height=0.7)
    left.set_yticks(places, names, fontsize=9)
    left.set_xlabel("experiments that use it")
    whole_numbers(left.xaxis)
    for place, name in zip(places, names, strict=True):
        differences = used.get(name, [])
        right.plot(differences, [place] * len(differences), "o", color=PALETTE[5], alpha=0.7, markersize=4)
        if differences:
            right.plot(statistics.fmean(differences), place, "|", color=PALETTE[1], markersize=13, markeredgewidth=2)
    right.axvline(0, color=BLACK, linewidth=1)
    right.set_xlabel(f"{loss_title(rows)} minus baseline's: each, and mean (left is better)", fontsize=9)
    for panel in (left, right):
        panel.grid(axis="y", visible=False)
        panel.grid(axis="x", color="#eeeeee", linewidth=0.8)
    return figure
