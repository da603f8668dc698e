"""Figure of leading directions against random factors."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.adapters.adapter_set import AdapterSet
from analysis.plots import style
from analysis.plots.text import literal, name_text
from analysis.tables.noise import noise_table


@literal
def plot_noise(noise: AdapterSet | pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The spike ``σ₁² / mean(σ²)`` of every layer in the order of the model, one colour per task.

    `noise` is an AdapterSet or its `noise_table`. Dashes are the 95 % quantile for random factors of that shape. Points
    are filled where at least one direction is beyond noise, and open elsewhere.

    Raises:
        ValueError: no update has a law, such as differences of checkpoints.
    """
    table = noise_table(noise) if isinstance(noise, AdapterSet) else noise
    table = table[table["p"].notna()]
    if table.empty:
        raise ValueError("no update is a product of two factors of rank 2 or more: there is no law to compare with")
    layers = {layer: place for place, layer in enumerate(style.unique(table["layer"]), start=1)}
    axes = style.new_axes(ax, 2.4)
    size = 16 if len(layers) <= 60 else 7
    tasks = style.unique(table["task"])
    shift = np.linspace(-0.25, 0.25, len(tasks)) if len(tasks) > 1 else np.zeros(1)
    for position, task in enumerate(tasks):
        rows = table[table["task"] == task]
        color, marker = style.style_of(task, position)
        x = rows["layer"].map(layers).to_numpy(dtype=float) + shift[position]
        sure = (rows["beyond"] > 0).to_numpy(dtype=bool)
        faces = np.where(sure, color, "none")
        axes.scatter(x, rows["spike"], s=size, c=faces, edgecolors=color, marker=marker, linewidths=0.8, zorder=2)
        axes.hlines(rows["high"], x - 0.3, x + 0.3, color=style.INK, linewidth=0.9, zorder=1)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), max(high, 3.0))
    style.log_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlim(0.4, len(layers) + 0.6)
    style.plain(axes, x="layer, in the order of the model", y="σ₁² / mean of σ²")
    points: dict[str, Any] = {"color": "none", "markersize": 4}
    handles = [
        Line2D([], [], marker=mark, markerfacecolor=color, markeredgecolor=color, label=name_text(task), **points)
        for position, task in enumerate(tasks[: style.CROWD])
        for color, mark in [style.style_of(task, position)]
    ]
    noise_line = Line2D([], [], color=style.INK, linewidth=0.9, label="95 % of random factors")
    if (table["beyond"] == 0).any():
        looks: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": style.INK, **points}
        handles.append(Line2D([], [], marker="o", label="open: not beyond noise", **looks))
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    axes.legend(handles=[*handles, noise_line], ncols=2, frameon=False, fontsize=style.SMALL, **above)
    return axes
