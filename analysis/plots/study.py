"""Figures of studies: backward transfer, cost, and both beside the trade-off."""

from collections.abc import Collection, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.plots import methods
from analysis.plots.labels import label_points
from analysis.plots.style import FAINT, INK, MISSING, SMALL, TEXT, new_axes, plain
from analysis.plots.text import literal, make_room, name_text
from analysis.plots.trade_off import draw_trade_off, label_trade_off
from analysis.studies import StudyResults

WIDE = (12.0, 4.2)
"""Size in inches of the figure of a study."""
WIDE_TEXT = 11.0
"""Points of its text: eleven pixels where the figure is 900 pixels wide."""
NARROW, NARROW_TEXT = 5.3, 10.0
"""Width and text of the narrow figure: ten pixels where it is 390 pixels wide."""
ALPHAS = (0.9, 0.35)
"""Of the bars of updates and of state."""


@literal
def plot_change(
    study: StudyResults, *, level: float = 0.95, highlight: Collection[str] = (), ax: Axes | None = None
) -> Axes:
    """Backward transfer (points) with the intervals of `StudyResults.summary`, one row per method, the best on top.

    Left of zero is forgetting. Colours and markers are those of `plot_trade_off`.

    Raises:
        ValueError: no cell is complete, or a highlighted label has none.
    """
    values = methods.method_values(study, level, highlight)
    axes = new_axes(ax, 0.7 + 0.19 * len(study.labels), 4.0)
    _draw_change(axes, study, values, _by_change(study, values), highlight, TEXT)
    methods.write_below(axes, methods.bars_note(study, level))
    return axes


@literal
def plot_differences(
    study: StudyResults,
    *,
    figure: str = "mfn",
    level: float = 0.95,
    highlight: Collection[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Differences from the reference in `figure` with the intervals of `StudyResults.paired`, the best on top.

    A forest plot: one row per method. Right of zero a method is better than the reference, in all figures but
    ``forgetting``. At the right edge stands the p of the t test, adjusted by Holm.

    Raises:
        ValueError: no cell is complete, the reference has none, no other method has one, or there is no such figure.
    """
    table = study.paired(figures=[figure], level=level)
    if table.empty:
        raise ValueError(f"the study {study.name!r} has no complete cell beside the reference's: nothing to compare")
    table = table.sort_values("difference", ascending=False)
    axes = new_axes(ax, 0.7 + 0.19 * len(table), 4.6)
    axes.axvline(0.0, color=FAINT, linewidth=0.8, zorder=0)
    values: list[methods.Triple] = [(0.0, np.nan, np.nan)]
    for position, row in enumerate(table.to_dict("records")):
        value = (row["difference"], row["low"], row["high"])
        look = methods.look_of(study, row["label"], highlight)
        methods.draw_point(axes, value, (position, np.nan, np.nan), look, TEXT)
        values.append(value)
        p = row["p_holm"]
        text = "–" if np.isnan(p) else f"{p:.3f}"
        beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": SMALL}
        axes.annotate(text, (1.0, position), xycoords=("axes fraction", "data"), color=INK, **beside)
    axes.annotate("p, Holm", (1.0, -0.9), xycoords=("axes fraction", "data"), color=INK, **beside)
    _rows(axes, list(table["label"]))
    plain(axes, x=f"{figure.upper()}: difference from {name_text(study.reference)} (points)", grid=False)
    axes.grid(axis="x", color=MISSING, linewidth=0.6)
    axes.set_xlim(*methods.limits(values))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    methods.set_text_size(axes, TEXT)
    methods.write_below(axes, methods.bars_note(study, level))
    return axes


@literal
def plot_cost(study: StudyResults, *, level: float = 0.95, highlight: Collection[str] = ()) -> Figure:
    """MFN against the minutes of learning and, where recorded, against the MB on disk.

    Minutes are preparation, training and finishing in the fastest cell, without evaluation. MB are all tasks' updates
    and the state carried from task to task. Colours, markers and cut bars are those of `plot_trade_off`.

    Raises:
        ValueError: no cell is complete, or a highlighted label has none.
    """
    values = methods.method_values(study, level, highlight)
    kinds = {"train_minutes": "learning (minutes)", "stored_mb": "stored (MB)"}
    known = {key: name for key, name in kinds.items() if any((label, key) in values for label in study.labels)}
    looks = {label: methods.look_of(study, label, highlight) for label in study.labels}
    figure = Figure(figsize=(4.2 * max(1, len(known)), 3.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(known)), squeeze=False)[0]
    for (key, name), axes in zip(known.items(), panels, strict=False):
        points = methods.points(study, values, key)
        for label, (x, y) in points.items():
            methods.draw_point(axes, x, y, looks[label], TEXT)
        axes.margins(0.12)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.set_ylim(*methods.limits([y for _, y in points.values()]))
        plain(axes, x=name, y="MFN (%)")
    if not known:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "no record says what it cost", ha="center", va="center", fontsize=TEXT, color=INK)
    figure.supxlabel(methods.bars_note(study, level), fontsize=SMALL, color=INK)
    make_room(figure)
    for key, axes in zip(known, panels, strict=False):
        points = methods.points(study, values, key)
        centres = [(x[0], y[0]) for x, y in points.values()]
        label_points(axes, list(points), centres, [looks[label].color for label in points])
    return figure


@literal
def plot_study(
    study: StudyResults, *, level: float = 0.95, highlight: Collection[str] = (), narrow: bool = False
) -> Figure:
    """A study in one wide figure: MFN against MFT, then one row per method with backward transfer and cost.

    The last panel stacks the updates (full colour) and the carried state (pale) on disk; "+ data" marks methods
    that also keep training examples. It is left out where no record says what is stored. A `narrow` figure has the
    first panel above the others, for a telephone.

    Raises:
        ValueError: no cell is complete, or a highlighted label has none.
    """
    values = methods.method_values(study, level, highlight)
    stored = any((label, "stored_mb") in values for label in study.labels)
    size = NARROW_TEXT if narrow else WIDE_TEXT
    figure, first, rows = (_stacked if narrow else _side_by_side)(stored, len(study.labels))
    order = _by_change(study, values)
    draw_trade_off(first, study, values, highlight, size)
    _draw_change(rows[0], study, values, order, highlight, size - 1)
    _draw_bars(rows[1], study, values, order, highlight, ("train_minutes",), "learning (minutes)", size - 1)
    if stored:
        _draw_bars(rows[2], study, values, order, highlight, ("updates_mb", "state_mb"), "stored (MB)", size - 1)
    for axes in rows[1:]:
        axes.set_yticks([])
    if narrow:
        for axes in rows:
            axes.set_xlabel(fill(axes.get_xlabel(), 17))
        rows[0].xaxis.set_major_locator(MaxNLocator(3))
    _key(figure, methods.bars_note(study, level), stored, size - 2, 1 if narrow else 3)
    make_room(figure)
    label_trade_off(first, study, values, highlight, size - 1)
    return figure


def _side_by_side(stored: bool, _: int) -> tuple[Figure, Axes, Sequence[Axes]]:
    figure = Figure(figsize=WIDE, layout=ConstrainedLayoutEngine(wspace=0.03))
    widths = [4.4, 2.6, 1.5, 1.7] if stored else [4.4, 3.0, 2.0]
    first, *rows = figure.subplots(1, len(widths), width_ratios=widths)
    return figure, first, rows


def _stacked(stored: bool, count: int) -> tuple[Figure, Axes, Sequence[Axes]]:
    heights = [3.4, 0.7 + 0.18 * max(count, 4)]
    figure = Figure(figsize=(NARROW, sum(heights) + 0.7), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    return figure, halves[0].subplots(), halves[1].subplots(1, 3 if stored else 2)


def _key(figure: Figure, bars: str, stored: bool, size: float, columns: int) -> None:
    """The legend of the bars, below all panels."""
    entries: list[tuple[Artist, str]] = []
    if stored:
        full, pale = (Patch(facecolor=FAINT, alpha=alpha, linewidth=0) for alpha in ALPHAS)
        entries = [(full, "stored: updates"), (pale, "state kept for the next task")]
    if bars:
        entries.append((Line2D([], [], color=FAINT, linewidth=1.0), bars.removeprefix("bars: ")))
    if entries:
        handles, names = zip(*entries, strict=True)
        words = [fill(name, 80 if columns == 1 else 200) for name in names]
        options: dict[str, Any] = {"loc": "outside lower right" if columns > 1 else "outside lower left"}
        figure.legend(handles, words, ncols=columns, fontsize=size, labelcolor="#666666", frameon=False, **options)


def _draw_change(
    axes: Axes, study: StudyResults, values: methods.Values, order: list[str], highlight: Collection[str], size: float
) -> None:
    axes.axvline(0.0, color=FAINT, linewidth=0.8, zorder=0)
    for position, label in enumerate(order):
        if (label, "bwt") in values:
            look = methods.look_of(study, label, highlight)
            methods.draw_point(axes, values[label, "bwt"], (position, np.nan, np.nan), look, size)
    _rows(axes, order)
    plain(axes, x="BWT: change since learned (points)", grid=False)
    axes.grid(axis="x", color=MISSING, linewidth=0.6)
    known = [values[label, "bwt"] for label in order if (label, "bwt") in values]
    axes.set_xlim(*methods.limits([*known, (0.0, np.nan, np.nan)]))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    methods.set_text_size(axes, size)


def _draw_bars(
    axes: Axes,
    study: StudyResults,
    values: methods.Values,
    order: list[str],
    highlight: Collection[str],
    figures: tuple[str, ...],
    name: str,
    size: float,
) -> None:
    beside: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": size - 1}
    longest = 0.0
    for position, label in enumerate(order):
        known = [values[label, figure][0] for figure in figures if (label, figure) in values]
        if len(known) < len(figures):
            axes.annotate("–", (0, position), **beside)
            continue
        color = methods.look_of(study, label, highlight).color
        for start, value, alpha in zip(np.cumsum([0.0, *known[:-1]]), known, ALPHAS, strict=False):
            axes.barh(position, value, left=float(start), height=0.6, color=color, alpha=alpha, linewidth=0)
        total = sum(known)
        longest = max(longest, total)
        text = f"{total:.0f}" if total >= 10 else f"{total:.1f}" if total >= 1 else f"{total:.2g}"
        if len(figures) > 1 and study.keeps_old_data(label):
            text += " + data"
        axes.annotate(text, (total, position), color=INK, **beside)
    _rows(axes, order)
    plain(axes, x=name, grid=False)
    axes.set_xlim(0.0, 1.5 * longest or 1.0)  # room for the numbers
    axes.xaxis.set_major_locator(MaxNLocator(3))
    methods.set_text_size(axes, size)


def _by_change(study: StudyResults, values: methods.Values) -> list[str]:
    """Labels by backward transfer, the best first; unknown ones last."""
    return sorted(study.labels, key=lambda label: -values.get((label, "bwt"), (-np.inf,) * 3)[0])


def _rows(axes: Axes, order: list[str]) -> None:
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_yticks(range(len(order)), [name_text(label) for label in order])
    axes.tick_params(axis="y", length=0)
