"""Figures of spectra: lines of singular values, maps with one number per layer."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.adapters.adapter_set import AdapterSet
from analysis.names import place_of, short_names
from analysis.plots import style
from analysis.plots.text import literal, name_text
from analysis.tables.spectrum_table import singular_values, spectrum_table
from analysis.tables.titles import TITLES

LOWEST = 1e-8
"""Relative height below which singular values are rounding of float32 factors: the scale ends there."""


@literal
def plot_spectra(
    spectra: AdapterSet | pd.DataFrame,
    *,
    task: str | None = None,
    update: str = "task",
    label: str | None = None,
    color: str | None = None,
    marker: str = "o",
    fan: bool | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Singular values by index: the median over layers per task, or all layers of one `task`.

    Values are divided by ``‖ΔW‖_F / √r``, the height that all of them would have in a flat spectrum of the same
    norm. Bands go from the 10th to the 90th percentile of the layers. `spectra` is an AdapterSet or its table
    of `singular_values`. Zero updates are left out.

    `update` is ``"task"`` for what a task added, or ``"accumulated"`` for the sum up to it. `label`, `color` and
    `marker` describe the line of a single `task`. `fan` draws single layers, by default with `task`.

    Raises:
        ValueError: `update` is unknown, there is no such task, or every update is zero.
    """
    frame = _relative(_values(spectra), update)
    tasks = style.unique(frame["task"])
    if task is not None and task not in tasks:
        raise ValueError(f"no spectra of task {task!r}; there are {tasks}")
    if not tasks:
        raise ValueError("every update is zero: there is no spectrum to draw")
    axes = style.new_axes(ax, 2.4)
    for position, name in enumerate([task] if task is not None else tasks):
        (shown, mark), text = style.style_of(name, position), name_text(name)
        if task is not None:
            shown, mark, text = color or shown, marker, name_text(label) if label else ""
        rows = frame[frame["task"] == name]
        if fan or (fan is None and task is not None):
            for _, layer in rows.groupby("layer", sort=False):
                axes.plot(layer["index"], layer["value"], color=shown, linewidth=0.5, alpha=0.3, zorder=1)
        by_index = rows.groupby("index")["value"]
        low, middle, high = (by_index.quantile(q) for q in (0.1, 0.5, 0.9))
        axes.fill_between(middle.index, low, high, color=shown, alpha=0.15, linewidth=0)
        line: dict[str, Any] = {"marker": mark if len(middle) <= 32 else "", "markersize": 3, "linewidth": 1.4}
        axes.plot(middle.index, middle, color=shown, label=text or None, **line)
    axes.set_yscale("log")  # before the limits are read
    axes.autoscale(axis="y")  # also lines of an earlier call
    low_end, high_end = axes.get_ylim()
    axes.set_ylim(max(min(low_end, 0.3), LOWEST), max(high_end, 3.0))  # a decade at least: small slopes look small
    style.log_scale(axes)
    axes.axhline(1.0, color=style.FAINT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    style.plain(axes, x="index of the singular value", y="singular value / flat value")
    style.axes_legend(axes, own=ax is None)
    return axes


def _values(spectra: AdapterSet | pd.DataFrame) -> pd.DataFrame:
    return singular_values(spectra) if isinstance(spectra, AdapterSet) else spectra


def _relative(table: pd.DataFrame, update: str) -> pd.DataFrame:
    """Singular values divided by those of a flat spectrum of the same norm, without zero updates."""
    if update not in ("task", "accumulated"):
        raise ValueError(f"update is {update!r}, choose 'task' or 'accumulated'")
    frame = table[table["update"] == update]
    energy = frame["value"].pow(2).groupby([frame["task"], frame["layer"]]).transform("mean")
    kept = energy > 0
    return frame[kept].assign(value=frame["value"][kept] / energy[kept].pow(0.5))


@literal
def spectra_panels(
    sets: AdapterSet | pd.DataFrame | Mapping[str, AdapterSet | pd.DataFrame],
    *,
    update: str = "task",
    palette: Mapping[str, str] | None = None,
    columns: int = 3,
) -> Figure:
    """`plot_spectra` with one panel per task, `columns` in a row, and one line per set of adapters, on one scale.

    Raises:
        ValueError: the sets have different tasks, or `update` is unknown.
    """
    named = sets if isinstance(sets, Mapping) else {"": sets}
    tables = {label: _values(one) for label, one in named.items()}
    tasks = style.same_tasks({label: tuple(style.unique(table["task"])) for label, table in tables.items()})
    figure, drawn = style.panels(tasks, height=2.3, columns=columns)
    for position, (label, table) in enumerate(tables.items()):
        known = set(style.unique(_relative(table, update)["task"]))
        color, marker = style.style_of(label, position, palette)
        for task, axes in drawn.items():
            if task in known:
                kept = table[table["task"] == task]
                line: dict[str, Any] = {"color": color, "marker": marker, "label": label}
                plot_spectra(kept, task=task, update=update, fan=False, ax=axes, **line)
    filled = [axes for axes in drawn.values() if axes.lines]
    limits = np.array([axes.get_ylim() for axes in filled])
    for axes in filled:
        axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())
        style.log_scale(axes)
    style.share_names(figure, drawn, list(tables), x="index of the singular value", y="singular value / flat value")
    return figure


@literal
def plot_entropy_map(
    spectra: AdapterSet | pd.DataFrame,
    *,
    metric: str = "entropy_energy_normalized",
    update: str = "task",
    task: str | None = None,
    columns: Literal["module", "task"] = "module",
    ax: Axes | None = None,
) -> Axes:
    """One measure of the spectrum as a map: blocks by modules, or layers by tasks.

    `spectra` is an AdapterSet or its `spectrum_table`. Blocks by modules show one
    `task`, or the mean over tasks. Cells without an update, or with one that is zero, are grey.

    Raises:
        ValueError: the table has no such metric, update or task.
    """
    if columns not in ("module", "task"):
        raise ValueError(f"columns is {columns!r}, choose 'module' or 'task'")
    table = spectrum_table(spectra, zeros="omit") if isinstance(spectra, AdapterSet) else spectra
    chosen = table[(table["metric"] == metric) & (table["update"] == update)]
    if task is not None:
        chosen = chosen[chosen["task"] == task]
    if chosen.empty:
        more = f" and task {task!r}" if task is not None else ""
        raise ValueError(f"no metric {metric!r} of {update!r} updates{more}; there are {style.unique(table['metric'])}")
    layers = style.unique(chosen["layer"])
    if columns == "task":
        grid = chosen.pivot(index="layer", columns="task", values="value").loc[layers, style.unique(chosen["task"])]
        rows = short_names(layers)
    else:
        places = np.array([place_of(layer) for layer in chosen["layer"]])
        chosen = chosen.assign(row=places[:, 0], column=places[:, 1])
        grid = chosen.pivot_table(index="row", columns="column", values="value", sort=False)
        rows = short_names(list(grid.index))
        blocks = [row.rpartition(".")[2] for row in rows]
        rows = blocks if len(set(blocks)) == len(blocks) else rows
    values = grid.to_numpy(dtype=float)
    bounded = metric.endswith("_normalized") or metric.startswith("top")
    # condition numbers of nearly dependent directions are powers of ten apart
    low, high = (0.0, 1.0) if bounded else style.color_range(values)
    norm = LogNorm(max(low, 0.5), high) if metric == "condition" else Normalize(low, high)
    axes = style.new_axes(
        ax, 1.1 + (0.16 if len(rows) > 16 else 0.2) * min(len(rows), 40), style.grid_width(len(grid.columns))
    )
    mesh = style.heat(axes, values, norm, "cividis")
    style.label_columns(axes, short_names([str(name) for name in grid.columns]))
    style.label_rows(axes, rows)
    if columns == "task":
        blocks = [name.partition(".")[0] for name in rows]
        for row in range(1, len(rows)):
            if blocks[row] != blocks[row - 1]:
                axes.axhline(row, color="white", linewidth=2.2)
    else:
        axes.set_ylabel("block", fontsize=style.SMALL, color=style.INK)
    style.color_bar(mesh, axes, TITLES.get(metric, metric), aspect=30)
    return axes
