"""Figures of a training: measures of the adapters over the steps."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.plots import style
from analysis.plots.text import literal, name_text
from analysis.tables.titles import TITLES

PANELS = (
    "effective_rank_energy",
    "top1_energy",
    "frobenius",
    "input_overlap",
    "alignment",
    "backward",
    "leakage",
)
"""Measures that have a panel, where the log has them."""
HIGHEST_POINTS = 60
"""Measurements beyond which points have no markers."""


@literal
def training_panels(log: pd.DataFrame) -> Figure:
    """One panel per measure over the steps: all layers together, with a band over the layers.

    `log` is the table of `read_training_log`. Bands reach from the 10th to the 90th percentile of the layers. Measures
    of interference have a line per earlier task, and dotted lines for chance. Further numbers have a panel each.

    Raises:
        ValueError: the log has no row.
    """
    if log.empty:
        raise ValueError("the log has no measurement")
    known = [metric for metric in PANELS if (log["metric"] == metric).any()]
    further = [m for m in style.unique(log["metric"]) if m not in PANELS and "/" in m]
    titles = {metric: TITLES.get(metric, metric) for metric in [*known, *further]}
    columns = 3
    count = len(known) + len(further)
    rows = -(-count // columns)
    figure = Figure(figsize=(8.6, 0.5 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    for metric, axes in zip([*known, *further], grid, strict=False):
        _panel(axes, log[log["metric"] == metric])
        axes.set_title(name_text(titles[metric], 34), loc="left", fontsize=style.TEXT, color=style.INK)
        if metric == "leakage" or metric.endswith(("orthonormality", "protection")):
            axes.set_yscale("log" if (log.loc[log["metric"] == metric, "value"] > 0).all() else "linear")
    return figure


@literal
def plot_training(log: pd.DataFrame, *, metric: str, ax: Axes | None = None) -> Axes:
    """One measure over the steps, as a panel of `training_panels`.

    Raises:
        ValueError: the log has no such measure.
    """
    rows = log[log["metric"] == metric]
    if rows.empty:
        raise ValueError(f"the log has no {metric!r}; it has {', '.join(style.unique(log['metric']))}")
    axes = style.new_axes(ax, 2.4)
    _panel(axes, rows)
    axes.set_ylabel(name_text(TITLES.get(metric, metric), 34), fontsize=style.TEXT, color=style.INK)
    return axes


def _panel(axes: Axes, rows: pd.DataFrame) -> None:
    """The lines of one measure."""
    tasks = style.unique(rows["task"])
    for position, task in enumerate(tasks):
        part = rows[rows["task"] == task]
        color, marker = style.style_of("", position)
        total = part[part["layer"] == "total"].set_index("step").sort_index()
        layers = part[part["layer"] != "total"].groupby("step")["value"]
        if len(layers) and rows["metric"].iloc[0] != "frobenius":  # the norm of all layers is no mean of theirs
            low, high = layers.quantile(0.1), layers.quantile(0.9)
            axes.fill_between(low.index, low, high, color=color, alpha=0.15, linewidth=0)
        line: dict[str, Any] = {"color": color, "linewidth": 1.3, "markersize": 2.5}
        line["marker"] = marker if len(total) <= HIGHEST_POINTS else ""
        axes.plot(total.index, total["value"], label=name_text(task) if task else None, **line)
        if total["chance"].notna().any():
            axes.plot(total.index, total["chance"], color=color, linewidth=1.0, linestyle=(0, (1, 1.5)))
    style.plain(axes, x="step")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if len(tasks) > 1:
        axes.legend(frameon=False, fontsize=5.5, loc="best")
