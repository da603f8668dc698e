"""Figures. Each function returns a matplotlib Figure and leaves pyplot and the global settings alone."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from analysis.adapters import AdapterSet
from analysis.interference import interference_table
from analysis.names import short_names
from analysis.records import Record, label_records
from analysis.spectrum import singular_values, spectrum_table

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's colours, told apart under every common colour blindness; markers differ as well."""
MARKERS = "osD^vP*"
INK, FAINT = "#222222", "#8A8A8A"
MISSING = "#EEEEEE"

TITLES = {
    "entropy_energy": "spectral entropy (nats)",
    "entropy_energy_normalized": "spectral entropy / ln r",
    "effective_rank_energy": "effective rank, energy",
    "effective_rank_roy_vetterli": "effective rank, Roy–Vetterli",
    "participation_ratio": "participation ratio",
    "stable_rank": "stable rank",
    "frobenius": "Frobenius norm",
    "spectral_norm": "spectral norm",
    "condition": "condition number",
    "input_overlap": "overlap of input subspaces",
    "output_overlap": "overlap of output subspaces",
    "alignment": "cosine of updates",
    "leakage": "energy in the protected subspace",
}


def plot_spectra(
    adapters: AdapterSet | Mapping[str, AdapterSet],
    *,
    update: str = "task",
    device: str = "cpu",
    palette: Mapping[str, str] | None = None,
) -> Figure:
    """Singular values of every task, one panel a task, one line a set of adapters.

    Values are divided by ``‖ΔW‖_F / √r``, the height that all of them would have in a flat spectrum of the same
    norm; the line is the median over layers, the band goes from the 10th to the 90th percentile.

    Raises:
        ValueError: the sets have different tasks, or `update` is neither "task" nor "accumulated".
    """
    if update not in ("task", "accumulated"):
        raise ValueError(f"update is {update!r}, choose 'task' or 'accumulated'")
    sets = {"": adapters} if isinstance(adapters, AdapterSet) else dict(adapters)
    tasks = _same_tasks({label: found.tasks for label, found in sets.items()})
    figure, panels = _panels(tasks, height=2.3)
    for place, (label, found) in enumerate(sets.items()):
        frame = singular_values(found, device)
        frame = frame[frame["update"] == update]
        energy = frame["value"].pow(2).groupby([frame["task"], frame["layer"]]).transform("mean")
        frame = frame.assign(value=frame["value"] / energy.pow(0.5))
        for task, axes in panels.items():
            by_index = frame[frame["task"] == task].groupby("index")["value"]
            low, middle, high = (by_index.quantile(q) for q in (0.1, 0.5, 0.9))
            color, marker = _style(label, place, palette)
            axes.fill_between(middle.index, low, high, color=color, alpha=0.18, linewidth=0)
            marker = marker if len(middle) <= 32 else ""
            axes.plot(middle.index, middle, color=color, marker=marker, markersize=3, linewidth=1.4, label=label)
    for axes in panels.values():
        axes.set_yscale("log")
        axes.axhline(1.0, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", color=MISSING, linewidth=0.6)
    _share_limits(panels)
    figure.supxlabel("index of the singular value", fontsize=9, color=INK)
    figure.supylabel("singular value / flat value", fontsize=9, color=INK)
    _legend(figure, panels, list(sets))
    return figure


def plot_entropy_map(
    spectra: AdapterSet | pd.DataFrame,
    *,
    metric: str = "entropy_energy_normalized",
    updates: Sequence[str] = ("task", "accumulated"),
) -> Figure:
    """One number of the spectrum for every layer and task, a map for each kind of update on one colour scale.

    `spectra` is an AdapterSet or the table that `spectrum_table` made of it.

    Raises:
        ValueError: the table has no such metric or update.
    """
    table = spectrum_table(spectra) if isinstance(spectra, AdapterSet) else spectra
    maps = []
    for update in updates:
        chosen = table[(table["metric"] == metric) & (table["update"] == update)]
        if chosen.empty:
            raise ValueError(f"no metric {metric!r} of {update!r} updates; there are {_unique(table['metric'])}")
        tasks, layers = _unique(chosen["task"]), _unique(chosen["layer"])
        grid = chosen.pivot(index="layer", columns="task", values="value").loc[layers, tasks]
        maps.append((f"update {'of the task' if update == 'task' else 'accumulated'}", grid))
    values = np.concatenate([grid.to_numpy().ravel() for _, grid in maps])
    bounded = metric == "entropy_energy_normalized" or metric.startswith("top")
    norm = Normalize(0.0, 1.0) if bounded else Normalize(*_range(values))
    height = 1.2 + 0.15 * len(layers)
    figure = Figure(figsize=(2.6 + (0.9 + 0.38 * len(tasks)) * len(maps), height), layout="constrained")
    grids = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for axes, (title, grid) in zip(grids, maps, strict=True):
        mesh = _heat(axes, grid.to_numpy(), norm, "cividis", annotate=False)
        _label_columns(axes, tasks)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        blocks = [name.partition(".")[0] for name in short_names(layers)]
        for row in range(1, len(layers)):
            if blocks[row] != blocks[row - 1]:
                axes.axhline(row, color="white", linewidth=2.2)
    grids[0].set_yticks(np.arange(len(layers)) + 0.5, short_names(layers), fontsize=6.5)
    bar = figure.colorbar(mesh, ax=list(grids), aspect=40, pad=0.02)
    _style_bar(bar, TITLES.get(metric, metric))
    return figure


def plot_interference(
    interference: AdapterSet | pd.DataFrame, *, metric: str = "alignment", layer: str = "total"
) -> Figure:
    """Tasks against tasks: one interference metric of a layer, or of all of them together.

    `interference` is an AdapterSet or the table that `interference_table` made of it. Overlaps start at
    0 with chance marked on the scale; alignments are symmetric about 0.

    Raises:
        ValueError: the table has no such metric, or not in this layer.
    """
    table = interference_table(interference) if isinstance(interference, AdapterSet) else interference
    chosen = table[(table["metric"] == metric) & (table["layer"] == layer)]
    if chosen.empty:
        raise ValueError(f"no {metric!r} of layer {layer!r}; the metrics are {_unique(table['metric'])}")
    grid = chosen.pivot(index="task_b", columns="task_a", values="value")
    if metric == "leakage":
        grid = grid.loc[_unique(chosen["task_b"])]
    else:
        tasks = _unique(pd.concat([chosen["task_a"], chosen["task_b"]]))
        grid = grid.combine_first(grid.T).reindex(index=tasks, columns=tasks)
    values = grid.to_numpy(dtype=float)
    peak, chance = float(np.nanmax(np.abs(values), initial=0.0)), float(chosen["chance"].mean())
    # A scale no finer than chance (or a cosine of 0.05): what is far below it should not look dramatic.
    top = max(peak, 0.05 if metric == "alignment" else 2 * chance) or 1.0
    norm = Normalize(-top if metric == "alignment" else 0.0, top)
    rows, columns = values.shape
    figure = Figure(figsize=(1.8 + 0.47 * columns, 1.0 + 0.4 * rows), layout="constrained")
    axes = figure.subplots()
    form = ".0e" if metric == "leakage" else ("z.2f" if peak >= 0.1 else "z.3f")
    mesh = _heat(axes, values, norm, "RdBu_r" if metric == "alignment" else "cividis", annotate=True, form=form)
    _label_columns(axes, list(grid.columns))
    axes.set_yticks(np.arange(rows) + 0.5, list(grid.index), fontsize=8)
    bar = figure.colorbar(mesh, ax=axes, aspect=25, pad=0.03)
    _style_bar(bar, TITLES.get(metric, metric))
    if metric != "alignment" and 0 < chance < 0.94 * top:
        low = [] if chance < 0.06 * top else [(0.0, "0")]  # labels closer than this would touch
        ticks = dict([*low, (chance, f"chance {chance:.2g}"), (top, f"{top:.2g}")])
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
        bar.ax.axhline(chance, color=PALETTE[1], linewidth=1.5)
    return figure


def plot_accuracy_matrix(
    accuracy: ArrayLike,
    names: Sequence[str],
    *,
    zero_shot: ArrayLike | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Scores (percent) of every task, in columns, after training each task, in rows; NaN stays blank.

    Cells on the diagonal, framed, were just learned; to their right tasks are unseen. `zero_shot` adds the row
    of the pre-trained model on top. `limits` fix the colour scale, to compare runs.

    Raises:
        ValueError: the matrix is not T × T for T names, or zero_shot not of length T.
    """
    matrix = np.asarray(accuracy, dtype=float)
    count = len(names)
    if matrix.shape != (count, count):
        raise ValueError(f"{count} names need a matrix of shape {(count, count)}, got {matrix.shape}")
    labels = [f"after {name}" for name in names]
    values = matrix
    if zero_shot is not None:
        row = np.asarray(zero_shot, dtype=float)
        if row.shape != (count,):
            raise ValueError(f"zero_shot has shape {row.shape}, {count} names need {(count,)}")
        values, labels = np.vstack([row, matrix]), ["pre-trained", *labels]
    norm = Normalize(*(limits or _range(values)))
    figure = Figure(figsize=(2.8 + 0.6 * count, 1.2 + 0.38 * len(labels)), layout="constrained")
    axes = figure.subplots()
    mesh = _heat(axes, values, norm, "cividis", annotate=True, form=".1f")
    first = len(labels) - count
    if first:
        axes.axhline(1, color="white", linewidth=4)
    for place in np.flatnonzero(~np.isnan(matrix.diagonal())):
        corner, side = (place + 0.04, place + first + 0.04), 0.92
        frame = Rectangle(corner, side, side, fill=False, edgecolor=PALETTE[1], linewidth=1.8, zorder=3)
        axes.add_patch(frame)
    _label_columns(axes, list(names))
    axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=8)
    _style_bar(figure.colorbar(mesh, ax=axes, aspect=25, pad=0.03), "score (%)")
    return figure


def plot_forgetting(
    records: Record | Sequence[Record] | Mapping[str, Record],
    *,
    score: str | None = None,
    palette: Mapping[str, str] | None = None,
) -> Figure:
    """Score (percent) of each task along the stream, one panel a task, one line a run.

    Point 0 is the pre-trained model, point i the model after task i. The dashed part comes before the task is
    learned, the vertical line is the moment it is. Runs in a sequence are labelled by their method, or by name
    where a method occurs twice. `score` defaults to each run's primary score.

    Raises:
        ValueError: the runs have different tasks, or lack the score.
    """
    runs = records if isinstance(records, Mapping) else label_records(records)
    tasks = _same_tasks({label: run.tasks for label, run in runs.items()})
    figure, panels = _panels(tasks, height=2.0)
    steps = np.arange(len(tasks) + 1)
    for place, (label, run) in enumerate(runs.items()):
        chosen = score or run.primary
        if chosen not in run.accuracy:
            raise ValueError(f"run {run.name!r} has no score {chosen!r}, only {sorted(run.accuracy)}")
        start = run.zero_shot.get(chosen, np.full(len(tasks), np.nan))
        curves: NDArray[np.float64] = np.vstack([start, run.accuracy[chosen]])
        color, marker = _style(label, place, palette)
        for column, axes in enumerate(panels.values()):
            learned = column + 1
            before, after = curves[: learned + 1, column], curves[learned:, column]
            axes.plot(steps[: learned + 1], before, color=color, linewidth=1.0, linestyle=(0, (3, 2)), alpha=0.75)
            style: dict[str, Any] = {"marker": marker, "markersize": 3.5, "linewidth": 1.6}
            axes.plot(steps[learned:], after, color=color, label=label, **style)
    for column, axes in enumerate(panels.values()):
        axes.axvline(column + 1, color=FAINT, linewidth=0.8, zorder=0)
        axes.set_xticks(steps)
        axes.grid(axis="y", color=MISSING, linewidth=0.6)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        low, high = axes.get_ylim()
        pad = max(0.0, 10.0 - (high - low)) / 2  # at least ten points: small changes should look small
        axes.set_ylim(low - pad, high + pad)
    figure.supxlabel("tasks learned", fontsize=9, color=INK)
    figure.supylabel("score on this task (%)", fontsize=9, color=INK)
    _legend(figure, panels, list(runs))
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure: no date, no random identifiers."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "analysis"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def to_data_uri(figure: Figure) -> str:
    """The figure as the source of an image, inside a page."""
    return "data:image/svg+xml;base64," + base64.b64encode(to_svg(figure).encode()).decode()


def _panels(tasks: Sequence[str], *, height: float) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one small panel a task, three in a row."""
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(1.0 + 2.9 * columns, 0.9 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    panels = dict(zip(tasks, grid, strict=False))
    for number, (task, axes) in enumerate(panels.items(), start=1):
        axes.set_title(f"{number}  {task}", loc="left", fontsize=9.5, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(which="both", labelsize=8, color=FAINT, labelcolor=INK, length=3)
    return figure, panels


def _share_limits(panels: Mapping[str, Axes]) -> None:
    """One logarithmic range for all panels: a decade at least, and nothing below the rounding of float32."""
    limits = np.array([axes.get_ylim() for axes in panels.values()])
    for axes in panels.values():
        axes.set_ylim(max(min(limits[:, 0].min(), 0.3), 1e-8), max(limits[:, 1].max(), 3.0))


def _legend(figure: Figure, panels: Mapping[str, Axes], labels: Sequence[str]) -> None:
    """One legend above all panels; none for a single unnamed line."""
    if any(labels):
        handles, names = next(iter(panels.values())).get_legend_handles_labels()
        columns = min(4, len(names))
        figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def _heat(axes: Axes, values: NDArray[Any], norm: Normalize, cmap: str, *, annotate: bool, form: str = "") -> Any:
    """A grid of coloured cells, first row on top, unknown cells grey; text is dark or light by the cell."""
    rows, columns = values.shape
    axes.set_facecolor(MISSING)
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=cmap, norm=norm, edgecolors="white", linewidth=0.5)
    axes.set_ylim(rows, 0)  # not invert_yaxis: axes that share y would turn it twice
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=INK)
    if annotate:
        for row, column in np.ndindex(rows, columns):
            value = float(values[row, column])
            if np.isnan(value):
                continue
            red, green, blue, _ = mesh.cmap(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5  # luma of ITU-R BT.601
            place = (column + 0.5, row + 0.5)
            color = INK if dark else "white"
            axes.text(*place, format(value, form).replace("-", "−"), ha="center", va="center", fontsize=8, color=color)
    return mesh


def _label_columns(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(np.arange(len(names)) + 0.5, names, fontsize=8, rotation=40, ha="right", rotation_mode="anchor")


def _style_bar(bar: Any, label: str) -> None:
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK, length=2)
    bar.set_label(label, fontsize=8.5, color=INK)


def _range(values: NDArray[Any]) -> tuple[float, float]:
    """Smallest and largest known value, a little apart if they are equal."""
    known = values[np.isfinite(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _style(label: str, place: int, palette: Mapping[str, str] | None) -> tuple[str, str]:
    """Colour and marker of a run: by its place in the palette if it has one, else by its place in the figure."""
    if palette and label in palette:
        return palette[label], MARKERS[list(palette).index(label) % len(MARKERS)]
    return PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]


def _same_tasks(tasks: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if not tasks:
        raise ValueError("nothing to plot: no run and no adapters")
    (first, wanted), *others = tasks.items()
    for label, found in others:
        if found != wanted:
            raise ValueError(f"{first!r} and {label!r} have different tasks: {', '.join(wanted)}; {', '.join(found)}")
    return wanted


def _unique(values: "pd.Series[Any]") -> list[Any]:
    return list(dict.fromkeys(values))
