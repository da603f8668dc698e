"""Imbalance against forgetting, with a fit and what resampling says about it."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from analysis.plots.style import INK, SMALL, axes_legend, new_axes, plain, style_of
from analysis.resampling import permutation_test

RESAMPLES = 2000


def plot_imbalance(
    table: pd.DataFrame,
    *,
    x: str = "imbalance",
    y: str = "forgetting",
    group: str = "run",
    level: float = 0.95,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """A point a row, a least-squares line with its bootstrap band, and the permutation test within groups.

    `table` is that of `imbalance_table`, or any with two columns of numbers and one that names the group. The
    band holds `level` of the lines through resampled points; it needs four points, else there is none. The
    corner shows Spearman's rank correlation within groups and its permutation p-value.

    Raises:
        ValueError: a column is missing, or fewer than two points have both numbers.
    """
    if missing := [column for column in (x, y, group) if column not in table.columns]:
        raise ValueError(f"the table has no column {missing[0]!r}; its columns are {list(table.columns)}")
    known = table.dropna(subset=[x, y])
    if len(known) < 2:
        raise ValueError(f"{len(known)} rows have both {x} and {y}: a scatter plot needs at least two")
    axes = new_axes(ax, 2.6)
    for place, (label, found) in enumerate(known.groupby(group, sort=False)):
        color, marker = style_of(str(label), place)
        style: dict[str, Any] = {
            "s": 20,
            "color": color,
            "marker": marker,
            "edgecolors": "white",
            "linewidths": 0.5,
            "zorder": 3,
        }
        axes.scatter(found[x], found[y], label=str(label), **style)
    points = known[[x, y]].to_numpy(dtype=float)
    grid = np.linspace(points[:, 0].min(), points[:, 0].max(), 50)
    if grid[-1] > grid[0]:
        axes.plot(grid, _line(points, grid), color=INK, linewidth=1.2, zorder=2)
        if len(points) >= 4:
            low, high = _band(points, grid, level, seed)
            axes.fill_between(grid, low, high, color=INK, alpha=0.12, linewidth=0, zorder=0)
            axes.margins(y=0.12)
    test = _test(known, x, y, group, seed)
    if test:
        axes.text(0.98, 0.03, test, transform=axes.transAxes, ha="right", va="bottom", fontsize=SMALL, color=INK)
    plain(axes, x=f"{x} (1 − entropy / ln r)" if x == "imbalance" else x, y=f"{y} (points)" if y == "forgetting" else y)
    axes_legend(axes)
    return axes


def _line(points: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    centre = points.mean(axis=0)
    away = points - centre
    slope = (away[:, 0] @ away[:, 1]) / (away[:, 0] @ away[:, 0])
    line: NDArray[np.float64] = centre[1] + slope * (grid - centre[0])
    return line


def _band(
    points: NDArray[np.float64], grid: NDArray[np.float64], level: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Quantiles of the lines through resampled points; a draw of one point over and over has no line."""
    draw = np.random.default_rng(seed)
    chosen = [points[draw.integers(0, len(points), len(points))] for _ in range(RESAMPLES)]
    lines = np.array([_line(found, grid) for found in chosen if np.ptp(found[:, 0]) > 0])
    low, high = np.quantile(lines, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _test(known: pd.DataFrame, x: str, y: str, group: str, seed: int) -> str:
    try:
        found = permutation_test(known[x], known[y], groups=known[group], samples=RESAMPLES, seed=seed)
    except ValueError:  # too few points, or nothing varies within a group: there is no test to show
        return ""
    return f"ρ = {found.statistic:.2f}, p = {found.p_value:.2g}".replace("-", "−")
