"""Style common to all figures: width, colours, grids of numbers, legends."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from analysis.plots.text import name_text

COLUMN = 3.3
"""Width of a column of text in inches, at which all text is legible."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's colours, told apart under every common colour blindness; markers differ as well."""
MARKERS = "osD^vP*"
INK, FAINT = "#222222", "#8A8A8A"
MISSING = "#EEEEEE"
TEXT, SMALL = 8.0, 7.0
"""Sizes of text in points."""

TITLES = {
    "entropy_energy": "spectral entropy (nats)",
    "entropy_energy_normalized": "spectral entropy / ln r",
    "entropy_singular": "spectral entropy of σ (nats)",
    "entropy_singular_normalized": "spectral entropy of σ / ln r",
    "renyi2_entropy_energy": "Rényi-2 entropy (nats)",
    "effective_rank_energy": "effective rank, energy",
    "effective_rank_roy_vetterli": "effective rank, Roy–Vetterli",
    "participation_ratio": "participation ratio",
    "stable_rank": "stable rank",
    "frobenius": "Frobenius norm",
    "spectral_norm": "spectral norm",
    "condition": "condition number",
    "norm_ratio": "‖ΔW‖ / ‖W‖ (Frobenius)",
    "spectral_norm_ratio": "‖ΔW‖ / ‖W‖ (spectral)",
    "intruder_dimensions": "intruder dimensions",
    "input_overlap": "overlap of input subspaces",
    "output_overlap": "overlap of output subspaces",
    "alignment": "cosine of updates",
    "backward": "energy on earlier inputs",
    "forward_subspace": "later update inside earlier frames",
    "forward_corruption": "corruption of components, mean",
    "forward_corruption_energy": "corruption, weighted by energy",
    "forward_corruption_max": "corruption, largest",
    "leakage": "energy in the protected subspace",
    "activation_drift": "drift on earlier inputs / white",
    "activation_drift_relative": "drift on earlier inputs / ‖Wx‖²",
    "activation_alignment": "cosine on earlier inputs",
}


def new_axes(ax: Axes | None, height: float, width: float = COLUMN) -> Axes:
    """The given axes, or those of a new figure."""
    return Figure(figsize=(width, height), layout="constrained").subplots() if ax is None else ax


def plain(axes: Axes, *, x: str = "", y: str = "", grid: bool = True) -> None:
    """Draw two light spines, small ticks, and the names of the axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", labelsize=SMALL, color=FAINT, labelcolor=INK, length=3)
    axes.set_xlabel(x, fontsize=TEXT, color=INK)
    axes.set_ylabel(y, fontsize=TEXT, color=INK)
    if grid:
        axes.grid(axis="y", color=MISSING, linewidth=0.6)
        axes.set_axisbelow(True)


def heat(axes: Axes, values: NDArray[Any], norm: Normalize, cmap: str, *, form: str | None = None) -> Any:
    """A grid of coloured cells with their numbers, first row on top, unknown cells grey."""
    rows, columns = values.shape
    axes.set_facecolor(MISSING)
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=cmap, norm=norm, edgecolors="white", linewidth=0.5)
    axes.set_ylim(rows, 0)  # not invert_yaxis: axes that share y would turn it twice
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=INK, labelsize=SMALL)
    for row, column in np.ndindex(rows, columns) if form is not None else ():
        value = float(values[row, column])
        if np.isnan(value):
            continue
        red, green, blue, _ = mesh.cmap(norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5  # luma of ITU-R BT.601
        position, color = (column + 0.5, row + 0.5), INK if dark else "white"
        text = format(value, form or "").replace("-", "−")
        if len(text) > 4 and text.lstrip("−").startswith("0."):
            text = text.replace("0.", ".", 1)  # narrow cells: .037 for 0.037
        size = SMALL if columns <= 5 or len(text) <= 3 else SMALL - 1.0 if columns <= 7 else SMALL - 2.0
        axes.text(*position, text, ha="center", va="center", fontsize=size, color=color)
    return mesh


def label_columns(axes: Axes, names: Sequence[str], *, offset: float = 0.5) -> None:
    """Write names under the columns of a grid, slanted; with offset 0, under the steps of an axis."""
    at, shown = np.arange(len(names)) + offset, [name_text(name) for name in names]
    axes.set_xticks(at, shown, fontsize=SMALL, rotation=40, ha="right", rotation_mode="anchor")


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write names beside the rows of a grid; beside every k-th row where there are many."""
    step = max(1, -(-len(names) // 40))
    at, shown = np.arange(0, len(names), step) + 0.5, [name_text(name) for name in names[::step]]
    axes.set_yticks(at, shown, fontsize=SMALL if len(names) <= 16 else 5.5)


def log_scale(axes: Axes) -> None:
    """Label a logarithmic ordinate sparsely: 0.3, 1, 3 in a short range, decades in a long one."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    short = high / low < 300
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if short else (1.0,), numticks=12 if short else 7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value > 1e-3 else _scientific(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def color_bar(mesh: Any, axes: Axes, label: str, *, aspect: int = 25) -> Any:
    """A colour bar beside the axes."""
    bar = axes.figure.colorbar(mesh, ax=[axes], aspect=aspect, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, color=FAINT, labelcolor=INK, length=2)
    bar.set_label(label, fontsize=TEXT, color=INK)
    return bar


def color_range(values: NDArray[Any]) -> tuple[float, float]:
    """Smallest and largest known value, moved apart if they are equal."""
    known = values[np.isfinite(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def style_of(label: str, position: int, palette: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Colour and marker of a line: by its label in the palette if it has one, else by its position in the figure."""
    if palette and label in palette:
        return palette[label], MARKERS[list(palette).index(label) % len(MARKERS)]
    return PALETTE[position % len(PALETTE)], MARKERS[position % len(MARKERS)]


def panels(tasks: Sequence[str], *, height: float) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one small panel per task, three in a row."""
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(1.0 + 2.9 * columns, 0.9 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    named = dict(zip(tasks, grid, strict=False))
    for number, (task, axes) in enumerate(named.items(), start=1):
        axes.set_title(f"{number}  {name_text(task)}", loc="left", fontsize=9.5, color=INK)
        plain(axes)
    return figure, named


def share_names(figure: Figure, named: Mapping[str, Axes], labels: Sequence[str], *, x: str, y: str) -> None:
    """Name the axes of all panels once, and draw one legend above them; none for a single unnamed line."""
    for axes in named.values():
        axes.set(xlabel="", ylabel="")
        if legend := axes.get_legend():
            legend.remove()
    figure.supxlabel(x, fontsize=9, color=INK)
    figure.supylabel(y, fontsize=9, color=INK)
    if any(labels):
        handles, names = next(iter(named.values())).get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)), frameon=False, fontsize=9)


def axes_legend(axes: Axes, *, columns: int = 3) -> None:
    """Draw a legend above the axes if any line has a name."""
    if names := axes.get_legend_handles_labels()[1]:
        spacing: dict[str, Any] = {"handlelength": 1.6, "columnspacing": 1.0, "borderaxespad": 0.2}
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "frameon": False}
        axes.legend(ncols=min(columns, len(names)), fontsize=SMALL, **above, **spacing)


def same_tasks(tasks: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The tasks of every label; ValueError if they differ, or nothing is given."""
    if not tasks:
        raise ValueError("nothing to plot: no run and no adapters")
    (first, expected), *others = tasks.items()
    for label, other in others:
        if other != expected:
            raise ValueError(f"{first!r} and {label!r} have different tasks: {', '.join(expected)}; {', '.join(other)}")
    return expected


def unique(values: "pd.Series[Any]") -> list[Any]:
    """Values in the order of their first occurrence."""
    return list(dict.fromkeys(values))
