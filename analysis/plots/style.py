"""Style common to all figures: width, colours, grids of numbers, legends."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from analysis.plots.text import LONGEST, figure_of, name_text

COLUMN = 3.3
"""Width of a column of text in inches, at which all text is legible."""
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"),
    *("#7F7F7F", "#8C5109", "#882255", "#999933"),
)
"""Okabe and Ito's colours, told apart under every common colour blindness, and four more; markers differ as well."""
MARKERS = "osD^vP*Xh<>"
INK, FAINT = "#222222", "#8A8A8A"
MISSING = "#EEEEEE"
TEXT, SMALL = 8.0, 7.0
"""Sizes of text in points."""
CROWD = 7
"""Lines that a legend names; more have their names at their ends."""
LEADER: dict[str, Any] = {"arrowstyle": "-", "linewidth": 0.5, "relpos": (0.0, 0.5), "shrinkA": 1, "shrinkB": 2}
"""Line from the end of a line to its name."""
CELL = 0.3
"""Least width of a column of numbers in inches."""


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


def grid_width(columns: int) -> float:
    """Width of a figure with a grid of numbers."""
    return COLUMN + CELL * max(0, columns - CROWD)


def label_columns(axes: Axes, names: Sequence[str], *, offset: float = 0.5) -> None:
    """Write names under the columns of a grid, slanted; with offset 0, under the steps of an axis.

    Many names are steeper: they need less width.
    """
    at, shown = np.arange(len(names)) + offset, [name_text(name) for name in names]
    steep = 40 if len(names) <= CROWD else 60
    axes.set_xticks(at, shown, fontsize=SMALL, rotation=steep, ha="right", rotation_mode="anchor")


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
    place = list(palette).index(label) if palette and label in palette else position
    # each time the colours start again, the markers are one further: no two of the first 121 lines are the same
    marker = MARKERS[(place + place // len(PALETTE)) % len(MARKERS)]
    return (palette[label] if palette and label in palette else PALETTE[place % len(PALETTE)]), marker


def panels(tasks: Sequence[str], *, height: float, columns: int) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one small panel per task, `columns` in a row."""
    width, longest = (2.9, LONGEST) if columns > 2 else (2.1, 22)  # few columns are for narrow pages
    columns = min(columns, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(1.0 + width * columns, 0.9 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    named = dict(zip(tasks, grid, strict=False))
    for number, (task, axes) in enumerate(named.items(), start=1):
        axes.set_title(f"{number}  {name_text(task, longest)}", loc="left", fontsize=9.5, color=INK)
        plain(axes)
    return figure, named


def share_names(figure: Figure, named: Mapping[str, Axes], labels: Sequence[str], *, x: str, y: str) -> None:
    """Name the axes of all panels once, and draw one legend above them; none for a single unnamed line."""
    for axes in named.values():
        axes.set(xlabel="", ylabel="")
        if legend := axes.get_legend():
            legend.remove()
        for text in [text for text in axes.texts if isinstance(text, Annotation)]:
            text.remove()
    figure.supxlabel(x, fontsize=9, color=INK)
    figure.supylabel(y, fontsize=9, color=INK)
    if any(labels):
        found = [axes.get_legend_handles_labels() for axes in named.values()]
        handles, names = max(found, key=lambda each: len(each[1]))  # a zero update has no line in its panel
        if not names:
            return
        columns = _columns(figure, names, 9, 4)
        figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
        _grow(figure, names, columns, 9)


def axes_legend(axes: Axes, *, own: bool) -> None:
    """Name the lines: in a legend above the axes, or beside their right ends if there are more than `CROWD`.

    The legend has as many columns as fit into the width of the figure. A figure of its `own` grows with the names.
    """
    handles, names = axes.get_legend_handles_labels()
    if not names:
        return
    if len(names) > CROWD and all(isinstance(handle, Line2D) for handle in handles):
        least = 0.8 + 1.35 * SMALL / 72 * len(names)
        _name_ends(axes, handles, names)
        if own:
            figure_of(axes).set_figheight(max(least, figure_of(axes).get_figheight()))
        return
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "frameon": False}
    spacing: dict[str, Any] = {"handlelength": 1.6, "columnspacing": 1.0, "borderaxespad": 0.2}
    columns = _columns(figure_of(axes), names, SMALL, 3)
    axes.legend(handles, names, ncols=columns, fontsize=SMALL, **above, **spacing)
    if own:
        _grow(figure_of(axes), names, columns, SMALL)


def _grow(figure: Figure, names: Sequence[str], columns: int, size: float) -> None:
    """Make a figure higher by the rows of its legend after the second."""
    rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + 1.6 * size / 72 * max(0, rows - 2))


def _columns(figure: Figure, names: Sequence[str], size: float, most: int) -> int:
    """Number of columns of a legend, so that it is no wider than the figure. Letters are 0.6 of their size wide."""
    widest = max(map(len, names)) * 0.6 * size + 4.5 * size  # the line and the gaps beside it
    return max(1, min(most, len(names), int(0.95 * 72 * figure.get_figwidth() / widest)))


def _name_ends(axes: Axes, lines: Sequence[Any], names: Sequence[str]) -> None:
    """Write names beside the right ends of lines, evenly spaced in the order of the ends, with leading lines."""
    known = [np.flatnonzero(np.isfinite(np.asarray(line.get_ydata(), dtype=float))) for line in lines]
    ends = [(line.get_xdata()[at[-1]], line.get_ydata()[at[-1]]) for line, at in zip(lines, known, strict=True)]
    order = sorted(range(len(lines)), key=lambda place: (ends[place][1], place))
    for rank, place in enumerate(order):
        color = lines[place].get_color()
        axes.annotate(
            names[place],
            ends[place],
            xytext=(1.15, rank / (len(order) - 1)),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            color=color,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.5,
                "relpos": (0.0, 0.5),
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


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
    return list(dict.fromkeys(values.drop_duplicates()))  # dict: equal values of two types are one
