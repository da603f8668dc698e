"""Figures of interference: matrices of tasks, principal angles, leakage."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from analysis.adapters.adapter_set import AdapterSet
from analysis.plots import style
from analysis.plots.text import literal, name_text
from analysis.statistics.nulls import angle_band
from analysis.tables.components import principal_angles
from analysis.tables.interference import interference_table
from analysis.tables.titles import TITLES

SIGNED = ("alignment", "activation_alignment")
LOWEST = 1e-16
"""Lower end of the scale of leakage: smaller values are rounding of float64."""


@literal
def plot_interference(
    interference: AdapterSet | pd.DataFrame,
    *,
    metric: str = "alignment",
    layer: str = "total",
    ax: Axes | None = None,
) -> Axes:
    """One interference metric as a matrix of tasks, for one layer or for all layers together.

    `interference` is an AdapterSet or its `interference_table`. Overlaps start at 0 with chance marked on the scale;
    alignments are symmetric about 0. Metrics with a direction have the earlier task in the column.

    Raises:
        ValueError: the table has no such metric, or not in this layer.
    """
    table = interference_table(interference) if isinstance(interference, AdapterSet) else interference
    chosen = table[(table["metric"] == metric) & (table["layer"] == layer)]
    if chosen.empty:
        raise ValueError(f"no {metric!r} of layer {layer!r}; the metrics are {style.unique(table['metric'])}")
    grid = chosen.pivot(index="task_b", columns="task_a", values="value")
    if metric == "leakage":
        grid = grid.loc[style.unique(chosen["task_b"])]
    else:
        tasks = style.unique(pd.concat([chosen["task_a"], chosen["task_b"]]))
        symmetric = metric in ("alignment", "input_overlap", "output_overlap")
        grid = (grid.combine_first(grid.T) if symmetric else grid).reindex(index=tasks, columns=tasks)
    values = grid.to_numpy(dtype=float)
    known = chosen["chance"].dropna()
    peak = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))  # a ratio to nothing is infinite
    chance = float(known.mean()) if len(known) else 0.0
    # A scale no finer than chance (or a cosine of 0.05): what is far below it should not look dramatic.
    top = max(peak, 0.05 if metric in SIGNED else 2 * chance) or 1.0
    norm = Normalize(-top if metric in SIGNED else 0.0, top)
    rows, columns = values.shape
    axes = style.new_axes(ax, 0.9 + 0.3 * rows, style.grid_width(columns))
    form = ".0e" if metric == "leakage" else ("z.2f" if peak >= 0.1 else "z.3f")
    colors = "RdBu_r" if metric in SIGNED else "cividis"
    mesh = style.heat(axes, values, norm, colors, form=form if columns <= 10 else None)
    style.label_columns(axes, list(grid.columns))
    style.label_rows(axes, list(grid.index))
    bar = style.color_bar(mesh, axes, TITLES.get(metric, metric))
    if metric not in SIGNED and 0 < chance < 0.94 * top:
        low = [] if chance < 0.06 * top else [(0.0, "0")]  # labels closer than this would touch
        ticks = dict([*low, (chance, f"chance {chance:.2g}"), (top, f"{top:.2g}")])
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
        bar.ax.axhline(chance, color=style.PALETTE[1], linewidth=1.5)
    return axes


@literal
def plot_principal_angles(
    angles: AdapterSet | pd.DataFrame,
    *,
    side: str = "input",
    layer: str | None = None,
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Principal angles (degrees) of every pair of tasks, against the band of random subspaces.

    One line per pair of tasks: of one `layer`, or the median over the layers whose widths and ranks are the most
    common. The band holds `level` of each angle for two subspaces drawn at random.

    Raises:
        ValueError: there is no such side or layer, or only one task.
    """
    table = principal_angles(angles) if isinstance(angles, AdapterSet) else angles
    chosen = table[table["side"] == side]
    if layer is not None:
        chosen = chosen[chosen["layer"] == layer]
    if chosen.empty:
        raise ValueError(f"no principal angles of side {side!r}{f' in layer {layer!r}' if layer else ''}")
    sizes = chosen.groupby(["width", "rank_a", "rank_b"]).size()
    n, a, b = (int(number) for number in sizes.index[int(sizes.to_numpy().argmax())])
    chosen = chosen[(chosen["width"] == n) & (chosen["rank_a"] == a) & (chosen["rank_b"] == b)]
    axes = style.new_axes(ax, 2.4)
    low, middle, high = (np.degrees(part) for part in angle_band(n, a, b, level=level))
    index = np.arange(1, len(middle) + 1)
    band = f"random, {level:.0%}"
    axes.fill_between(index, low, high, color=style.FAINT, alpha=0.35, linewidth=0, label=band, zorder=0)
    axes.plot(index, middle, color=style.FAINT, linewidth=1.0, zorder=1)
    pairs = list(chosen.groupby(["task_a", "task_b"], sort=False))
    for position, ((task_a, task_b), pair) in enumerate(pairs):
        median = np.degrees(pair.groupby("index")["angle"].median())
        color, marker = style.style_of("", position)
        line: dict[str, Any] = {"color": color, "marker": marker, "markersize": 2.5, "linewidth": 1.2}
        if len(pairs) > 6:
            line = {"color": style.PALETTE[0], "linewidth": 0.8, "alpha": 0.6}
        name = f"{name_text(task_a)}, {name_text(task_b)}" if len(pairs) <= 6 else None
        axes.plot(median.index, median, label=name, **line)
    if len(pairs) > 6:
        axes.lines[-1].set_label(f"{len(pairs)} pairs of tasks")
    axes.set_ylim(0, 93)
    axes.set_yticks([0, 30, 60, 90])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    style.plain(axes, x=f"index of the principal angle, {side} spaces in R^{n}", y="angle (degrees)")
    style.axes_legend(axes, own=ax is None)
    return axes


@literal
def plot_leakage(
    interference: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    palette: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Share of each task's update that acts on the subspace protected before it, over the tasks, logarithmic.

    Takes the table of one run, or of several by name. Lines are all layers together, bands go from the
    lowest to the highest layer, the dotted line is what a random update would leak.

    Raises:
        ValueError: a table has no leakage: nothing was protected.
    """
    tables = dict(interference) if isinstance(interference, Mapping) else {"": interference}
    axes = style.new_axes(ax, 2.2)
    names: list[str] = []
    for position, (label, table) in enumerate(tables.items()):
        rows = table[table["metric"] == "leakage"]
        if rows.empty:
            name = f" of {label!r}" if label else ""
            raise ValueError(f"the table{name} has no leakage: give interference_table a protected subspace")
        total = rows[rows["layer"] == "total"].set_index("task_b")
        layers = rows[rows["layer"] != "total"].groupby("task_b", sort=False)["value"]
        names = list(dict.fromkeys([*names, *total.index]))
        steps = [names.index(task) for task in total.index]
        color, marker = style.style_of(label, position, palette)
        low, high = (end.reindex(total.index).clip(lower=LOWEST) for end in (layers.min(), layers.max()))
        axes.fill_between(
            steps, low, high, color=color, alpha=0.15 if len(tables) <= style.CROWD else 0.05, linewidth=0
        )
        line: dict[str, Any] = {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.4}
        axes.plot(steps, total["value"].clip(lower=LOWEST), label=name_text(label) if label else "all layers", **line)
        chance = "random update" if position == 0 else None
        axes.plot(steps, total["chance"], color=style.INK, linewidth=1.0, linestyle=(0, (1, 1.5)), label=chance)
    axes.set_yscale("log")
    axes.set_ylim(top=1.5)
    style.log_scale(axes)
    style.label_columns(axes, names, offset=0.0)
    style.plain(axes, y="leakage (share of energy)")
    axes.grid(axis="y", color=style.MISSING, linewidth=0.6)
    axes.tick_params(labelsize=style.SMALL)
    style.axes_legend(axes, own=ax is None)
    return axes
