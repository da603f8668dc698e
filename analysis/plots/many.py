"""Figures of a collection of adapters: the tree of members beside their overlaps, and curves of common directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.plots import style
from analysis.plots.text import literal, name_text

if TYPE_CHECKING:
    from analysis.many import CollectionTables

NAMED = 60
"""Members whose names fit beside the rows; of more, only clusters are named."""
ROW = 0.13
"""Height of a row with a name in inches."""


@literal
def plot_dendrogram(tables: CollectionTables) -> Figure:
    """The tree of members by principal angles, and the overlap of every pair in the order of the tree.

    Merges are drawn at their distance ``√(1 − overlap)``. Clusters have colours, merges beyond the cut (dashed line)
    are grey. The colour scale of overlaps starts at the mean of chance.
    """
    count, order = len(tables.names), tables.tree.order
    named = count <= NAMED
    height = 1.0 + (ROW * count if named else 5.0)
    figure = Figure(figsize=(7.2, max(2.4, height)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.15), sharey=True)
    _draw_tree(left, tables)
    style.plain(left, x="distance √(1 − overlap)", grid=False)
    left.spines["left"].set_visible(False)
    left.tick_params(axis="y", length=0)
    grid = tables.overlap[np.ix_(order, order)].copy()
    np.fill_diagonal(grid, np.nan)
    upper = np.triu_indices(count, 1)
    low = float(np.nanmean(tables.chance[upper]))
    image: Any = {"cmap": "cividis", "interpolation": "nearest", "extent": (0, count, count, 0), "aspect": "auto"}
    right.set_facecolor(style.MISSING)
    mesh = right.imshow(grid, vmin=low, vmax=max(float(np.nanmax(grid)), 1.05 * low), **image)
    right.spines[:].set_visible(False)
    right.set_xticks([])
    right.tick_params(length=0)
    right.set_xlabel("the same members", fontsize=style.TEXT, color=style.INK)
    style.color_bar(mesh, right, f"overlap of {tables.side} subspaces (chance {low:.2g})")
    if named:
        names = [name_text(tables.names[member]) for member in order]
        left.set_yticks(np.arange(count) + 0.5, names, fontsize=5.5)
    else:
        _name_clusters(left, tables)
    left.set_ylim(count, 0)
    return figure


def _draw_tree(axes: Axes, tables: CollectionTables) -> None:
    """Draw the merges, in the colour of their cluster where all members below are of one."""
    tree, count = tables.tree, len(tables.names)
    row = np.empty(count)
    row[tree.order] = np.arange(count) + 0.5
    centres, heights = list(row), [0.0] * count
    clusters: list[int] = [int(number) for number in tree.clusters]
    lines: list[list[tuple[float, float]]] = []
    colors: list[str] = []
    for a, b, height, _ in tree.linkage:
        first, second = int(a), int(b)
        points = [(heights[first], centres[first]), (height, centres[first]), (height, centres[second])]
        lines.append([*points, (heights[second], centres[second])])
        same = clusters[first] == clusters[second] != 0
        colors.append(style.PALETTE[(clusters[first] - 1) % len(style.PALETTE)] if same else style.FAINT)
        centres.append((centres[first] + centres[second]) / 2)
        heights.append(float(height))
        clusters.append(clusters[first] if same else 0)
    axes.add_collection(LineCollection(lines, colors=colors, linewidths=0.9))
    # from the right: names stand beside the leaves, next to their rows of overlaps
    axes.set_xlim(0, 1.02 * max(heights))
    if tree.cut:
        axes.axvline(tree.cut, color=style.INK, linewidth=0.8, linestyle=(0, (3, 2)))


def _name_clusters(axes: Axes, tables: CollectionTables) -> None:
    """Name every cluster beside the middle of its rows, with its number of members."""
    numbers = tables.tree.clusters[tables.tree.order]
    found = [(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers[numbers > 0])]
    large = [(number, rows) for number, rows in found if len(rows) >= len(numbers) / 60]
    names = [f"cluster {number} ({len(rows)})" for number, rows in large]
    axes.set_yticks([float(rows.mean()) + 0.5 for _, rows in large], names, fontsize=style.SMALL)


@literal
def plot_common_directions(curves: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of the energy of all members' updates in the best k common directions, one line per layer.

    `curves` is the table of `CollectionTables`. Dotted lines are members with the same spectra in random directions,
    drawn once per number of inputs (or outputs). A line far above the dotted one means that members share directions.

    Raises:
        ValueError: the table is empty.
    """
    if curves.empty:
        raise ValueError("no curve was measured: give curves= a number above 0, or a larger memory budget")
    axes = style.new_axes(ax, 2.6)
    for position, (width, rows) in enumerate(curves.groupby("width", sort=True)):
        color, _ = style.style_of("", position)
        layers = list(rows.groupby("layer", sort=False))
        name = f"{len(layers)} layers" if len(layers) > 1 else "1 layer"
        for index, (_, points) in enumerate(layers):
            label = f"{name} of width {width}" if index == 0 else None
            axes.plot(points["directions"], points["share"], color=color, linewidth=1.0, alpha=0.7, label=label)
        points = layers[0][1]
        dots: Any = {"color": color, "linewidth": 1.2, "linestyle": (0, (1, 1.5))}
        axes.plot(points["directions"], points["random_share"], label=f"random, width {width}", **dots)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.5, 0.8, 0.95], ["0", "50 %", "80 %", "95 %"])
    style.plain(axes, x="common directions", y="share of the energy")
    style.axes_legend(axes, own=ax is None)
    return axes
