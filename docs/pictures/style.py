"""Common look of the pictures: a white card with round corners, readable on light and on dark pages."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

STATIC = Path(__file__).parents[1] / "_static"
WIDTH = 5.4
"""Inches. A phone of 420 pixels shows the picture at 0.75 of its size, and text of 10 points at 10 pixels."""
TEXT = 10.0
INK, SOFT, LINE = "#1d2126", "#5b6470", "#c3c9d0"
OLD, NEW, FREE = "#0072B2", "#D55E00", "#009E73"
"""Blue for what is protected, orange for what is new, green for what is free."""


HALO = (withStroke(linewidth=2.5, foreground="white"),)
"""Around words: lines behind them do not cross them out."""


def card(height: float) -> Figure:
    """An empty picture."""
    figure = Figure(figsize=(WIDTH, height))
    figure.patch.set_visible(False)
    edge = 0.012
    box = FancyBboxPatch(
        (edge, edge * WIDTH / height),
        1 - 2 * edge,
        1 - 2 * edge * WIDTH / height,
        boxstyle="round,pad=0,rounding_size=0.03",
        mutation_aspect=WIDTH / height,
        transform=figure.transFigure,
        facecolor="white",
        edgecolor=LINE,
        linewidth=0.8,
        zorder=-1,
    )
    figure.add_artist(box)
    return figure


def drawing(figure: Figure, box: tuple[float, float, float, float], limits: tuple[float, float, float, float]) -> Axes:
    """Axes without a frame, of one unit in both directions; `box` in shares of the figure, `limits` in data."""
    axes = figure.add_axes(box)
    axes.set_axis_off()
    axes.set(xlim=limits[:2], ylim=limits[2:], aspect="equal")
    return axes


def arrow(axes: Axes, start: np.ndarray, end: np.ndarray, color: str, **options: object) -> None:
    """An arrow between two points of the data."""
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0, **options}
    axes.add_patch(FancyArrowPatch(tuple(start), tuple(end), color=color, **look))


def write(axes: Axes, at: np.ndarray, words: str, color: str = INK, **options: object) -> Text:
    """Words at a point of the data."""
    look = {"ha": "center", "va": "center", "fontsize": TEXT, "linespacing": 1.25, **options}
    return axes.text(*at, words, color=color, **look)


def seen(points: np.ndarray, *, turn: float = 0.0, height: float = 0.42) -> np.ndarray:
    """Points of space (…, 3) on paper (…, 2): turned about the vertical axis, seen from above by `height` radians."""
    x, y, z = np.moveaxis(np.asarray(points, dtype=float), -1, 0)
    across = np.cos(turn) * x - np.sin(turn) * y
    away = np.sin(turn) * x + np.cos(turn) * y
    return np.stack([across, away * np.sin(height) + z * np.cos(height)], axis=-1)


def words_of(figure: Figure) -> list[str]:
    """All texts of a picture, in the order in which they were drawn."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def save(figure: Figure, path: Path) -> None:
    """Write SVG with letters as outlines, the same bytes each time; its description holds the texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Description": " | ".join(" ".join(words.split()) for words in words_of(figure))}
    with mpl.rc_context({"svg.hashsalt": "pictures"}):
        figure.savefig(path, format="svg", metadata=metadata, transparent=False)
