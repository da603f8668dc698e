"""Imbalance against forgetting, with a line, its confidence band and a permutation test."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy import special

from analysis.plots.style import INK, SMALL, axes_legend, new_axes, plain, style_of
from analysis.plots.text import literal, name_text
from analysis.statistics.resampling import permutation_test

RESAMPLES = 2000
RESOLUTION = 1e-9
"""Differences of imbalance that are rounding: frames in float32 are orthonormal to 1e-6, which entropies square."""
FEWEST = 5
"""Distinct points that a line, its band and a test need: with fewer, nearly any scatter looks like a law."""


@literal
def plot_imbalance(
    table: pd.DataFrame,
    *,
    x: str = "imbalance",
    y: str = "forgetting",
    group: str = "run",
    level: float = 0.95,
    seed: int = 0,
    resolution: float = RESOLUTION,
    ax: Axes | None = None,
) -> Axes:
    """One point per row, a least-squares line with its confidence band, and the permutation test within groups.

    `table` is that of `imbalance_table`, or any with two columns of numbers and one that names the group. The
    band is Student's for the line at fixed x, ``ŷ ± t s √(1/n + (x − x̄)² / Σ(xᵢ − x̄)²)``: it assumes independent
    points with equal variance. The corner shows Spearman's rank correlation within groups and its permutation p-value.

    Values of x that differ by no more than `resolution` are the same. There is no line, no band and no test if all are,
    or if fewer than five points are distinct: the corner then says so.

    Raises:
        ValueError: a column is missing, or fewer than two points have both numbers.
    """
    if missing := [column for column in (x, y, group) if column not in table.columns]:
        raise ValueError(f"the table has no column {missing[0]!r}; its columns are {list(table.columns)}")
    known = table.dropna(subset=[x, y])
    if len(known) < 2:
        raise ValueError(f"{len(known)} rows have both {x} and {y}: a scatter plot needs at least two")
    axes = new_axes(ax, 2.6)
    for position, (label, rows) in enumerate(known.groupby(group, sort=False)):
        color, marker = style_of(str(label), position)
        edge: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.5}
        axes.scatter(rows[x], rows[y], s=20, color=color, marker=marker, label=name_text(label), zorder=3, **edge)
    points = known[[x, y]].to_numpy(dtype=float)
    start, end = points[:, 0].min(), points[:, 0].max()
    note = ""
    if end - start <= resolution:
        axes.set_xlim(start - 0.05, end + 0.05)  # no scale made of rounding
    elif (distinct := _distinct(points, resolution)) < FEWEST:
        note = f"{distinct} distinct points: too few for a line"
    else:
        grid = np.linspace(start, end, 50)
        line, reach = _line(points, grid, level)
        axes.plot(grid, line, color=INK, linewidth=1.2, zorder=2)
        axes.fill_between(grid, line - reach, line + reach, color=INK, alpha=0.12, linewidth=0, zorder=0)
        note = _test(points, known[group], resolution, seed)
    if note:
        axes.margins(y=0.16)  # room for the note
        axes.text(0.98, 0.03, note, transform=axes.transAxes, ha="right", va="bottom", fontsize=SMALL, color=INK)
    plain(axes, x=f"{x} (1 − entropy / ln r)" if x == "imbalance" else x, y=f"{y} (points)" if y == "forgetting" else y)
    axes_legend(axes, own=ax is None)
    return axes


def _distinct(points: NDArray[np.float64], resolution: float) -> int:
    """Number of points with different x, up to `resolution`, or different y."""
    steps = np.round(points / [resolution, 1.0]) if resolution else points
    return len(np.unique(np.column_stack([steps[:, 0], points[:, 1]]), axis=0))


def _line(
    points: NDArray[np.float64], grid: NDArray[np.float64], level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least-squares line at the points of `grid`, and half the height of its band there."""
    centre = points.mean(axis=0)
    away = points - centre
    spread = float(away[:, 0] @ away[:, 0])
    slope = float(away[:, 0] @ away[:, 1]) / spread
    free = len(points) - 2
    error = float(np.linalg.norm(away[:, 1] - slope * away[:, 0])) / free**0.5
    far = grid - centre[0]
    reach = special.stdtrit(free, (1 + level) / 2) * error * np.sqrt(1 / len(points) + far**2 / spread)
    return centre[1] + slope * far, reach


def _test(points: NDArray[np.float64], groups: pd.Series, resolution: float, seed: int) -> str:
    x, y = points.T
    steps = np.round(x / resolution) if resolution else x  # what differs by rounding has one rank
    try:
        result = permutation_test(steps, y, groups=groups, samples=RESAMPLES, seed=seed)
    except ValueError:  # too few points, or nothing varies within a group: there is no test to show
        return ""
    return f"ρ = {result.statistic:.2f}, p = {result.p_value:.2g}".replace("-", "−")
