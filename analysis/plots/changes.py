"""Figures of suggested ranks."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis.plots import style
from analysis.plots.text import literal

MAY_LOSE: dict[str, Any] = {"color": style.INK, "linewidth": 0.8, "linestyle": (0, (4, 2))}


@literal
def plot_kept_share(curve: pd.DataFrame, *, keep: float, rank: int | None = None, ax: Axes | None = None) -> Axes:
    """The share that is lost at each rank: median over layers, the worst layer, and the band of the middle 80 %.

    `curve` is that of a `RankSuggestion`. The dashed line is the share that may be lost, ``1 − keep``; `rank` marks
    the one rank for all layers.
    """
    axes = style.new_axes(ax, 2.6)
    layers = curve["task"] + " " + curve["layer"]
    shares = curve.assign(layer=layers, lost=1.0 - curve["kept"]).pivot(index="layer", columns="rank", values="lost")
    lost = shares.fillna(0.0).to_numpy(dtype=float)  # a layer of lower rank loses nothing beyond it
    ranks = np.arange(1, lost.shape[1] + 1)
    low, middle, high = np.quantile(lost, [0.1, 0.5, 0.9], axis=0)
    floor = min(1e-3, (1 - keep) / 10) if keep < 1 else 1e-6
    clip = [np.maximum(line, floor) for line in (low, middle, high, lost.max(0))]
    axes.fill_between(ranks, clip[0], clip[2], color=style.PALETTE[0], alpha=0.2, linewidth=0)
    axes.plot(ranks, clip[1], color=style.PALETTE[0], marker="o", markersize=3, label="median of layers")
    axes.plot(ranks, clip[3], color=style.PALETTE[1], marker="s", markersize=3, label="worst layer")
    if keep < 1:
        axes.axhline(1 - keep, **MAY_LOSE, label=f"{1 - keep:.3g} may be lost")
    if rank is not None:
        axes.axvline(rank, color=style.FAINT, linewidth=0.8)
        axes.annotate(f" rank {rank}", (rank, 1.0), va="top", fontsize=style.SMALL, color=style.INK)
    axes.set_ylim(floor, 1.0)
    style.log_scale(axes)
    axes.set_ylim(floor, 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    style.plain(axes, x="rank", y="share of the update lost")
    style.axes_legend(axes, own=ax is None)
    return axes
